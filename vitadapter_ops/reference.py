# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention in plain torch: the definition every backend is tested against.

It runs wherever torch runs, for any supported dtype, and is written for clarity first. Arithmetic
is done in fp32 (fp64 for fp64) whatever the storage, as in every other backend. The backward pass
is written out by hand because autograd is off inside a custom operator; a test compares it with
autograd through the forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Corner(NamedTuple):
    """One of the four pixels around each sampling point of a level; all [B, Q, M, P]."""

    row: Tensor  # row of value.reshape(B * S * M, D); any valid row where `inside` is False
    inside: Tensor  # the pixel exists and the point touches the map
    weight: Tensor  # bilinear weight, 0 where not inside
    grad_x: Tensor  # derivative of the weight by the location, in the location's unit
    grad_y: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic is done in for values stored as `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _corners(
    locations: Tensor, height: int, width: int, start: int, pixels: int
) -> Iterator[_Corner]:
    """The corners of one level's points, locations [B, Q, M, P, 2], in the order of bilinear.h."""
    batch, _, heads = locations.shape[:3]
    x = locations[..., 0] * width - 0.5
    y = locations[..., 1] * height - 0.5
    # False for every non-finite coordinate, which so contributes nothing and gets no gradient.
    touches = (x > -1) & (y > -1) & (x < width) & (y < height)
    x, y = x.masked_fill(~touches, 0), y.masked_fill(~touches, 0)
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    column, line = x0.long(), y0.long()
    b = torch.arange(batch, device=locations.device).view(-1, 1, 1, 1)
    m = torch.arange(heads, device=locations.device).view(-1, 1)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        j, i = column + dx, line + dy
        inside = touches & (j >= 0) & (j < width) & (i >= 0) & (i < height)
        pixel = start + (i * width + j).masked_fill(~inside, 0)
        wx, wy = (fx if dx else 1 - fx), (fy if dy else 1 - fy)
        yield _Corner(
            row=(b * pixels + pixel) * heads + m,
            inside=inside,
            weight=(wy * wx).masked_fill(~inside, 0),
            grad_x=(wy * (width if dx else -width)).masked_fill(~inside, 0),
            grad_y=(wx * (height if dy else -height)).masked_fill(~inside, 0),
        )


def _levels(
    spatial_shapes: Sequence[int], level_start_index: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    for level, start in enumerate(level_start_index):
        yield level, spatial_shapes[2 * level], spatial_shapes[2 * level + 1], start


def _read(rows: Tensor, corner: _Corner) -> Tensor:
    """The corner's pixels [B, Q, M, P, D]; zero outside the map, whatever is stored there."""
    pixels = rows.index_select(0, corner.row.flatten()).view(*corner.row.shape, rows.shape[1])
    return pixels.masked_fill(~corner.inside.unsqueeze(-1), 0)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The forward pass, as the operator's schema has it (see `functional.ms_deform_attn`).

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
    compute = compute_dtype(value.dtype)
    out = value.new_zeros((batch, queries, heads, channels), dtype=compute)
    if value.numel() > 0 and sampling_locations.numel() > 0:
        rows = value.reshape(-1, channels).to(compute)
        locations, weights = sampling_locations.to(compute), attention_weights.to(compute)
        for level, height, width, start in _levels(spatial_shapes, level_start_index):
            sample = out.new_zeros((batch, queries, heads, weights.shape[4], channels))
            touches = torch.zeros_like(weights[:, :, :, level], dtype=torch.bool)
            for corner in _corners(locations[:, :, :, level], height, width, start, pixels):
                sample += corner.weight.unsqueeze(-1) * _read(rows, corner)
                touches |= corner.inside
            # A point off the map contributes zero even where its weight is NaN.
            attention = weights[:, :, :, level].masked_fill(~touches, 0)
            # Point after point: the order that the fp64 kernels keep, to the last bit.
            for point in range(weights.shape[4]):
                out += attention[..., point, None] * sample[..., point, :]
    return out.to(value.dtype).view(batch, queries, heads * channels)


def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    need_value: bool,
    need_locations: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `ms_deform_attn`; one that is not needed is returned as an empty tensor.

    With w the attention weight, s_k the dot product of grad_output and corner k's pixel, and b_k
    its bilinear weight: grad_w = sum_k b_k s_k, grad_loc = w sum_k (d b_k / d loc) s_k, and each
    pixel receives w b_k grad_output.

    Args:
        grad_output: [B, Q, M * D], dtype of value.
        value: as in `ms_deform_attn`, like the next four.
        spatial_shapes: see there.
        level_start_index: see there.
        sampling_locations: see there.
        attention_weights: see there.
        need_value: compute the gradient of value.
        need_locations: compute the gradient of sampling_locations.
        need_weights: compute the gradient of attention_weights.

    Returns:
        The gradients of value, sampling_locations and attention_weights, in their dtypes.
    """
    batch, pixels, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    compute = compute_dtype(value.dtype)
    grad = grad_output.reshape(batch, queries, heads, 1, channels).to(compute)
    grad_rows = grad.new_zeros((batch * pixels * heads if need_value else 0, channels))
    grad_locations = grad.new_zeros(sampling_locations.shape if need_locations else (0,))
    grad_weights = grad.new_zeros(attention_weights.shape if need_weights else (0,))
    if value.numel() > 0 and sampling_locations.numel() > 0:
        rows = value.reshape(-1, channels).to(compute)
        locations, weights = sampling_locations.to(compute), attention_weights.to(compute)
        for level, height, width, start in _levels(spatial_shapes, level_start_index):
            attention = weights[:, :, :, level]
            for corner in _corners(locations[:, :, :, level], height, width, start, pixels):
                if need_value:
                    share = (attention * corner.weight).masked_fill(~corner.inside, 0)
                    grad_rows.index_add_(
                        0, corner.row.flatten(), (share.unsqueeze(-1) * grad).view(-1, channels)
                    )
                if need_locations or need_weights:
                    dot = (grad * _read(rows, corner)).sum(-1).masked_fill(~corner.inside, 0)
                    if need_weights:
                        grad_weights[:, :, :, level] += corner.weight * dot
                    if need_locations:
                        direction = torch.stack((corner.grad_x, corner.grad_y), -1)
                        slope = (attention * dot).masked_fill(~corner.inside, 0)
                        grad_locations[:, :, :, level] += direction * slope.unsqueeze(-1)
    grad_value = grad_rows.view(batch, pixels, heads, channels) if need_value else grad_rows.view(0)
    return (
        grad_value.to(value.dtype),
        grad_locations.to(sampling_locations.dtype),
        grad_weights.to(attention_weights.dtype),
    )
