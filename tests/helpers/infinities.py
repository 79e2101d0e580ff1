# SPDX-License-Identifier: Apache-2.0
"""Which elements an infinite or NaN number reaches: docs/numerics.md, by loops over indices.

All points lie at quarters of a pixel on maps whose sides are powers of two, which every dtype holds
exactly: on pixel centres, at edges and corners of the map, and off it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitadapter_ops.testing import cases, gate

SHAPES = ((4, 8), (2, 4))
PIXELS = sum(height * width for height, width in SHAPES)
QUERIES, HEADS, POINTS = 10, 2, 4
# One span of vectors on the CPU and a kernel of its own on CUDA; several spans, the general one.
CHANNELS = (32, 20)


@dataclass(frozen=True)
class Poison:
    """Where a number that is not finite is put; places without the index of the one image."""

    number: float
    value: tuple = ()  # (pixel, head, channel)
    weights: tuple = ()  # (query, head, point of all levels); logits, for the fused operator
    grad: tuple = ()  # (query, head, channel) of the output
    grad_weights: tuple = ()  # as weights, of the weights that the fused operator returns

    def into(self, tensor: Tensor, places: tuple, number: float | None = None) -> Tensor:
        tensor = tensor.clone()
        for place in places:
            tensor[(0, *place)] = self.number if number is None else number
        return tensor


# Queries 0 to 9 of head 0 have the special positions. Pixel 9 is (1, 1) of the first level.
VALUE = ((9, 0, 1), (0, 0, 3), (31, 0, 2), (39, 1, 0), (20, 1, 19))
WEIGHTS = (*((q, 0, 0) for q in range(QUERIES)), (3, 1, 7), (5, 1, 2), (8, 1, 1))
GRAD = ((0, 0, 1), (3, 0, 19), (6, 0, 0), (4, 1, 2), (8, 1, 3))
KINDS = {
    "value": {"value": VALUE},
    "weights": {"weights": WEIGHTS},
    "gradient": {"grad": GRAD},
    "everything": {"value": VALUE[:2], "weights": WEIGHTS[3:5], "grad": GRAD[1:3]},
}
FUSED_KINDS = KINDS | {"gradient of weights": {"grad_weights": ((2, 0, 1), (9, 1, 0))}}
NUMBERS = (math.inf, -math.inf, math.nan)


def poisons(kinds: dict) -> dict[str, Poison]:
    return {f"{kind}-{n}": Poison(n, **places) for kind, places in kinds.items() for n in NUMBERS}


POISONS, FUSED_POISONS = poisons(KINDS), poisons(FUSED_KINDS)


def _positions(generator: torch.Generator) -> Tensor:
    """[1, Q, M, L, P, 2] in pixels."""
    size = (1, QUERIES, HEADS, len(SHAPES), POINTS, 2)
    positions = torch.randint(-6, 36, size, generator=generator).double() / 4
    for level, (height, width) in enumerate(SHAPES):
        special = [
            (1, 1),  # a pixel's centre: three corners of weight zero
            (1.25, 1),  # between two centres
            (0, 0),  # the first pixel's centre
            (width - 1, height - 1),  # the last one: its other corners are off the map
            (-0.5, 0.5),  # beside an edge
            (width - 0.75, height - 0.25),  # beside a corner
            (-1, 0),  # where the map ends
            (width, 0),
            (0.5, height),
            (20, 20),
        ]
        positions[0, :, 0, level, 0] = torch.tensor(special)
    # A row whose points all read the same pixels, or nothing.
    positions[0, 8, 1, 0] = torch.tensor((3.25, 1.5))
    positions[0, 8, 1, 1] = 20
    return positions


def _corners(x: float, y: float, height: int, width: int):
    """The pixels (row, column) on the map around a position; none if it touches none."""
    if -1 < x < width and -1 < y < height:
        for i in (math.floor(y), math.floor(y) + 1):
            for j in (math.floor(x), math.floor(x) + 1):
                if 0 <= i < height and 0 <= j < width:
                    yield i, j


@dataclass(frozen=True)
class Reached:
    """Which elements are not finite."""

    output: Tensor  # [1, Q, M, D]
    by_value: Tensor  # the gradients: by value
    by_points: Tensor  # by the location of each point [1, Q, M, L, P]
    by_weights: Tensor  # by its attention weight


def reached(
    positions: Tensor, value: Tensor, weights: Tensor, grad: Tensor, mask: Tensor | None = None
) -> Reached:
    """The definition; all arguments as in `_positions` and `Reached`, `mask` [1, S] or None."""
    bad_value, bad_weights, bad_grad = (~t.isfinite() for t in (value, weights, grad))
    out, by_value = torch.zeros_like(bad_grad), torch.zeros_like(bad_value)
    by_points, by_weights = torch.zeros_like(bad_weights), torch.zeros_like(bad_weights)
    for q, m, level, p in torch.cartesian_prod(
        *map(torch.arange, (QUERIES, HEADS, len(SHAPES), POINTS))
    ).tolist():
        (height, width), start = SHAPES[level], level * SHAPES[0][0] * SHAPES[0][1]
        x, y = positions[0, q, m, level, p].tolist()
        read = [start + i * width + j for i, j in _corners(x, y, height, width)]
        read = [s for s in read if mask is None or not mask[0, s]]
        if not read:
            continue
        at, bad, of_value = (
            (0, q, m, level, p),
            bad_weights[0, q, m, level, p],
            bad_value[0, read, m],
        )
        out[0, q, m] |= of_value.any(0) | bad
        by_value[0, read, m] |= bad_grad[0, q, m] | bad
        by_weights[at] = of_value.any() | bad_grad[0, q, m].any()
        by_points[at] = by_weights[at] | bad
    return Reached(out, by_value, by_points, by_weights)


def _judge(names, got, clean, wanted) -> None:
    for name, a, b, bad in zip(names, got, clean, wanted, strict=True):
        wrong = (~a.isfinite() != bad).nonzero().tolist()
        assert not wrong, f"{name}: finite where it should not be, or the reverse, at {wrong}"
        assert torch.equal(a[~bad], b[~bad]), f"{name}: changed where nothing reaches"


def _head_major(tensor: Tensor) -> Tensor:
    """[B, S, M, D] whose heads lie one after the other."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def check(
    poison: Poison,
    channels: int,
    dtype: torch.dtype,
    compute: Callable[[cases.Inputs, Tensor], list[Tensor]],
    head_major: bool = False,
) -> None:
    """Holds `ms_deform_attn` to the definition.

    Args:
        poison: what is not finite.
        channels: D.
        dtype: of all tensors.
        compute: from inputs and the output's gradient to what gate.NAMES lists.
        head_major: how value lies in memory.
    """
    g = torch.Generator().manual_seed(0)
    positions = _positions(g)
    sides = torch.tensor([(w, h) for h, w in SHAPES])[:, None]
    value = torch.randn(1, PIXELS, HEADS, channels, generator=g)
    weights = torch.rand(positions.shape[:-1], generator=g)
    weights[0, :, :, 0, 1] = 0  # a weight of zero hides nothing
    grad = torch.randn(1, QUERIES, HEADS, channels, generator=g)
    flat = weights.flatten(3)

    def inputs(number):
        tensors = (
            poison.into(value, poison.value, number),
            poison.into(flat, poison.weights, number).view_as(weights),
            poison.into(grad, poison.grad, number),
        )
        return [t.to(dtype) for t in tensors]

    def results(value, weights, grad):
        locations = ((positions + 0.5) / sides).to(dtype)
        value = _head_major(value) if head_major else value
        case = cases.Inputs(value, list(SHAPES), locations, weights, None)
        return compute(case, grad.flatten(2))

    poisoned = inputs(None)
    wanted = reached(positions, *poisoned)
    bad = (
        wanted.output.flatten(2),
        wanted.by_value,
        wanted.by_points[..., None].expand(*positions.shape),
        wanted.by_weights,
    )
    _judge(gate.NAMES, results(*poisoned), results(*inputs(0.5)), bad)


