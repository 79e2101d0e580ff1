# SPDX-License-Identifier: Apache-2.0
"""The modules of RT-DETR, RT-DETRv2 and D-FINE, whose levels may differ in their points.

    from vitadapter_ops.compat.rtdetr import MSDeformableAttention          # RT-DETR and v2
    from vitadapter_ops.compat.rtdetr import DFineMSDeformableAttention     # D-FINE, DEIM

Constructor, forward and state_dict are those of the originals, the buffer `num_points_scale`
included. The originals' branch for 2-d references fails, as it makes locations of six dimensions
for a function of five; here it works.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .. import _checks
from .._names import renamed
from ..linear import project
from . import _common
from .functions import (
    deformable_attention_core_func,
    deformable_attention_core_func_v2,
    value_of_levels,
)

__all__ = [
    "DFineMSDeformableAttention",
    "MSDeformableAttention",
    "MSDeformableAttentionV1",
    "deformable_attention_core_func",
    "deformable_attention_core_func_v2",
]


class _MultiPoint(nn.Module):
    """What the modules share: everything but the projections of the value."""

    num_points_scale: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int | Sequence[int],
        method: str,
        offset_scale: float,
    ) -> None:
        super().__init__()
        _common.check_sizes(embed_dim=embed_dim, num_heads=num_heads, num_levels=num_levels)
        _common.check_heads(embed_dim, num_heads, "embed_dim")
        try:
            points = [operator.index(num_points)] * num_levels  # type: ignore[arg-type]
        except TypeError:
            points = _checks.integers("num_points", num_points, "an integer or one for each level")
        if len(points) != num_levels or min(points) < 1:
            raise ValueError(
                f"num_points: expected a positive number, or {num_levels} (num_levels), "
                f"got {points}"
            )
        _common.check_number("offset_scale", offset_scale)
        if method not in ("default", "discrete"):
            raise ValueError(f"method: expected 'default' or 'discrete', got {method!r}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points_list = points
        self.offset_scale = offset_scale
        self.method = method
        self.head_dim = embed_dim // num_heads
        self.total_points = num_heads * sum(points)
        self.register_buffer(
            "num_points_scale", torch.tensor([1 / each for each in points for _ in range(each)])
        )
        self.sampling_offsets = nn.Linear(embed_dim, self.total_points * 2)
        self.attention_weights = nn.Linear(embed_dim, self.total_points)

    def _reset_parameters(self) -> None:
        _common.init_like_deformable_detr(self, self.num_heads, self.num_points_list)
        if self.method == "discrete":
            self.sampling_offsets.requires_grad_(False)

    def _attend(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: _common.SpatialShapes,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Samples value [B, S, M * D] where it is not padding [B, S]; [B, Q, M * D]."""
        method: Callable[..., tuple[Tensor, Tensor | None]] = _common.attend
        if self.method == "discrete":
            method = partial(_common.attend_to_nearest, deformable_attention_core_func_v2)
        output, _ = method(
            self,
            query,
            value,
            spatial_shapes,
            reference_points,
            self.num_points_list,
            offset_scale=self.offset_scale,
            padding=padding,
        )
        return output


class MSDeformableAttention(_MultiPoint):
    """`MSDeformableAttention` of RT-DETRv2.

    Args:
        embed_dim: channels of queries and values, C.
        num_heads: attention heads, M; divides embed_dim.
        num_levels: feature levels, L.
        num_points: sampling points of each head on a level, one number or one for each level.
        method: "default" interpolates; "discrete" takes the nearest pixel, as
            `functions.deformable_attention_core_func_v2`, and freezes the offsets.
        offset_scale: how much of a reference box the points reach over.

    Raises:
        TypeError: a size is no integer, or offset_scale no number.
        ValueError: a size is not positive, num_heads does not divide embed_dim, or num_points or
            method is not as above.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        method: str = "default",
        offset_scale: float = 0.5,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_levels, num_points, method, offset_scale)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self._reset_parameters()

    @renamed(spatial_shapes="value_spatial_shapes")
    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        value_spatial_shapes: _common.SpatialShapes,
        value_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends from `query` to sampled points of `value`.

        Args:
            query: [B, Q, C].
            reference_points: [B, Q, L or 1, 2] or [B, Q, L or 1, 4].
            value: [B, S, C].
            value_spatial_shapes: (H, W) of each level.
            value_mask: [B, S], True where the value counts, False where it is padding: the
                opposite of Deformable DETR's. Numbers instead multiply the value, as in the
                original.

        Returns:
            [B, Q, C].

        Raises:
            TypeError: a tensor is none.
            ValueError: sizes, dtypes or devices disagree.
        """
        _common.check_tokens(self, query, value)
        projected = _common.project_value(self, value)
        padding = None
        if value_mask is not None:
            _checks.is_tensor("value_mask", value_mask)
            _checks.shape("value_mask", value_mask, value.shape[:2], "value")
            _checks.device("value_mask", value_mask, value.device, "value")
            if value_mask.is_complex():
                raise ValueError(f"value_mask: expected bool or numbers, got {value_mask.dtype}")
            if value_mask.dtype == torch.bool:
                padding = ~value_mask
            else:  # the original multiplies, whatever the mask holds
                projected = projected * value_mask.to(projected.dtype).unsqueeze(-1)
        output = self._attend(query, reference_points, projected, value_spatial_shapes, padding)
        return project(self.output_proj, output)


class MSDeformableAttentionV1(MSDeformableAttention):
    """`MSDeformableAttention` of the first RT-DETR: the same points on all levels, and no buffer.

    Args:
        embed_dim: as in MSDeformableAttention, like the others.
        num_heads: see there.
        num_levels: see there.
        num_points: see there, one number.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
    ) -> None:
        _common.check_sizes(num_points=num_points)
        super().__init__(embed_dim, num_heads, num_levels, num_points)
        self.num_points = num_points
        del self.num_points_scale


class DFineMSDeformableAttention(_MultiPoint):
    """`MSDeformableAttention` of D-FINE: as RT-DETRv2's, without projections of value and output.

    Args:
        embed_dim: as in MSDeformableAttention, like the others.
        num_heads: see there.
        num_levels: see there.
        num_points: see there.
        method: see there.
        offset_scale: see there.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        method: str = "default",
        offset_scale: float = 0.5,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_levels, num_points, method, offset_scale)
        self._reset_parameters()

    @renamed(spatial_shapes="value_spatial_shapes")
    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor | Sequence[Tensor],
        value_spatial_shapes: _common.SpatialShapes,
    ) -> Tensor:
        """Attends from `query` to sampled points of `value`.

        Args:
            query: [B, Q, C].
            reference_points: [B, Q, L or 1, 2] or [B, Q, L or 1, 4].
            value: for each level [B, M, D, H * W], or [B, S, M, D].
            value_spatial_shapes: (H, W) of each level.

        Returns:
            [B, Q, C].

        Raises:
            TypeError: a tensor is none.
            ValueError: sizes, dtypes or devices disagree.
        """
        value = value_of_levels(value)
        _checks.is_tensor("value", value)
        _checks.rank("value", value, "B, S, M, D")
        _checks.shape(
            "value",
            value,
            (*value.shape[:2], self.num_heads, self.head_dim),
            "num_heads, embed_dim",
        )
        value = value.flatten(2)
        _common.check_tokens(self, query, value)
        return self._attend(query, reference_points, value, value_spatial_shapes)
