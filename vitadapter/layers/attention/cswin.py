# SPDX-License-Identifier: Apache-2.0
"""Cross-shaped window attention between two token sets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense import ProjectedAttention, Shapes


class CSwinAttention(ProjectedAttention):
    """Half of the heads attend inside horizontal stripes, half inside vertical ones.

    The paper's table 7 names CSwin attention (Dong et al., CVPR 2022) but its authors published no
    code for it, so this is our reading. Assumed: queries come from one token set, keys and values
    from the other; the stripes cut the image, not one level: on every level of both sets there are
    as many as the coarsest level has rows (or columns), which makes a stripe 2 tokens wide at
    stride 16, 4 at stride 8 and 1 at stride 32; plain projections with bias; no LePE. With these
    the operations counted equal the published 456 G.

    Args:
        dim: token width D.
        num_heads: attention heads, an even number; divides dim.
        num_levels: levels of `feat`.

    Raises:
        ValueError: num_heads is odd or does not divide dim.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int) -> None:
        super().__init__(dim, num_heads, num_levels)
        if num_heads % 2:
            raise ValueError(
                f"num_heads: expected an even number, half for rows and half for columns, "
                f"got {num_heads}"
            )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, query_shapes: Shapes, feat_shapes: Shapes
    ) -> Tensor:
        """Softmax over the keys of the query's stripe."""
        batch = q.shape[0]
        rows, columns = group_counts(query_shapes, feat_shapes)
        horizontal, vertical = zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), strict=True)
        halves = []
        for (q_half, k_half, v_half), groups, is_vertical in (
            (horizontal, rows, False),
            (vertical, columns, True),
        ):
            out = F.scaled_dot_product_attention(
                self._group(q_half, query_shapes, groups, is_vertical),
                self._group(k_half, feat_shapes, groups, is_vertical),
                self._group(v_half, feat_shapes, groups, is_vertical),
            )
            halves.append(self._ungroup(out, batch, query_shapes, groups, is_vertical))
        return torch.cat(halves, dim=1)

    def _group(self, x: Tensor, shapes: Shapes, groups: int, is_vertical: bool) -> Tensor:
        """Maps [B, heads, N, d] to [B * groups, heads, N / groups, d]."""
        batch, heads, _, width = x.shape
        parts = torch.split(x, [h * w for h, w in shapes], dim=2)
        levels = []
        for (h, w), part in zip(shapes, parts, strict=True):
            grid, axis = self._cut(h, w, groups, is_vertical)
            part = part.reshape(batch, heads, *grid, width).movedim(axis, 1)
            levels.append(part.reshape(batch * groups, heads, h * w // groups, width))
        return torch.cat(levels, dim=2)

    def _ungroup(
        self, x: Tensor, batch: int, shapes: Shapes, groups: int, is_vertical: bool
    ) -> Tensor:
        """The inverse of `_group`."""
        _, heads, _, width = x.shape
        parts = torch.split(x, [h * w // groups for h, w in shapes], dim=2)
        levels = []
        for (h, w), part in zip(shapes, parts, strict=True):
            grid, axis = self._cut(h, w, groups, is_vertical)
            inner = [side for index, side in enumerate(grid, start=2) if index != axis]
            part = part.reshape(batch, groups, heads, *inner, width).movedim(1, axis)
            levels.append(part.reshape(batch, heads, h * w, width))
        return torch.cat(levels, dim=2)

    def _cut(
        self, h: int, w: int, groups: int, is_vertical: bool
    ) -> tuple[tuple[int, int, int], int]:
        """How a level falls into groups.

        Returns:
            The grid (h, w) with one side split in two, and the axis of [B, heads, *grid, d] that
            counts the groups.
        """
        if is_vertical:
            return (h, groups, w // groups), 3
        return (groups, h // groups, w), 2


def group_counts(query_shapes: Shapes, feat_shapes: Shapes) -> tuple[int, int]:
    """Number of groups of rows and of columns: the height and width of the coarsest level.

    Raises:
        ValueError: the coarsest level does not divide another one.
    """
    shapes = [*query_shapes, *feat_shapes]
    rows = min(h for h, _ in shapes)
    columns = min(w for _, w in shapes)
    for h, w in shapes:
        if h % rows or w % columns:
            raise ValueError(
                f"query_shapes, feat_shapes: expected multiples of the coarsest level "
                f"{(rows, columns)}, got {(h, w)}"
            )
    return rows, columns
