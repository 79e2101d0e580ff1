# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention between two token sets."""

from __future__ import annotations

import torch
from torch import Tensor

from vitadapter_ops import MSDeformAttn

from .dense import Shapes


class DeformableAttention(MSDeformAttn):
    """Deformable cross-attention: each query samples a few points around its own position.

    Parameters and keys are those of `vitadapter_ops.MSDeformAttn` (paper sec. 3.4; Zhu et al.,
    ICLR 2021).

    Args:
        dim: token width D.
        num_heads: attention heads.
        num_levels: levels of `feat`.
        n_points: sampling points per head and level.
        ratio: width of the values relative to dim.
    """

    def __init__(
        self, dim: int, num_heads: int, num_levels: int, *, n_points: int = 4, ratio: float = 1.0
    ) -> None:
        super().__init__(dim, num_levels, num_heads, n_points, ratio)

    def forward(  # type: ignore[override]  # the signature that all adapter attentions share
        self,
        query: Tensor,
        query_shapes: Shapes,
        feat: Tensor,
        feat_shapes: Shapes,
        points: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Attends from `query` [B, Nq, D] to `feat` [B, Nk, D]; returns [B, Nq, D].

        `points` [1, Nq, 1, 2] says where the queries are in the maps of `feat`, as fractions; None:
        both cover the same area. Where `padding` [B, Nk] is True, values are zero, as they are
        outside of the maps.
        """
        if points is None:
            points = reference_points(query_shapes, query.device)
        return super().forward(query, points, feat, feat_shapes, None, padding)


def reference_points(shapes: Shapes, device: torch.device) -> Tensor:
    """Centres of all tokens, level after level, row by row.

    Args:
        shapes: (H, W) of each level.
        device: where to create them.

    Returns:
        [1, sum(H*W), 1, 2] float32: (x, y) as fractions of the image's width and height.
    """
    levels = []
    for h, w in shapes:
        y = _centres(h, device)
        x = _centres(w, device)
        grid = torch.stack((x.expand(h, w), y[:, None].expand(h, w)), dim=-1)
        levels.append(grid.view(h * w, 2))
    return torch.cat(levels)[None, :, None]


def _centres(count: int, device: torch.device) -> Tensor:
    index = torch.arange(count, dtype=torch.float32, device=device)
    # Divided by a tensor: torch.compile cannot turn a symbolic size into a scalar divisor.
    return (index + 0.5) / index.new_full((), count)
