# SPDX-License-Identifier: Apache-2.0
"""Two definitions of multi-scale deformable attention that share nothing with the package."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_loops(inputs) -> Tensor:
    """One Python loop per index, straight from the equation. fp64, tiny shapes only."""
    value, locations, weights = (t.double() for t in inputs.tensors)
    batch, _, heads, channels = value.shape
    _, queries, _, _, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, channels, dtype=torch.float64)
    starts = inputs.starts
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                for level, (height, width) in enumerate(inputs.spatial_shapes):
                    for p in range(points):
                        x, y = locations[b, q, m, level, p].tolist()
                        if not (math.isfinite(x) and math.isfinite(y)):
                            continue
                        x, y = x * width - 0.5, y * height - 0.5
                        sample = torch.zeros(channels, dtype=torch.float64)
                        for i in range(height):
                            for j in range(width):
                                hat = max(0.0, 1 - abs(x - j)) * max(0.0, 1 - abs(y - i))
                                if hat > 0:
                                    pixel = starts[level] + i * width + j
                                    sample += hat * value[b, pixel, m]
                        out[b, q, m] += weights[b, q, m, level, p] * sample
    return out.flatten(2)


def grid_sample(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    level_start_index: list[int] | None = None,
) -> Tensor:
    """The way models without a kernel compute it: torch's grid_sample level by level.

    16-bit inputs are computed in fp32 and rounded once, the best that eager torch can do.
    """
    dtype = value.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    value, locations, weights = value.to(compute), locations.to(compute), weights.to(compute)
    batch, _, heads, channels = value.shape
    _, queries, _, _, points, _ = locations.shape
    out = value.new_zeros(batch * heads, channels, queries)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        if level_start_index is not None:
            start = level_start_index[level]
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1)
        maps = maps.reshape(batch * heads, channels, height, width)
        grid = locations[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1
        sampled = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        out = out + (sampled * weight).sum(-1)
        start += height * width
    return out.view(batch, heads * channels, queries).transpose(1, 2).to(dtype)
