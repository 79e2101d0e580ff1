# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention in plain torch: the definition every backend is tested against.

It runs wherever torch runs, for any supported dtype, and is written for clarity first. Arithmetic
is done in fp32 (fp64 for fp64) whatever the storage, as in every other backend. The forward changes
nothing in place, so that torch can differentiate and transform it (torch.func, forward mode). The
backward pass is written out by hand because autograd is off inside a custom operator; a test
compares it with autograd through the forward.

Both operators come down to the same step: sampling points with a position in pixels and a weight.
`ms_deform_attn` is given them almost ready, `ms_deform_attn_from_offsets` computes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _LevelPoints(NamedTuple):
    """The sampling points of one level, in the dtype of arithmetic; tensors are [B, Q, M, P]."""

    height: int
    width: int
    start: int  # first pixel of the level along S
    x: Tensor  # in pixels; the centre of the first pixel is 0
    y: Tensor
    weight: Tensor


class _Corner(NamedTuple):
    """One of the four pixels around each sampling point of a level; all [B, Q, M, P]."""

    row: Tensor  # row of value.reshape(B * S * M, D); any valid row where `inside` is False
    exists: Tensor  # the pixel lies on the map, and the point touches the map
    inside: Tensor  # ... and is not masked
    weight: Tensor  # bilinear weight, 0 where not inside
    grad_x: Tensor  # derivative of the weight by the position in pixels
    grad_y: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic is done in for values stored as `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _corners(level: _LevelPoints, pixels: int, padding_mask: Tensor | None) -> Iterator[_Corner]:
    """The corners of one level's points, in the order of bilinear.h."""
    height, width = level.height, level.width
    batch, _, heads = level.x.shape[:3]
    x, y = level.x, level.y
    # False for every non-finite coordinate, which so contributes nothing and gets no gradient.
    touches = (x > -1) & (y > -1) & (x < width) & (y < height)
    x, y = x.masked_fill(~touches, 0), y.masked_fill(~touches, 0)
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    column, line = x0.long(), y0.long()
    b = torch.arange(batch, device=x.device).view(-1, 1, 1, 1)
    m = torch.arange(heads, device=x.device).view(-1, 1)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        j, i = column + dx, line + dy
        exists = touches & (j >= 0) & (j < width) & (i >= 0) & (i < height)
        pixel = level.start + (i * width + j).masked_fill(~exists, 0)
        inside = exists
        if padding_mask is not None:
            inside = exists & ~padding_mask[b, pixel]
        wx, wy = (fx if dx else 1 - fx), (fy if dy else 1 - fy)
        yield _Corner(
            row=(b * pixels + pixel) * heads + m,
            exists=exists,
            inside=inside,
            weight=(wy * wx).masked_fill(~inside, 0),
            grad_x=(wy if dx else -wy).masked_fill(~inside, 0),
            grad_y=(wx if dy else -wx).masked_fill(~inside, 0),
        )


def _read(rows: Tensor, corner: _Corner) -> Tensor:
    """The corner's pixels [B, Q, M, P, D]; zero outside the map, whatever is stored there."""
    pixels = rows.index_select(0, corner.row.flatten()).view(*corner.row.shape, rows.shape[1])
    return pixels.masked_fill(~corner.inside.unsqueeze(-1), 0)


def _sample(
    value: Tensor, queries: int, levels: Iterable[_LevelPoints], padding_mask: Tensor | None = None
) -> Tensor:
    """The weighted sum of all levels' samples, [B, Q, M * D] in the dtype of value."""
    batch, pixels, heads, channels = value.shape
    compute = compute_dtype(value.dtype)
    out = value.new_zeros((batch, queries, heads, channels), dtype=compute)
    if value.numel() > 0 and queries > 0:
        rows = value.reshape(-1, channels).to(compute)
        for level in levels:
            sample = out.new_zeros(())
            touches = torch.zeros_like(level.x, dtype=torch.bool)
            for corner in _corners(level, pixels, padding_mask):
                sample = sample + corner.weight.unsqueeze(-1) * _read(rows, corner)
                touches = touches | corner.exists
            # A point off the map contributes zero even where its weight is NaN.
            weight = level.weight.masked_fill(~touches, 0)
            # Point after point: the order that the fp64 kernels keep, to the last bit.
            for point in range(weight.shape[3]):
                out = out + weight[..., point, None] * sample[..., point, :]
    return out.to(value.dtype).view(batch, queries, heads * channels)


class _PointGradients(NamedTuple):
    """Gradients of one level's points, all [B, Q, M, P]; x and y by the position in pixels."""

    x: Tensor
    y: Tensor
    weight: Tensor


def _sample_backward(
    grad_output: Tensor,
    value: Tensor,
    levels: Iterable[_LevelPoints],
    padding_mask: Tensor | None,
    need_value: bool,
    need_points: bool,
) -> tuple[Tensor, list[_PointGradients]]:
    """The gradients of `_sample`: of value (empty if not needed), and of each level's points.

    With w the weight, s_k the dot product of grad_output and corner k's pixel, and b_k its bilinear
    weight: grad_w = sum_k b_k s_k, grad_x = w sum_k (d b_k / d x) s_k, and each pixel receives
    w b_k grad_output.
    """
    batch, pixels, heads, channels = value.shape
    queries = grad_output.shape[1]
    compute = compute_dtype(value.dtype)
    grad = grad_output.reshape(batch, queries, heads, 1, channels).to(compute)
    grad_rows = grad.new_zeros((batch * pixels * heads if need_value else 0, channels))
    rows = value.reshape(-1, channels).to(compute)
    points = []
    for level in levels:
        zeros = torch.zeros_like(level.weight)
        level_grads = _PointGradients(zeros, zeros.clone(), zeros.clone())
        points.append(level_grads)
        if value.numel() == 0 or level.weight.numel() == 0:
            continue
        for corner in _corners(level, pixels, padding_mask):
            if need_value:
                share = (level.weight * corner.weight).masked_fill(~corner.inside, 0)
                grad_rows.index_add_(
                    0, corner.row.flatten(), (share.unsqueeze(-1) * grad).view(-1, channels)
                )
            if need_points:
                dot = (grad * _read(rows, corner)).sum(-1).masked_fill(~corner.inside, 0)
                slope = (level.weight * dot).masked_fill(~corner.inside, 0)
                level_grads.x.add_(corner.grad_x * slope)
                level_grads.y.add_(corner.grad_y * slope)
                level_grads.weight.add_(corner.weight * dot)
    shape = (batch, pixels, heads, channels) if need_value else (0,)
    return grad_rows.view(shape).to(value.dtype), points


def _sizes(
    spatial_shapes: Sequence[int], level_start_index: Sequence[int]
) -> list[tuple[int, int, int]]:
    """(H, W, first pixel) of each level."""
    return [
        (spatial_shapes[2 * level], spatial_shapes[2 * level + 1], start)
        for level, start in enumerate(level_start_index)
    ]


def _located(
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Iterator[_LevelPoints]:
    """The points of `ms_deform_attn`, level by level."""
    compute = compute_dtype(value.dtype)
    locations, weights = sampling_locations.to(compute), attention_weights.to(compute)
    for level, (height, width, start) in enumerate(_sizes(spatial_shapes, level_start_index)):
        yield _LevelPoints(
            height,
            width,
            start,
            locations[:, :, :, level, :, 0] * width - 0.5,
            locations[:, :, :, level, :, 1] * height - 0.5,
            weights[:, :, :, level],
        )


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
    points = _located(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    return _sample(value, sampling_locations.shape[1], points)


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
    points = _located(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    grad_value, grads = _sample_backward(
        grad_output, value, points, None, need_value, need_locations or need_weights
    )
    grad_locations = sampling_locations.new_empty((0,))
    grad_weights = attention_weights.new_empty((0,))
    if need_locations:
        sides = _sizes(spatial_shapes, level_start_index)
        grad_locations = torch.stack(
            [
                torch.stack((grad.x * width, grad.y * height), -1)
                for grad, (height, width, _) in zip(grads, sides, strict=True)
            ],
            3,
        ).to(sampling_locations.dtype)
    if need_weights:
        grad_weights = torch.stack([grad.weight for grad in grads], 3).to(attention_weights.dtype)
    return grad_value, grad_locations, grad_weights


class _Offsets(NamedTuple):
    """The inputs of `ms_deform_attn_from_offsets` that place and weigh its points.

    All in the dtype of arithmetic. The operator's points of all levels lie side by side, K of them.
    """

    reference: Tensor  # [B or 1, Q, L or 1, 2 or 4]
    offsets: Tensor  # [B, Q, M, K, 2]
    weights: Tensor  # [B, Q, M, K], after the softmax
    scale: Tensor | None  # [K], of offsets in boxes
    sizes: list[tuple[int, int, int]]
    points_per_level: Sequence[int]

    def box_scale(self, level: int, points: slice) -> Tensor | float:
        """What a box's width and height are multiplied with per unit of offset, [P] or a number."""
        if self.scale is None:
            return 0.5 / max(self.points_per_level[level], 1)
        return self.scale[points]

    def slices(self) -> Iterator[tuple[int, slice]]:
        first = 0
        for level, points in enumerate(self.points_per_level):
            yield level, slice(first, first + points)
            first += points

    def box(self, level: int) -> Tensor:
        """The reference of one level, [B or 1, Q, 1, 1, 2 or 4]."""
        return self.reference[:, :, level if self.reference.shape[2] > 1 else 0, None, None]

    def levels(self) -> Iterator[_LevelPoints]:
        for level, points in self.slices():
            height, width, start = self.sizes[level]
            box, offset = self.box(level), self.offsets[..., points, :]
            offset_x, offset_y = offset[..., 0], offset[..., 1]
            x, y = box[..., 0] * width - 0.5, box[..., 1] * height - 0.5
            if box.shape[-1] == 2:
                x, y = x + offset_x, y + offset_y
            else:
                scale = self.box_scale(level, points)
                x = x + offset_x * (scale * (box[..., 2] * width))
                y = y + offset_y * (scale * (box[..., 3] * height))
            yield _LevelPoints(height, width, start, x, y, self.weights[..., points])


def _offsets(
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    points_per_level: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    offset_scale: Tensor | None,
) -> _Offsets:
    compute = compute_dtype(value.dtype)
    return _Offsets(
        reference_points.to(compute),
        sampling_offsets.to(compute),
        attention_logits.to(compute).softmax(-1),
        None if offset_scale is None else offset_scale.to(compute),
        _sizes(spatial_shapes, level_start_index),
        points_per_level,
    )


def ms_deform_attn_from_offsets(
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
    """The forward pass, as the operator's schema has it.

    See `functional.ms_deform_attn_from_offsets`; K is the number of points of all levels.

    Args:
        value: [B, S, M, D].
        spatial_shapes: H0, W0, H1, W1, ... in pixels.
        level_start_index: first pixel of each level along S.
        points_per_level: P_l of each level.
        reference_points: [B or 1, Q, L or 1, 2 or 4].
        sampling_offsets: [B, Q, M, K, 2], (x, y).
        attention_logits: [B, Q, M, K].
        padding_mask: [B, S] bool, True where value reads as zero, or None.
        offset_scale: [K], or None for 0.5 / P_l; for references of width 4.
        return_weights: whether the second result is wanted.

    Returns:
        [B, Q, M * D] in the dtype of value, and the softmax of the logits in their dtype, empty if
        it is not wanted.
    """
    points = _offsets(
        value,
        spatial_shapes,
        level_start_index,
        points_per_level,
        reference_points,
        sampling_offsets,
        attention_logits,
        offset_scale,
    )
    out = _sample(value, sampling_offsets.shape[1], points.levels(), padding_mask)
    if return_weights:
        return out, points.weights.to(attention_logits.dtype)
    return out, attention_logits.new_empty((0,))


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor, where the zero gradient of a point outside stays zero beside infinities."""
    return (grad * factor).masked_fill(grad == 0, 0)


def ms_deform_attn_from_offsets_backward(
    grad_output: Tensor,
    grad_weights: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    points_per_level: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    padding_mask: Tensor | None,
    offset_scale: Tensor | None,
    need_value: bool,
    need_reference: bool,
    need_offsets: bool,
    need_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `ms_deform_attn_from_offsets`; what is not needed is an empty tensor.

    Through the softmax, with w its result and g the gradient by it: grad_logit = w (g - sum w g).

    Args:
        grad_output: [B, Q, M * D], dtype of value.
        grad_weights: the gradient by the returned weights [B, Q, M, K], or None.
        value: as in `ms_deform_attn_from_offsets`, like the next eight.
        spatial_shapes: see there.
        level_start_index: see there.
        points_per_level: see there.
        reference_points: see there.
        sampling_offsets: see there.
        attention_logits: see there.
        padding_mask: see there.
        offset_scale: see there.
        need_value: compute the gradient of value.
        need_reference: compute the gradient of reference_points.
        need_offsets: compute the gradient of sampling_offsets.
        need_logits: compute the gradient of attention_logits.

    Returns:
        The gradients of value, reference_points, sampling_offsets and attention_logits, in their
        shapes and dtypes.
    """
    points = _offsets(
        value,
        spatial_shapes,
        level_start_index,
        points_per_level,
        reference_points,
        sampling_offsets,
        attention_logits,
        offset_scale,
    )
    need_points = need_reference or need_offsets or need_logits
    grad_value, grads = _sample_backward(
        grad_output, value, points.levels(), padding_mask, need_value, need_points
    )
    grad_reference = torch.zeros_like(points.reference) if need_reference else None
    grad_offsets = torch.zeros_like(points.offsets) if need_offsets else None
    grad_w = torch.zeros_like(points.weights)
    if grad_weights is not None:
        grad_w += grad_weights.to(grad_w.dtype)
    for (level, here), grad in zip(points.slices(), grads, strict=True):
        height, width, _ = points.sizes[level]
        box, offset = points.box(level), points.offsets[..., here, :]
        grad_w[..., here] += grad.weight
        if box.shape[-1] == 2:
            if grad_offsets is not None:
                grad_offsets[..., here, :] = torch.stack((grad.x, grad.y), -1)
            parts = [grad.x * width, grad.y * height]
        else:
            scale = points.box_scale(level, here)
            # By the location, as a fraction of the map.
            grad_x, grad_y = grad.x * width, grad.y * height
            if grad_offsets is not None:
                x = _times(grad_x, scale * box[..., 2])
                grad_offsets[..., here, :] = torch.stack(
                    (x, _times(grad_y, scale * box[..., 3])), -1
                )
            parts = [
                grad_x,
                grad_y,
                _times(grad_x, scale * offset[..., 0]),
                _times(grad_y, scale * offset[..., 1]),
            ]
        if grad_reference is not None:
            # Summed over heads and points, and over the images that share a reference.
            by_box = torch.stack(parts, -1).sum((2, 3))
            if grad_reference.shape[0] == 1:
                by_box = by_box.sum(0, keepdim=True)
            grad_reference[:, :, level if grad_reference.shape[2] > 1 else 0] += by_box
    grad_logits = None
    if need_logits:
        pulled = points.weights * grad_w
        grad_logits = pulled - points.weights * pulled.sum(-1, keepdim=True)

    def result(grad: Tensor | None, like: Tensor) -> Tensor:
        return like.new_empty((0,)) if grad is None else grad.to(like.dtype)

    return (
        grad_value,
        result(grad_reference, reference_points),
        result(grad_offsets, sampling_offsets),
        result(grad_logits, attention_logits),
    )
