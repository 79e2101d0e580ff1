# SPDX-License-Identifier: Apache-2.0
"""DCNv4's FlashDeformAttn, without its limits on levels, points, width, dtype or device.

    from vitadapter_ops.compat.dcnv4 import FlashDeformAttn
    # instead of: from DCNv4 import FlashDeformAttn

Locations stay as precise as the caller made them; the original rounds them to fp16, also in fp32
models. `DCNv4`, the convolution, is another operator and is not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from .._names import renamed
from ..reference import compute_dtype
from . import _common, deformable_detr

__all__ = ["FlashDeformAttn", "FlashDeformAttnFunction"]


class FlashDeformAttnFunction:
    """What DCNv4's `torch.autograd.Function` of this name offers: `apply`, differentiable."""

    @staticmethod
    @renamed(
        spatial_shapes="value_spatial_shapes",
        level_start_index="value_level_start_index",
        sampling_locations="sampling_loc_attn",
        attention_weights="sampling_loc_attn",
    )
    def apply(
        value: Tensor,
        value_spatial_shapes: _common.SpatialShapes,
        value_level_start_index: Sequence[int] | Tensor | None,
        sampling_loc_attn: Tensor,
        im2col_step: int = 64,
        K: int = 8,
    ) -> Tensor:
        """Multi-scale deformable attention with locations and logits in one tensor.

        Args:
            value: [B, S, M, D].
            value_spatial_shapes: [L, 2], (H, W) of each level.
            value_level_start_index: [L], first pixel of each level; None: one level after the
                other.
            sampling_loc_attn: [B, Q, M, L * K * 3]: L * K locations (x, y) as fractions, then the
                logits of L * K weights; their softmax is taken here.
            im2col_step: any positive integer; not needed.
            K: points of each head on each level.

        Returns:
            [B, Q, M * D], dtype of value.

        Raises:
            TypeError: a tensor is none, or an argument of another kind.
            ValueError: sizes, dtypes or devices disagree, or im2col_step or K is not positive.
        """
        _common.check_sizes(im2col_step=im2col_step, K=K)
        _checks.is_tensor("value", value)
        _checks.is_tensor("sampling_loc_attn", sampling_loc_attn)
        _checks.dtype("sampling_loc_attn", sampling_loc_attn, _checks.FLOATING)
        levels = _checks.level_count(value_spatial_shapes)
        points = levels * K
        if sampling_loc_attn.dim() != 4 or sampling_loc_attn.shape[3] != 3 * points:
            raise ValueError(
                f"sampling_loc_attn: expected [B, Q, M, {3 * points}] ({levels} levels in "
                f"spatial_shapes, K = {K} points, 3 numbers each), "
                f"got {list(sampling_loc_attn.shape)}"
            )
        coordinates, logits = torch.split(sampling_loc_attn, [2 * points, points], -1)
        weights = logits.to(compute_dtype(value.dtype)).softmax(-1)
        return _common.sample(
            value,
            value_spatial_shapes,
            torch.unflatten(coordinates, -1, (levels, K, 2)),
            torch.unflatten(weights, -1, (levels, K)),
            value_level_start_index,
        )


class FlashDeformAttn(deformable_detr.MSDeformAttn):
    """DCNv4's module: Deformable DETR's constructor (without ratio), forward and state_dict.

    Args:
        d_model: channels, C.
        n_levels: feature levels, L.
        n_heads: attention heads, M; divides d_model.
        n_points: sampling points of each head on each level, P.
    """

    def __init__(
        self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4
    ) -> None:
        super().__init__(d_model, n_levels, n_heads, n_points)
