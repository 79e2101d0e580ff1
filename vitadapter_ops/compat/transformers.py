# SPDX-License-Identifier: Apache-2.0
"""transformers: Deformable DETR, Grounding DINO, Mask2Former, RT-DETR and their relatives.

    from vitadapter_ops.compat.transformers import patch_transformers
    patch_transformers()                    # for models that exist as well as for new ones

    with patch_transformers("mask2former"): # or some of them, for a while
        outputs = model(**inputs)

Locations and softmax are computed in fp32 also under autocast and in 16-bit models, where the
original modules round a location to the nearest of 256 (bf16). The modules still return their
attention weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import _common, functions
from ._patch import Patch, Replacement

__all__ = ["MODELS", "MultiScaleDeformableAttention", "kernel_mapping", "patch_transformers"]


class MultiScaleDeformableAttention(nn.Module):
    """The layer that transformers calls by this name, for its kernels mapping too.

    It has no parameters and no state; `kernel_mapping` registers it.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Samples `value`.

        Args:
            value: [B, S, M, D], the levels one after the other.
            value_spatial_shapes: [L, 2]; not read, the list says the same without a device read.
            value_spatial_shapes_list: (H, W) of each level.
            level_start_index: [L]; not read.
            sampling_locations: [B, Q, M, L, P, 2], (x, y) as fractions.
            attention_weights: [B, Q, M, L, P].
            im2col_step: accepted and not needed.

        Returns:
            [B, Q, M * D], dtype of value.
        """
        return _common.sample(
            value, value_spatial_shapes_list, sampling_locations, attention_weights
        )


def _attention(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    padding: Tensor | None,
    reference_points: Tensor,
    spatial_shapes: _common.SpatialShapes,
) -> tuple[Tensor, Tensor]:
    """The modules' forward: their output, and the weights [B, Q, M, ...] in their dtype."""
    self: Any = module
    # RT-DETRv2 and D-FINE say for each level how many points it has, and spell it differently.
    points: Sequence[int] | None = getattr(self, "n_points_list", None)
    points = getattr(self, "num_points_list", points)
    several = points is not None
    if points is None:
        points = [self.n_points] * self.n_levels
    scale = getattr(self, "offset_scale", 0.5)
    project = getattr(self, "value_proj", None)
    value = encoder_hidden_states if project is None else project(encoder_hidden_states)
    if getattr(self, "method", getattr(self, "decoder_method", "default")) == "default":
        offsets, logits = _common.offsets_and_logits(module, hidden_states)
        output, weights = _common.attend_with_weights(
            value, spatial_shapes, reference_points, offsets, logits, points, scale, padding
        )
    else:
        if padding is not None:
            value = value.masked_fill(padding.unsqueeze(-1), 0.0)
        # Two products: from one, the offsets would get a gradient of zero instead of none, and
        # optimizers tell the two apart.
        offsets = self.sampling_offsets(hidden_states)
        shape = (*hidden_states.shape[:2], self.n_heads, sum(points))
        weights = self.attention_weights(hidden_states).view(shape).softmax(-1)
        output = functions.multi_scale_deformable_attention_v2(
            torch.unflatten(value, -1, (self.n_heads, -1)),
            spatial_shapes,
            _common.locations(
                reference_points, offsets.view(*shape, 2), spatial_shapes, points, scale
            ),
            weights,
            points,
            "discrete",
        )
    project = getattr(self, "output_proj", None)
    if project is not None:
        output = project(output)
    return output, weights if several else torch.unflatten(weights, -1, (len(points), -1))


