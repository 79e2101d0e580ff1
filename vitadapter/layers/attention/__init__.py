# SPDX-License-Identifier: Apache-2.0
"""The attention of injectors and extractors: four layers, one forward signature.

    forward(query, query_shapes, feat, feat_shapes, points=None) -> Tensor

query is [B, Nq, D], feat [B, Nk, D]; each is the concatenation of its levels, finest first, and
`*_shapes` lists their (H, W) as Python integers. `points` [1, Nq, 1, 2] are the centres of the
query tokens as fractions of the maps of feat, None where both cover the same area; only deformable
attention looks at them. It alone also takes `padding` [B, Nk], True for tokens of feat that are
outside of their image. The result is [B, Nq, D].
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .cswin import CSwinAttention
from .deformable import DeformableAttention
from .dense import DenseAttention
from .pale import PaleAttention

ATTENTIONS: dict[str, type[nn.Module]] = {
    "deformable": DeformableAttention,
    "dense": DenseAttention,
    "cswin": CSwinAttention,
    "pale": PaleAttention,
}


def build_attention(
    name: str, dim: int, num_heads: int, num_levels: int, **options: Any
) -> nn.Module:
    """Builds an attention layer of the registry.

    Args:
        name: a key of `ATTENTIONS`.
        dim: token width D.
        num_heads: attention heads.
        num_levels: levels of `feat`.
        **options: what only this kind of attention takes.
    """
    return ATTENTIONS[name](dim, num_heads, num_levels, **options)


__all__ = [
    "ATTENTIONS",
    "CSwinAttention",
    "DeformableAttention",
    "DenseAttention",
    "PaleAttention",
    "build_attention",
]
