# SPDX-License-Identifier: Apache-2.0
"""Deformable attention in a module of your own: one Linear gives offsets and logits."""

import torch
from torch import nn

from vitadapter_ops import explain_backend, ms_deform_attn_from_offsets


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.size = (heads, levels * points)
        self.value = nn.Linear(width, width)
        self.points = nn.Linear(width, heads * levels * points * 3)
        self.out = nn.Linear(width, width)

    def forward(self, query, reference, feature, shapes):
        heads, points = self.size
        offsets, logits = (
            self.points(query).unflatten(-1, (heads, points * 3)).split([2 * points, points], -1)
        )
        value = self.value(feature).unflatten(-1, (heads, -1))
        offsets = offsets.unflatten(-1, (points, 2))
        return self.out(ms_deform_attn_from_offsets(value, shapes, reference, offsets, logits))


shapes = [(32, 48), (16, 24)]  # (H, W) of each level
attention = Attention(width=64, heads=4, levels=2, points=4)
query, feature = torch.randn(2, 100, 64), torch.randn(2, sum(h * w for h, w in shapes), 64)
reference = torch.rand(2, 100, 1, 2)  # (x, y) as fractions of the map, the same on both levels
out = attention(query, reference, feature, shapes)
out.square().mean().backward()
print(tuple(out.shape))
print(explain_backend())