def check_offsets(
    poison: Poison,
    channels: int,
    dtype: torch.dtype,
    compute: Callable[[cases.OffsetInputs, list[Tensor]], list[Tensor]],
    boxes: bool = False,
    masked: bool = False,
    head_major: bool = False,
) -> None:
    """Holds `ms_deform_attn_from_offsets` to the definition; masked pixels hold NaN.

    Args:
        poison: what is not finite.
        channels: D.
        dtype: of value, offsets and logits.
        compute: from inputs and the gradients by output and weights to what gate.OFFSET_NAMES
            lists.
        boxes: whether reference points are boxes.
        masked: whether there is a padding mask.
        head_major: how value lies in memory.
    """
    g = torch.Generator().manual_seed(0)
    positions = _positions(g)
    levels, total = len(SHAPES), len(SHAPES) * POINTS
    sides = torch.tensor([(w, h) for h, w in SHAPES], dtype=torch.float64)[:, None]
    # Half of a map wide, so that an offset of 1 is a sixteenth of it.
    reference = torch.full((1, QUERIES, levels, 4 if boxes else 2), 0.5, dtype=torch.float64)
    offsets = positions - (sides / 2 - 0.5)
    if boxes:
        offsets = offsets / (sides / 16)
    value = torch.randn(1, PIXELS, HEADS, channels, generator=g)
    logits = torch.randn(1, QUERIES, HEADS, total, generator=g)
    grad = torch.randn(1, QUERIES, HEADS, channels, generator=g)
    grad_weights = torch.randn(logits.shape, generator=g)
    mask = None
    if masked:
        mask = torch.rand(1, PIXELS, generator=g) < 0.3
        mask[0, [9, 10, 17, 18, 11, 12, 19, 20]] = True  # all that some points read
        value = value.masked_fill(mask[..., None, None], math.nan)

    def inputs(number):
        tensors = (
            poison.into(value, poison.value, number),
            # A logit of -inf is a weight of 0, and finite.
            poison.into(logits, poison.weights, None if poison.number < 0 else number),
            poison.into(grad, poison.grad, number),
            poison.into(grad_weights, poison.grad_weights, number),
        )
        return [t.to(dtype) for t in tensors]

    def results(value, logits, grad, grad_weights):
        case = cases.OffsetInputs(
            _head_major(value) if head_major else value,
            list(SHAPES),
            reference.to(torch.float64 if dtype == torch.float64 else torch.float32),
            offsets.flatten(3, 4).to(dtype),
            logits,
            [POINTS] * levels,
            None,
            mask,
            None,
        )
        return compute(case, [grad.flatten(2), grad_weights])

    poisoned = inputs(None)
    read = reached(
        positions,
        poisoned[0],
        poisoned[1].softmax(-1).unflatten(3, (levels, POINTS)),
        poisoned[2],
        mask,
    )
    bad_weights = ~poisoned[1].softmax(-1).isfinite()
    by_logits = read.by_weights.flatten(3) | bad_weights | ~poisoned[3].isfinite()
    bad = (
        read.output.flatten(2),
        bad_weights,
        read.by_value,
        read.by_points.any(-1).any(2)[..., None].expand(reference.shape),
        read.by_points.flatten(3)[..., None].expand(*offsets.flatten(3, 4).shape),
        by_logits.any(-1, keepdim=True).expand(logits.shape),
    )
    _judge(gate.OFFSET_NAMES, results(*poisoned), results(*inputs(0.5)), bad)
