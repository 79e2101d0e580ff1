# SPDX-License-Identifier: Apache-2.0
"""mmcv's module and functions, with mmcv (or its successor onedl-mmcv) installed or without.

from vitadapter_ops.compat.mmcv import patch_mmcv
patch_mmcv()        # every mmdet, mmseg and mmdet3d model that uses mmcv's operator

from vitadapter_ops.compat.mmcv import MultiScaleDeformableAttention    # without mmcv
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from .._names import renamed
from ..linear import project
from . import _common
from ._patch import Patch, Replacement
from .functions import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

__all__ = [
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "multi_scale_deformable_attn_pytorch",
    "patch_mmcv",
]


class MultiScaleDeformableAttention(nn.Module):
    """mmcv's `MultiScaleDeformableAttention`: constructor, forward and state_dict.

    Args:
        embed_dims: channels of queries and values, C.
        num_heads: attention heads, M; divides embed_dims.
        num_levels: feature levels, L.
        num_points: sampling points of each head on each level, P.
        im2col_step: any positive integer; kept as an attribute, nothing depends on it.
        dropout: probability of the dropout before `identity` is added.
        batch_first: queries and values are [B, N, C], not [N, B, C].
        norm_cfg: kept as an attribute, as in mmcv.
        init_cfg: kept as an attribute; mmcv's own initialisation runs on construction.
        value_proj_ratio: width of the values relative to embed_dims.

    Raises:
        TypeError: a size is no integer, or value_proj_ratio no number.
        ValueError: a size is not positive, or num_heads does not divide the widths.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        _common.check_sizes(
            embed_dims=embed_dims,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            im2col_step=im2col_step,
        )
        _common.check_heads(embed_dims, num_heads, "embed_dims")
        _common.check_number("value_proj_ratio", value_proj_ratio)
        _common.check_number("dropout", dropout)
        self.norm_cfg = norm_cfg
        self.init_cfg = init_cfg
        self.dropout = nn.Dropout(dropout)
        self.batch_first = batch_first
        self.im2col_step = im2col_step
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        points = num_heads * num_levels * num_points
        width = int(embed_dims * value_proj_ratio)
        if width < 1:
            raise ValueError(
                f"value_proj_ratio: expected a positive number, got {value_proj_ratio}"
            )
        _common.check_heads(width, num_heads, "int(embed_dims * value_proj_ratio)")
        self.sampling_offsets = nn.Linear(embed_dims, points * 2)
        self.attention_weights = nn.Linear(embed_dims, points)
        self.value_proj = nn.Linear(embed_dims, width)
        self.output_proj = nn.Linear(width, embed_dims)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation."""
        _common.init_like_deformable_detr(self, self.num_heads, [self.num_points] * self.num_levels)

    @renamed(padding_mask="key_padding_mask")
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: _common.SpatialShapes | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attends from `query` to sampled points of `value`, and adds `identity`.

        Args:
            query: [Q, B, C], or [B, Q, C] with batch_first.
            key: not used, as in mmcv.
            value: [S, B, C] or [B, S, C]; None: the queries themselves.
            identity: what is added, shaped as query; None: query.
            query_pos: added to the queries.
            key_padding_mask: [B, S] bool, True where the value is padding and reads as zero; other
                dtypes are refused, as by mmcv.
            reference_points: [B, Q, L, 2] or [B, Q, L, 4].
            spatial_shapes: [L, 2], (H, W) of each level.
            level_start_index: [L], first pixel of each level.
            kwargs: not used, as in mmcv; the deprecated `residual` means identity.

        Returns:
            dropout(attention) + identity, shaped as query.

        Raises:
            TypeError: a tensor is none.
            ValueError: sizes, dtypes or devices disagree.
        """
        if "residual" in kwargs and identity is None:
            identity = kwargs["residual"]
        _checks.is_tensor("query", query)
        if identity is None:
            identity = query
        else:
            _common.check_added("identity", identity, query)
        output = attention(
            self,
            query,
            query if value is None else value,
            query_pos,
            key_padding_mask,
            reference_points,
            spatial_shapes,
            level_start_index,
        )
        return self.dropout(output) + identity


def attention(
    module: nn.Module,
    query: Tensor,
    value: Tensor,
    query_pos: Tensor | None,
    padding: Tensor | None,
    reference_points: Any,
    spatial_shapes: Any,
    level_start_index: Tensor | None,
) -> Tensor:
    """The attention of mmcv's, detrex's and GroundingDINO's modules, before dropout and identity.

    Args:
        module: with the attributes of `MultiScaleDeformableAttention`.
        query: as in its forward, like the others.
        value: see there.
        query_pos: see there.
        padding: its key_padding_mask, which errors call padding_mask.
        reference_points: see there; None is refused.
        spatial_shapes: see there; None is refused.
        level_start_index: see there.

    Returns:
        Shaped as query.
    """
    self: Any = module
    _common.check_tokens(module, query, value, batch_first=self.batch_first)
    if query_pos is not None:
        _common.check_added("query_pos", query_pos, query)
        query = query + query_pos
    if not self.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    output, _ = _common.attend(
        module,
        query,
        _common.project_value(module, value),
        spatial_shapes,
        reference_points,
        [self.num_points] * self.num_levels,
        level_start_index=level_start_index,
        padding=padding,
    )
    output = project(self.output_proj, output)
    return output if self.batch_first else output.transpose(0, 1)


