# SPDX-License-Identifier: Apache-2.0
"""How pre-trained weights change their size: position grids, bias tables, patch projections."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbones.beit import CLASS_DISTANCES
from .backbones.plain_vit import resize_grid

# Entries of class and distillation tokens before the grid.
EXTRA_ENTRIES = (0, 1, 2)
# Grids whose sides differ by more are not looked for.
_LONGEST = 8
# Differences between entries below each other, against those in the best grid: untrained entries, a
# few percent more; others in rows of a wrong length, twice as much, half as much again in 6 x 8.
_WORSE = 1.3


def position_embedding(
    tokens: Tensor,
    size: int,
    prefix: int,
    *,
    grid: tuple[int, int] | None = None,
    extra: Collection[int] = EXTRA_ENTRIES,
    has_tokens: bool = False,
) -> Tensor:
    """Resizes a learned position embedding bicubically.

    The number of entries does not tell their grid: 145 are 12 x 12 and a class token, or 16 x 9 and
    one; 196 are 14 x 14, or 13 x 15 and one. A grid that is not given is taken to be square, if the
    entries are a square and as many others as `extra` says; that one and a given one only if, in no
    other grid that the entries may have, those below each other are clearly more alike.

    Args:
        tokens: [1, P + h * w, D]: P entries of class and other tokens, then the grid, row by row.
        size: entries of the result.
        prefix: entries in front of the result's square grid. The first ones of `tokens` are taken;
            zeros where it has none.
        grid: (h, w); None: a square.
        extra: values that P may have.
        has_tokens: the model that `tokens` come from has a class token, so that P = 0 is taken only
            if no grid after other entries fits as well.

    Returns:
        [1, size, D].

    Raises:
        ValueError: tokens do not hold such a grid, or the result no square one.
    """
    if tokens.dim() != 3 or tokens.shape[0] != 1:
        raise ValueError(
            f"pos_embed: expected [1, entries, {tokens.shape[-1] if tokens.dim() else 'D'}], got "
            f"shape {list(tokens.shape)}"
        )
    entries, target = tokens.shape[1], math.isqrt(size - prefix)
    if target**2 != size - prefix:
        raise ValueError(f"pos_embed: expected a square grid after {prefix} entries, got {size}")
    front, shape = _split_entries("pos_embed", entries, grid, extra)
    positions = tokens[:, front:]
    check_rows(
        "pos_embed" if grid is None else "grid",
        tokens[0],
        shape,
        front=front,
        extra=extra,
        has_tokens=has_tokens and grid is None,
        remedy="; say which it is by grid=(rows, columns)" if grid is None else " in pos_embed",
    )
    if shape != (target, target):
        positions = resize_grid(positions.float(), shape, (target, target)).to(tokens.dtype)
    head = tokens[:, : min(prefix, front)]
    zeros = tokens.new_zeros(1, prefix - head.shape[1], tokens.shape[2])
    return torch.cat((head, zeros, positions), dim=1)


def _split_entries(
    name: str,
    entries: int,
    grid: tuple[int, int] | None,
    extra: Collection[int],
    remedy: str = "; if their grid is another one, give it as grid=(rows, columns)",
) -> tuple[int, tuple[int, int]]:
    """Entries before the grid, and its sides."""
    for front in sorted(extra):
        side = math.isqrt(max(entries - front, 0))
        shape = (side, side) if grid is None else grid
        if min(shape) > 0 and front + shape[0] * shape[1] == entries:
            return front, shape
    numbers = ", ".join(map(str, sorted(extra)))
    if grid is None:
        raise ValueError(
            f"{name}: expected a square grid after {numbers} entries of class and other tokens, "
            f"got {entries} entries{remedy}"
        )
    raise ValueError(
        f"grid: expected rows x columns that give the {entries} entries of {name} with {numbers} "
        f"before them, got {grid[0]} x {grid[1]}"
    )


def check_grid(name: str, tokens: Tensor, grid: tuple[int, int], front: int) -> None:
    """Raises ValueError unless a position embedding has a given grid, or a square one.

    Args:
        name: for the message.
        tokens: [1, P + h * w, D].
        grid: (h, w).
        front: P.
    """
    entries = tokens.shape[1]
    fits = front + grid[0] * grid[1] == entries
    _, shape = _split_entries(name, entries, grid if fits else None, (front,), remedy="")
    check_rows(name, tokens[0, front:], shape)


def check_rows(
    name: str,
    tokens: Tensor,
    shape: tuple[int, int],
    *,
    front: int = 0,
    extra: Collection[int] = (0,),
    has_tokens: bool = False,
    remedy: str = "",
) -> None:
    """Raises ValueError where the entries of a grid lie in rows of another length.

    Entries of neighbouring places are alike in whatever was trained: the right grid is the one in
    which those below each other are. Random values have no such grid.

    Args:
        name: for the message.
        tokens: [P + h * w, D].
        shape: (h, w) as expected.
        front: P as expected.
        extra: values that P may have.
        has_tokens: as in `position_embedding`.
        remedy: end of the message.
    """
    values = tokens.float()

    def difference(front: int, columns: int) -> float:
        grid = values[front:]
        return (grid[columns:] - grid[:-columns]).square().mean().item()

    number = values[front:].numel()
    if number < 512 or min(shape) < 2:
        return
    worse = max(_WORSE, 1 + 12 / math.sqrt(number))  # few values differ by chance
    bounds = {
        (before, columns): difference(before, columns)
        * (1 / worse if has_tokens and before > front == 0 else worse)
        for before in sorted(extra)
        for columns in _lengths(len(values) - before)
    }
    best = min(bounds, key=bounds.__getitem__, default=None)
    if best is not None and difference(front, shape[1]) > bounds[best]:
        before, columns = best
        after = f" after {before} others" if before != front else ""
        raise ValueError(
            f"{name}: expected a grid of {shape[0]} x {shape[1]} entries, got values that look "
            f"like one of {(len(values) - before) // columns} x {columns}{after}{remedy}"
        )


def _lengths(number: int) -> list[int]:
    """Columns of the grids of so many entries."""
    return [
        columns
        for columns in range(2, number // 2 + 1)
        if number % columns == 0 and number / _LONGEST <= columns**2 <= number * _LONGEST
    ]


def patch_projection(weight: Tensor, patch_size: int) -> Tensor:
    """Resizes a patch projection [D, 3, p, p] bilinearly to another patch size."""
    size = (patch_size, patch_size)
    resized = F.interpolate(weight.float(), size=size, mode="bilinear", align_corners=False)
    return resized.to(weight.dtype)


def bias_table(table: Tensor, rows: int) -> Tensor:
    """Resizes a table of relative position biases as BEiT does.

    The given biases are taken to lie at distances that grow geometrically from the centre, such
    that they reach as far as the new table; a cubic spline through them is read at whole distances.
    Biases of the class token are copied.

    Args:
        table: [(2 n - 1)^2, heads], or 3 rows more, for the class token.
        rows: of the result.

    Returns:
        [rows, heads]; where it needs the class token's rows and `table` has none, they are 0.

    Raises:
        ValueError: one of the sizes is no table's of a square window, or the values are clearly
            those of another one.
    """
    side, extra = _table_side(table.shape[0])
    target, target_extra = _table_side(rows)
    grid, classes = table[: side**2], table[side**2 :]
    check_rows("relative_position_bias_table", grid, (side, side))
    if side != target:
        matrix = spline_matrix(
            _geometric_positions(side, target),
            torch.arange(target, dtype=torch.float64) - target // 2,
        )
        square = grid.double().view(side, side, -1)
        square = torch.einsum("yi,xj,ijh->yxh", matrix, matrix, square)
        grid = square.reshape(target**2, -1).to(table.dtype)
    if not extra:
        classes = table.new_zeros(CLASS_DISTANCES, table.shape[1])
    return torch.cat((grid, classes)) if target_extra else grid


def _table_side(rows: int) -> tuple[int, int]:
    """Side of the square and number of rows after it."""
    for extra in (0, CLASS_DISTANCES):
        side = math.isqrt(max(rows - extra, 0))
        if side % 2 == 1 and side**2 == rows - extra:
            return side, extra
    raise ValueError(
        f"relative_position_bias_table: expected (2 n - 1)^2 rows (a square window), or 3 more, "
        f"got {rows}"
    )


def _geometric_positions(side: int, target: int) -> Tensor:
    """Symmetric positions with steps q, q^2, ... after the first, which is 1.

    The ratio is searched to 1e-6 between the published bounds; the last one tried is used.
    """
    half = side // 2
    low, high = 1.01, 1.5
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**half) / (1 - ratio) > target // 2:
            high = ratio
        else:
            low = ratio
    steps = ratio ** torch.arange(half, dtype=torch.float64)
    positive = steps.cumsum(0)
    return torch.cat((-positive.flip(0), positive.new_zeros(1), positive))


def spline_matrix(positions: Tensor, points: Tensor) -> Tensor:
    """The cubic interpolating spline as a matrix: values at `points` from values at `positions`.

    Its knots are the positions without the second and the last but one (not-a-knot). Points outside
    are moved to the nearest end.

    Args:
        positions: [n], increasing, n >= 4, float64.
        points: [m], float64.

    Returns:
        [m, n], float64.
    """
    first, last = positions[:1], positions[-1:]
    knots = torch.cat((first.expand(4), positions[2:-2], last.expand(4)))
    inside = points.clamp(positions[0], positions[-1])
    values = _cubic_basis(knots, inside)
    return torch.linalg.solve(_cubic_basis(knots, positions), values, left=False)


def _cubic_basis(knots: Tensor, points: Tensor) -> Tensor:
    """Cubic B-splines at points (de Boor's recurrence): [points, knots - 4]."""
    x = points[:, None]
    # The last interval that is not empty is closed at its end.
    upper = torch.where(knots[1:] == knots[-1], knots[1:] + 1, knots[1:])
    basis = ((x >= knots[:-1]) & (x < upper) & (knots[:-1] < knots[1:])).double()
    for degree in range(1, 4):
        span = knots[degree:] - knots[:-degree]
        share = torch.where(span > 0, (x - knots[:-degree]) / span.clamp(min=1e-300), 0.0)
        basis = share[:, :-1] * basis[:, :-1] + (1 - share[:, 1:]) * basis[:, 1:] * (span[1:] > 0)
    return basis
