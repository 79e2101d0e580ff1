# SPDX-License-Identifier: Apache-2.0
"""Dense multi-head attention between two token sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_ops.linear import project

Shapes = Sequence[tuple[int, int]]


class ProjectedAttention(nn.Module):
    """Query, key, value and output projections with bias: 4 D^2 + 4 D parameters.

    A subclass says in `attend` which query sees which key.

    Args:
        dim: token width D.
        num_heads: attention heads; divides dim.
        num_levels: levels of `feat`; the parameters do not depend on it.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        query: Tensor,
        query_shapes: Shapes,
        feat: Tensor,
        feat_shapes: Shapes,
        points: Tensor | None = None,
    ) -> Tensor:
        """Attends from `query` [B, Nq, D] to `feat` [B, Nk, D]; returns [B, Nq, D].

        `points` is for attentions that sample.
        """
        q = self._split_heads(project(self.q, query))
        k = self._split_heads(project(self.k, feat))
        v = self._split_heads(project(self.v, feat))
        out = self.attend(q, k, v, query_shapes, feat_shapes)
        return project(self.out, out.transpose(1, 2).reshape(query.shape))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, query_shapes: Shapes, feat_shapes: Shapes
    ) -> Tensor:
        """Maps q [B, heads, Nq, d] and k, v [B, heads, Nk, d] to [B, heads, Nq, d]."""
        raise NotImplementedError

    def _split_heads(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        return x.view(batch, tokens, self.num_heads, width // self.num_heads).transpose(1, 2)


class DenseAttention(ProjectedAttention):
    """Every query sees every key of every level ("global attention", paper table 7).

    Args:
        dim: token width D.
        num_heads: attention heads; divides dim.
        num_levels: levels of `feat`.
        naive: form softmax(q k^T / sqrt(d)) explicitly and multiply it by v, as was usual when the
            paper was written; same result, memory grows with Nq * Nk.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, *, naive: bool = False) -> None:
        super().__init__(dim, num_heads, num_levels)
        self.naive = naive

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, query_shapes: Shapes, feat_shapes: Shapes
    ) -> Tensor:
        """Softmax over all keys."""
        if not self.naive:
            return F.scaled_dot_product_attention(q, k, v)
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return weights.softmax(dim=-1) @ v