@torch.no_grad()
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: _common.SpatialShapes,
    value_level_start_index: Sequence[int] | Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """mmcv's compiled function of this name, for every device and dtype of our operator.

    Args:
        value: [B, S, M, D].
        value_spatial_shapes: [L, 2], (H, W) of each level.
        value_level_start_index: [L], first pixel of each level; None: one level after the other.
        sampling_locations: [B, Q, M, L, P, 2], (x, y) as fractions.
        attention_weights: [B, Q, M, L, P].
        im2col_step: any positive integer; not needed.

    Returns:
        [B, Q, M * D], dtype of value; without a gradient, like the compiled one's.

    Raises:
        TypeError: a tensor is none, or an argument of another kind.
        ValueError: sizes, dtypes or devices disagree, or im2col_step is not positive.
    """
    # It gives errors the names of these arguments.
    return MultiScaleDeformableAttnFunction.apply(
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    )


@torch.no_grad()
@_common.value_names
def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: _common.SpatialShapes,
    value_level_start_index: Sequence[int] | Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """mmcv's compiled function of this name: it writes the gradients into the caller's tensors.

    As mmcv's kernels do, it adds to grad_value, which callers fill with zeros, and overwrites the
    other two.

    Args:
        value: as in `ms_deform_attn_forward`, like the next four.
        value_spatial_shapes: see there.
        value_level_start_index: see there.
        sampling_locations: see there.
        attention_weights: see there.
        grad_output: [B, Q, M * D], dtype and device of value.
        grad_value: shape, dtype and device of value.
        grad_sampling_loc: those of sampling_locations.
        grad_attn_weight: those of attention_weights.
        im2col_step: any positive integer; not needed.

    Raises:
        TypeError: a tensor is none, or an argument of another kind.
        ValueError: sizes, dtypes or devices disagree, or im2col_step is not positive.
    """
    _checks.positive("im2col_step", im2col_step)
    gradients = _common.sample_backward(
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
        grad_output,
    )
    targets = (
        ("grad_value", grad_value, "value"),
        ("grad_sampling_loc", grad_sampling_loc, "sampling_locations"),
        ("grad_attn_weight", grad_attn_weight, "attention_weights"),
    )
    for (name, target, source), gradient in zip(targets, gradients, strict=True):
        _checks.is_tensor(name, target)
        _checks.dtype(name, target, (gradient.dtype,), f" (that of {source})")
        _checks.device(name, target, gradient.device, source)
        _checks.shape(name, target, gradient.shape, source)
    grad_value += gradients[0]
    grad_sampling_loc.copy_(gradients[1])
    grad_attn_weight.copy_(gradients[2])


def patch_mmcv() -> Patch:
    """Puts our operator behind `mmcv.ops.multi_scale_deform_attn`.

    Replaced are the functions, also where a loaded module has imported one by name; the forward of
    `MultiScaleDeformableAttention`, for modules that exist as well as for new ones; and the two
    functions of the compiled extension, which BEVFormer and others call themselves, imported before
    or after. A subclass with a forward of its own keeps it, and gets the functions.

    Returns:
        A handle: `restore()`, or the end of a `with`, puts the originals back.

    Raises:
        ImportError: mmcv is not installed, or without its operators.
    """
    theirs = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    replacements = [
        Replacement(
            theirs.MultiScaleDeformableAttention, "forward", MultiScaleDeformableAttention.forward
        ),
        # One module serves all who have called ext_loader.load_ext or will.
        Replacement(theirs.ext_module, "ms_deform_attn_forward", ms_deform_attn_forward),
        Replacement(theirs.ext_module, "ms_deform_attn_backward", ms_deform_attn_backward),
    ]
    ours = {
        "MultiScaleDeformableAttnFunction": MultiScaleDeformableAttnFunction,
        "multi_scale_deformable_attn_pytorch": multi_scale_deformable_attn_pytorch,
    }
    for name, function in ours.items():
        original = getattr(theirs, name)
        replacements += [
            Replacement(module, name, function)
            for module in list(sys.modules.values())
            if module is not None and getattr(module, "__dict__", {}).get(name) is original
        ]
    return Patch(replacements)