def _inverted(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else ~mask.to(torch.bool)


def _forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    reference_points: Tensor | None = None,
    spatial_shapes: Tensor | None = None,
    spatial_shapes_list: list[tuple[int, int]] | None = None,
    level_start_index: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The modules whose `attention_mask` is True where the value counts."""
    return _named(
        self,
        hidden_states,
        _inverted(attention_mask),
        encoder_hidden_states,
        position_embeddings,
        reference_points,
        spatial_shapes,
        spatial_shapes_list,
    )


def _forward_oneformer(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    reference_points: Tensor | None = None,
    spatial_shapes: Tensor | None = None,
    level_start_index: Tensor | None = None,
    output_attentions: bool = False,
    spatial_shapes_list: list[tuple[int, int]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """OneFormer's module, whose `attention_mask` is True where the value is padding."""
    return _named(
        self,
        hidden_states,
        attention_mask,
        encoder_hidden_states,
        position_embeddings,
        reference_points,
        spatial_shapes,
        spatial_shapes_list,
    )


def _forward_mask2former(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    reference_points: Tensor | None = None,
    spatial_shapes_list: list[tuple[int, int]] | None = None,
    level_start_index: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mask2Former's module: as OneFormer's, without `spatial_shapes`."""
    return _named(
        self,
        hidden_states,
        attention_mask,
        encoder_hidden_states,
        position_embeddings,
        reference_points,
        None,
        spatial_shapes_list,
    )


def _forward_d_fine(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    reference_points: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    spatial_shapes: Tensor | None = None,
    spatial_shapes_list: list[tuple[int, int]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """D-FINE's and DEIMv2's module: its own order of arguments, and no position embeddings."""
    return _named(
        self,
        hidden_states,
        _inverted(attention_mask),
        encoder_hidden_states,
        None,
        reference_points,
        spatial_shapes,
        spatial_shapes_list,
    )


def _named(
    module: nn.Module,
    hidden_states: Tensor,
    padding: Tensor | None,
    encoder_hidden_states: Tensor | None,
    position_embeddings: Tensor | None,
    reference_points: Tensor | None,
    spatial_shapes: Tensor | None,
    spatial_shapes_list: list[tuple[int, int]] | None,
) -> tuple[Tensor, Tensor]:
    # The list needs no device read, and not every release passes it.
    shapes: _common.SpatialShapes | None = (
        spatial_shapes if spatial_shapes_list is None else spatial_shapes_list
    )
    if encoder_hidden_states is None or reference_points is None or shapes is None:
        raise ValueError(
            "encoder_hidden_states, reference_points and spatial_shapes: expected all of them"
        )
    if position_embeddings is not None:
        hidden_states = hidden_states + position_embeddings
    return _attention(
        module, hidden_states, encoder_hidden_states, padding, reference_points, shapes
    )


@dataclass(frozen=True)
class _Model:
    """A package below transformers.models, and what its attention module's forward becomes."""

    package: str
    forward: Callable[..., tuple[Tensor, Tensor]] = _forward


_TABLE = (
    _Model("d_fine", _forward_d_fine),
    _Model("deformable_detr"),
    _Model("deimv2", _forward_d_fine),
    _Model("deta"),
    _Model("grounding_dino"),
    _Model("lw_detr"),
    _Model("mask2former", _forward_mask2former),
    _Model("mm_grounding_dino"),
    _Model("omdet_turbo"),
    _Model("oneformer", _forward_oneformer),
    _Model("pp_doclayout_v2"),
    _Model("pp_doclayout_v3"),
    _Model("pp_doclayout_v4"),
    _Model("rf_detr"),
    _Model("rt_detr"),
    _Model("rt_detr_v2"),
)

MODELS = tuple(model.package for model in _TABLE)


def patch_transformers(*models: str) -> Patch:
    """Routes the deformable attention of transformers' models to our operator.

    Replaced are the forward of the attention modules, and the functions and the layer below them.
    A module whose forward has other arguments than the releases known here keeps its forward, and
    gets the functions.

    Args:
        models: names from `MODELS`, such as "deformable_detr"; none: all that the installed
            transformers has.

    Returns:
        A handle: `restore()`, or the end of a `with`, puts the originals back.

    Raises:
        ImportError: transformers is not installed, or lacks a model that was named.
        ValueError: a name is not in `MODELS`.
    """
    unknown = sorted(set(models) - set(MODELS))
    if unknown:
        raise ValueError(f"models: expected names from {', '.join(MODELS)}; got {unknown[0]!r}")
    importlib.import_module("transformers")
    replacements: list[Replacement] = []
    for model in _TABLE:
        if not models or model.package in models:
            module = _modeling(model.package)
            if module is not None:
                replacements += _replacements(module, model.forward)
            elif models:
                raise ImportError(f"the installed transformers has no model {model.package!r}")
    return Patch(replacements)


def _modeling(package: str) -> ModuleType | None:
    for place in ("", "deprecated."):
        parent = f"transformers.models.{place}{package}"
        try:
            found = importlib.util.find_spec(parent)
        except ModuleNotFoundError:
            found = None
        if found is not None:
            return importlib.import_module(f"{parent}.modeling_{package}")
    return None


def _replacements(
    module: ModuleType, forward: Callable[..., tuple[Tensor, Tensor]]
) -> list[Replacement]:
    own = vars(module)
    found = [
        Replacement(module, name, getattr(functions, name))
        for name in (
            "MultiScaleDeformableAttentionFunction",
            "multi_scale_deformable_attention",
            "multi_scale_deformable_attention_v2",
        )
        if name in own
    ]
    layer = own.get("MultiScaleDeformableAttention")
    if layer is not None and _same_arguments(layer.forward, MultiScaleDeformableAttention.forward):
        found.append(Replacement(layer, "forward", MultiScaleDeformableAttention.forward))
    for name, value in own.items():
        if (
            name.endswith("MultiscaleDeformableAttention")
            and isinstance(value, type)
            and value.__module__ == module.__name__
            and _same_arguments(value.forward, forward)  # type: ignore[attr-defined]
        ):
            found.append(Replacement(value, "forward", forward))
    return found


def _same_arguments(theirs: Callable[..., Any], ours: Callable[..., Any]) -> bool:
    """Whether ours takes every call that theirs takes, and has a meaning for every argument."""

    def names(function: Callable[..., Any]) -> list[str]:
        return [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]

    # transformers passes these by keyword; a release that lacks one still has the others in order.
    known = names(ours)
    given = names(theirs)
    return [name for name in known if name in given] == given


def kernel_mapping() -> dict[str, dict[str, _Layer]]:
    """Our layer for the `kernels` package, on CPUs and GPUs.

        from kernels import Mode, kernelize, use_kernel_mapping
        with use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
            kernelize(model, mode=Mode.INFERENCE, device="cpu")

    It replaces the layer alone, in one model; `patch_transformers` replaces the modules, which is
    faster, and keeps locations exact in 16-bit models.
    """
    return {"MultiScaleDeformableAttention": {"cpu": _Layer(), "cuda": _Layer(), "rocm": _Layer()}}


@dataclass(frozen=True)
class _Layer:
    """What `kernels` calls a repository: something that loads a layer."""

    layer_name: str = "MultiScaleDeformableAttention"

    def load(self) -> type[nn.Module]:
        """The layer's class."""
        return MultiScaleDeformableAttention
