# SPDX-License-Identifier: Apache-2.0
"""Both operators in terms of `grid_sample`: what exporters write in their place.

Arguments and results are those of the schemas in `_ops.py`. Sizes may be symbolic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import compute_dtype

# A coordinate off every map: the first and last pixel of a map of one reach to -2 and 2.
_OUTSIDE = 3.0


def _sides(spatial_shapes: Sequence[int], like: Tensor) -> Tensor:
    """Width and height of each level, as `like` [..., L, P, 2] can be multiplied with."""
    heights, widths = spatial_shapes[::2], spatial_shapes[1::2]
    # Filled one by one: a graph has no tensor of symbolic sizes.
    sides = [
        like.new_full((1,), side)
        for size in zip(widths, heights, strict=True)
        for side in size
    ]  # fmt: skip
    # Expanded, as runtimes are slow at repeating two numbers.
    return torch.cat(sides).view(-1, 1, 2).expand(-1, like.shape[-2], -1)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`reference.ms_deform_attn`, one `grid_sample` a level.

    Args:
        value: [B, S, M, D].
        spatial_shapes: H0, W0, H1, W1, ... in pixels.
        level_start_index: first pixel of each level along S.
        sampling_locations: [B, Q, M, L, P, 2], (x, y) as fractions.
        attention_weights: [B, Q, M, L, P].

    Returns:
        [B, Q, M * D], dtype of value.
    """
    batch, pixels, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    if torch._C._get_tracing_state():
        pixels = int(pixels)  # as the sizes: a file that is given others fails here
    compute = compute_dtype(value.dtype)
    grids = 2 * sampling_locations.to(compute) - 1
    # A point off the map, and one that is not finite, counts for nothing, as in the reference.
    near = (grids.abs() - 1) * _sides(spatial_shapes, grids) < 1
    grids = torch.where(near, grids, _OUTSIDE)
    weights = torch.where(near[..., 0] & near[..., 1], attention_weights.to(compute), 0.0)
    # Of one image and head each: maps [B * M, D, S], grids [B * M, L, P, Q, 2]. Queries last, for
    # sums over points are slow there.
    maps = value.to(compute).permute(0, 2, 3, 1).reshape(batch * heads, channels, pixels)
    grids = grids.permute(0, 2, 3, 4, 1, 5).flatten(0, 1)
    weights = weights.permute(0, 2, 3, 4, 1).flatten(0, 1).unsqueeze(1)
    sums = []
    for level, start in enumerate(level_start_index):
        height, width = spatial_shapes[2 * level : 2 * level + 2]
        samples = F.grid_sample(  # [B * M, D, P, Q]
            torch.unflatten(maps.narrow(2, start, height * width), 2, (height, width)),
            grids[:, level],
            padding_mode="zeros",
            align_corners=False,
        )
        sums.append((samples * weights[:, :, level]).sum(2))
    out = sum(sums[1:], sums[0]).view(batch, heads * channels, queries)
    return out.transpose(1, 2).to(value.dtype).contiguous()


def ms_deform_attn_from_offsets(
    sample: Callable[..., Tensor],
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    points_per_level: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    padding_mask: Tensor | None,
    offset_scale: Tensor | None,
    return_weights: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.ms_deform_attn_from_offsets` by means of `ms_deform_attn`.

    Args:
        sample: computes `ms_deform_attn`. It has as many points on each of its levels, and so is
            called once for every run of levels of which this is true.
        value: as in the reference, like all others.
        spatial_shapes: see there.
        level_start_index: see there.
        points_per_level: see there.
        reference_points: see there.
        sampling_offsets: see there.
        attention_logits: see there.
        padding_mask: see there.
        offset_scale: see there.
        return_weights: see there.

    Returns:
        As the reference.
    """
    compute = compute_dtype(value.dtype)
    weights = attention_logits.to(compute).softmax(-1)
    if padding_mask is not None:
        value = value.masked_fill(padding_mask[:, :, None, None], 0)
    sums = []
    level = point = 0
    for count, run in itertools.groupby(map(int, points_per_level)):
        levels = len(list(run))
        here = slice(level, level + levels)
        points = slice(point, point + levels * count)
        level, point = here.stop, points.stop
        shape = (levels, count)
        sizes = spatial_shapes[2 * here.start : 2 * here.stop]
        offsets = torch.unflatten(sampling_offsets[..., points, :].to(compute), 3, shape)
        # [B or 1, Q, 1, L or 1, 1, 2 or 4]
        boxes = reference_points.to(compute)[:, :, None, :, None]
        if boxes.shape[3] > 1:
            boxes = boxes[:, :, :, here]
        if boxes.shape[-1] == 2:
            steps = offsets / _sides(sizes, offsets)
        else:
            scale: float | Tensor = 0.5 / max(count, 1)
            if offset_scale is not None:
                scale = offset_scale[points].to(compute).view(*shape, 1)
            steps = offsets * (scale * boxes[..., 2:])
        sums.append(
            sample(
                value,
                sizes,
                level_start_index[here],
                boxes[..., :2] + steps,
                torch.unflatten(weights[..., points], 3, shape),
            )
        )
    result = attention_logits.new_empty((0,))
    if return_weights:
        result = weights.to(attention_logits.dtype)
    return sum(sums[1:], sums[0]), result
