# SPDX-License-Identifier: Apache-2.0
"""Two definitions of multi-scale deformable attention that share nothing with the package."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cases


def plain_loops(inputs: cases.Inputs) -> Tensor:
    """One Python loop per index, straight from the equation. fp64, tiny shapes only.

    Args:
        inputs: of any dtype, on the CPU.

    Returns:
        [B, Q, M * D], fp64.
    """
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

    Args:
        value: [B, S, M, D], any floating dtype.
        spatial_shapes: (H, W) of each level.
        locations: [B, Q, M, L, P, 2], (x, y) as fractions of the level.
        weights: [B, Q, M, L, P].
        level_start_index: first pixel of each level along S; None: one after the other.

    Returns:
        [B, Q, M * D], dtype of value.
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


def from_offsets(
    inputs: cases.OffsetInputs,
    value: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """The chain that models without the fused operator have: softmax, locations, grid_sample.

    In fp32 (fp64 for fp64) whatever is stored, as `grid_sample`; for any points per level.

    Args:
        inputs: for all that gets no gradient.
        value: [B, S, M, D]; this and the following take the place of the tensors in `inputs`.
        reference: [B or 1, Q, L or 1, 2 or 4], reference points or boxes.
        offsets: [B, Q, M, K, 2], of K points in all levels.
        logits: [B, Q, M, K].

    Returns:
        The output [B, Q, M * D] in the dtype of value, and the attention weights [B, Q, M, K] in
        that of logits.
    """
    dtype = value.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    value, reference = value.to(compute), reference.to(compute)
    offsets, weights = offsets.to(compute), logits.to(compute).softmax(-1)
    if inputs.padding_mask is not None:
        value = value.masked_fill(inputs.padding_mask[..., None, None], 0)
    starts = cases.first_pixels(inputs.spatial_shapes, inputs.level_start_index)
    moved = dataclasses.replace(inputs, reference_points=reference, sampling_offsets=offsets)
    batch, _, heads, channels = value.shape
    out, first = value.new_zeros(batch, offsets.shape[1], heads * channels), 0
    for level, pixels in cases.offset_positions(moved):
        height, width = inputs.spatial_shapes[level]
        points = pixels.shape[3]
        sides = torch.tensor([width, height], dtype=compute, device=pixels.device)
        if points > 0:
            out = out + grid_sample(
                value,
                [(height, width)],
                (pixels / sides)[:, :, :, None],
                weights[:, :, :, None, first : first + points],
                [starts[level]],
            )
        first += points
    return out.to(dtype), weights.to(logits.dtype)
