# SPDX-License-Identifier: Apache-2.0
"""mmcv's module and functions, with mmcv (or its successor onedl-mmcv) installed or without.

from vitadapter_ops.compat.mmcv import patch_mmcv
patch_mmcv()        # every mmdet, mmseg and mmdet3d model that uses mmcv's operator

from vitadapter_ops.compat.mmcv import MultiScaleDeformableAttention    # without mmcv
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

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
        im2col_step: kept as an attribute; nothing depends on it.
        dropout: probability of the dropout before `identity` is added.
        batch_first: queries and values are [B, N, C], not [N, B, C].
        norm_cfg: kept as an attribute, as in mmcv.
        init_cfg: kept as an attribute; mmcv's own initialisation runs on construction.
        value_proj_ratio: width of the values relative to embed_dims.

    Raises:
        ValueError: num_heads does not divide embed_dims.
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
        _common.check_heads(embed_dims, num_heads, "embed_dims")
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
        _common.check_heads(width, num_heads, "int(embed_dims * value_proj_ratio)")
        self.sampling_offsets = nn.Linear(embed_dims, points * 2)
        self.attention_weights = nn.Linear(embed_dims, points)
        self.value_proj = nn.Linear(embed_dims, width)
        self.output_proj = nn.Linear(width, embed_dims)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation."""
        _common.init_like_deformable_detr(self, self.num_heads, [self.num_points] * self.num_levels)

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
            key_padding_mask: [B, S], True where the value is padding and reads as zero.
            reference_points: [B, Q, L, 2] or [B, Q, L, 4].
            spatial_shapes: [L, 2], (H, W) of each level.
            level_start_index: [L], first pixel of each level.
            kwargs: not used, as in mmcv; the deprecated `residual` means identity.

        Returns:
            dropout(attention) + identity, shaped as query.
        """
        if "residual" in kwargs and identity is None:
            identity = kwargs["residual"]
        value = query if value is None else value
        identity = query if identity is None else identity
        output = attention(
            self,
            query if query_pos is None else query + query_pos,
            value,
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
    padding: Tensor | None,
    reference_points: Tensor | None,
    spatial_shapes: _common.SpatialShapes | None,
    level_start_index: Tensor | None,
) -> Tensor:
    """The attention of mmcv's, detrex's and GroundingDINO's modules, before dropout and identity.

    Args:
        module: with the attributes of `MultiScaleDeformableAttention`.
        query: as in its forward, like the others, with the positions already added.
        value: see there.
        padding: its key_padding_mask.
        reference_points: see there.
        spatial_shapes: see there.
        level_start_index: see there.

    Returns:
        Shaped as query.
    """
    if reference_points is None or spatial_shapes is None:
        missing = "reference_points" if reference_points is None else "spatial_shapes"
        raise ValueError(f"{missing}: expected a tensor, got None")
    self: Any = module
    if not self.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    output, _ = _common.attend(
        module,
        query,
        project(self.value_proj, value),
        spatial_shapes,
        reference_points,
        [self.num_points] * self.num_levels,
        level_start_index=level_start_index,
        padding=padding,
    )
    output = project(self.output_proj, output)
    return output if self.batch_first else output.transpose(0, 1)


def patch_mmcv() -> Patch:
    """Puts our operator behind `mmcv.ops.multi_scale_deform_attn`.

    Replaced are the functions, also where a loaded module has imported one by name, and the forward
    of `MultiScaleDeformableAttention`, for modules that exist as well as for new ones. A subclass
    with a forward of its own keeps it, and gets the functions.

    Returns:
        A handle: `restore()`, or the end of a `with`, puts the originals back.

    Raises:
        ImportError: mmcv is not installed, or without its operators.
    """
    theirs = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    replacements = [
        Replacement(
            theirs.MultiScaleDeformableAttention, "forward", MultiScaleDeformableAttention.forward
        )
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
