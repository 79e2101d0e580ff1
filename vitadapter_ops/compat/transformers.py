# SPDX-License-Identifier: Apache-2.0
"""transformers: Deformable DETR, Grounding DINO, Mask2Former, RT-DETR and their relatives.

    from vitadapter_ops.compat.transformers import patch_transformers
    patch_transformers()                    # for models that exist as well as for new ones

    with patch_transformers("mask2former"): # or some of them, for a while
        outputs = model(**inputs)

Locations and softmax are computed in fp32 also under autocast and in 16-bit models, where the
original modules round a location to the nearest of 256 (bf16). The modules still return their
attention weights, and in training compute their output from them, so that gradients reach them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from .._names import renamed
from ..linear import project
from . import _common, functions
from ._patch import Patch, Replacement
from .kernels import MultiScaleDeformableAttention

__all__ = ["MODELS", "patch_transformers"]


# What the modules' forwards are known to take. The last three say nothing that the others do not.
KNOWN = {
    "hidden_states",
    "attention_mask",
    "encoder_hidden_states",
    "position_embeddings",
    "reference_points",
    "spatial_shapes",
    "spatial_shapes_list",
    "level_start_index",
    "encoder_attention_mask",
    "output_attentions",
}

Forward = Callable[..., Any]


def _forward(original: Forward, mask_is_padding: bool) -> Forward:
    """What replaces `original`, the forward of an attention module of transformers.

    All of them take a part of `KNOWN`, in an order of their own, and return output and weights.
    """
    names = _arguments(original)
    parameters = inspect.signature(original).parameters.values()
    takes_others = any(each.kind is each.VAR_KEYWORD for each in parameters)

    @functools.wraps(original)
    @renamed(query="hidden_states", value="encoder_hidden_states", padding_mask="attention_mask")
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        others = set() if takes_others else kwargs.keys() - names
        twice = kwargs.keys() & names[: len(args)]
        if len(args) > len(names) or others or twice:
            return original(self, *args, **kwargs)  # it says what is wrong
        given: dict[str, Any] = dict.fromkeys(KNOWN)
        given.update(zip(names, args, strict=False))
        given.update(kwargs)
        query, value = given["hidden_states"], given["encoder_hidden_states"]
        points, position = given["reference_points"], given["position_embeddings"]
        padding = given["attention_mask"]
        shapes = given["spatial_shapes_list"]  # needs no device read; not all releases pass it
        if shapes is None:
            shapes = given["spatial_shapes"]
        _common.check_tokens(self, query, value)
        if position is not None:
            _common.check_added("position_embeddings", position, query)
            query = query + position
        if padding is not None:
            _checks.is_tensor("attention_mask", padding)
            if padding.dim() == 3:
                padding = padding.squeeze(2)  # [B, S, 1], all that D-FINE's and DEIMv2's own take
            _checks.dtype("attention_mask", padding, (torch.bool,))
            if not mask_is_padding:
                padding = ~padding
        return _attention(self, query, value, padding, points, shapes)

    return forward


def _attention(
    module: nn.Module,
    query: Tensor,
    value: Tensor,
    padding: Tensor | None,
    reference_points: Tensor,
    spatial_shapes: _common.SpatialShapes,
) -> tuple[Tensor, Tensor | None]:
    """The output [B, Q, C], and the weights as the module returns them."""
    self: Any = module
    # RT-DETRv2 and D-FINE say for each level how many points it has, and spell it differently.
    points = getattr(self, "num_points_list", getattr(self, "n_points_list", None))
    each = [self.n_points] * self.n_levels if points is None else points
    attend: Callable[..., tuple[Tensor, Tensor | None]] = functools.partial(
        _common.attend, return_weights=True, by_level=points is None
    )
    if "discrete" in (getattr(self, "method", None), getattr(self, "decoder_method", None)):
        attend = functools.partial(
            _common.attend_to_nearest, functions.multi_scale_deformable_attention_v2
        )
    # D-FINE's modules have neither projection.
    output, weights = attend(
        module,
        query,
        _common.project_value(module, value) if hasattr(self, "value_proj") else value,
        spatial_shapes,
        reference_points,
        each,
        offset_scale=getattr(self, "offset_scale", 0.5),
        padding=padding,
    )
    if hasattr(self, "output_proj"):
        output = project(self.output_proj, output)
    return output, weights


# Packages below transformers.models, and whether an attention module's mask is True where the value
# is padding; elsewhere it is True where the value counts.
_MASK_IS_PADDING = {
    "d_fine": False,
    "deformable_detr": False,
    "deimv2": False,
    "deta": False,
    "grounding_dino": False,
    "lw_detr": False,
    "mask2former": True,
    "mm_grounding_dino": False,
    "omdet_turbo": False,
    "oneformer": True,
    "pp_doclayout_v2": False,
    "pp_doclayout_v3": False,
    "pp_doclayout_v4": False,
    "rf_detr": False,
    "rt_detr": False,
    "rt_detr_v2": False,
}

MODELS = tuple(_MASK_IS_PADDING)


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
        TypeError: a name is not a string.
        ValueError: a name is not in `MODELS`.
    """
    for model in models:
        if not isinstance(model, str):
            raise TypeError(
                f"models: expected names from {', '.join(MODELS)}; got {type(model).__name__}"
            )
    unknown = sorted(set(models) - set(MODELS))
    if unknown:
        raise ValueError(f"models: expected names from {', '.join(MODELS)}; got {unknown[0]!r}")
    importlib.import_module("transformers")
    replacements: list[Replacement] = []
    for model in models or MODELS:
        module = _modeling(model)
        if module is not None:
            replacements += _replacements(module, _MASK_IS_PADDING[model])
        elif models:
            raise ImportError(f"the installed transformers has no model {model!r}")
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


def _replacements(module: ModuleType, mask_is_padding: bool) -> list[Replacement]:
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
    ours = MultiScaleDeformableAttention.forward
    layer = own.get("MultiScaleDeformableAttention")
    if layer is not None and _arguments(layer.forward) == _arguments(ours):
        found.append(Replacement(layer, "forward", ours))
    for name, value in own.items():
        if (
            name.endswith("MultiscaleDeformableAttention")
            and isinstance(value, type)
            and value.__module__ == module.__name__
        ):
            original: Forward = value.forward  # type: ignore[attr-defined]
            if KNOWN.issuperset(_arguments(original)):
                found.append(Replacement(value, "forward", _forward(original, mask_is_padding)))
    return found


def _arguments(forward: Forward) -> list[str]:
    """The names of a method's arguments, without self and **kwargs."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
