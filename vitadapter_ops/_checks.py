# SPDX-License-Identifier: Apache-2.0
"""Errors a caller can act on: which argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

SpatialShapes = Sequence[tuple[int, int]] | Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


_PAIRS = frozenset((tuple, list, torch.Size))


def kind(
    tensors: Sequence[Tensor | None],
    spatial_shapes: SpatialShapes,
    level_start_index: Sequence[int] | Tensor | None,
    *others: Hashable,
) -> Hashable:
    """All that the checks of a call look at, for a call of the most usual form; otherwise None.

    That is sizes as plain integers, and tensors of no class of their own. What passed the checks
    once need not be checked again when it comes with the same kind.
    """
    parts = list(others)
    try:
        for pair in spatial_shapes:
            if type(pair) not in _PAIRS:
                return None
            height, width = pair
            # Not by their hash: 4.0 and True have that of an integer.
            if type(height) is not int or type(width) is not int:
                return None
            parts += (height, width)
        if level_start_index is not None:
            parts.append(None)  # where sizes end
            for start in level_start_index:
                if type(start) is not int:
                    return None
                parts.append(start)
    except (TypeError, ValueError):
        return None
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
        elif type(tensor) is Tensor:
            parts += (tensor.shape, tensor.dtype, tensor.device)
        else:
            return None
    return tuple(parts)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def is_tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def rank(name: str, tensor: Tensor, layout: str) -> None:
    """Raises ValueError unless `tensor` has one dimension for each name in `layout`."""
    expected = layout.count(",") + 1
    if tensor.dim() != expected:
        raise ValueError(
            f"{name}: expected {expected} dimensions [{layout}], got shape {list(tensor.shape)}"
        )


def dtype(name: str, tensor: Tensor, expected: Sequence[torch.dtype], why: str = "") -> None:
    """Raises ValueError unless the dtype of `tensor` is one of `expected`."""
    if tensor.dtype not in expected:
        raise ValueError(
            f"{name}: expected dtype {_names(expected)}{why}, got {_names([tensor.dtype])}"
        )


def device(name: str, tensor: Tensor, expected: torch.device, source: str) -> None:
    """Raises ValueError unless `tensor` lies on `expected`."""
    if tensor.device != expected:
        raise ValueError(f"{name}: expected device {expected} (from {source}), got {tensor.device}")


def shape(name: str, tensor: Tensor, expected: Sequence[int], source: str) -> None:
    """Raises ValueError unless `tensor` has exactly the expected shape."""
    if list(tensor.shape) != list(expected):
        raise ValueError(
            f"{name}: expected {list(expected)} (from {source}), got {list(tensor.shape)}"
        )


def _integers(name: str, values: Sequence[object]) -> list[int]:
    for value in values:
        if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
            raise ValueError(f"{name}: expected integers, got {value!r}")
    return list(values)  # type: ignore[arg-type]


def _holds(condition: bool, traced: bool) -> bool:
    """The condition; of numbers that a graph will read, true and an assertion of the graph."""
    if traced:
        torch._check(condition)  # type: ignore[no-untyped-call]
        return True
    return condition


def levels(
    spatial_shapes: SpatialShapes,
    level_start_index: Sequence[int] | Tensor | None,
    pixels: int,
) -> tuple[list[tuple[int, int]], list[int]]:
    """Checks the level table and returns it as Python integers: (H, W) and first pixel of each.

    A tensor is read back to the host: one synchronisation when it lies on a GPU. A compiled graph
    that holds the reading asserts the same when it runs, with a RuntimeError.

    Raises:
        ValueError: the levels do not fill, or do not lie inside, the `pixels` of value.
    """
    traced = False
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(
                f"spatial_shapes: expected a tensor [L, 2], got shape {list(spatial_shapes.shape)}"
            )
        if spatial_shapes.is_floating_point():
            raise ValueError(f"spatial_shapes: expected integers, got {spatial_shapes.dtype}")
        traced = torch.compiler.is_compiling()
        rows = spatial_shapes.tolist()
    else:
        rows = list(spatial_shapes)
    if not rows:
        raise ValueError("spatial_shapes: expected at least one level, got none")

    sizes: list[tuple[int, int]] = []
    for level, row in enumerate(rows):
        pair = tuple(row) if isinstance(row, Sequence) else row
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(f"spatial_shapes[{level}]: expected (H, W), got {row!r}")
        height, width = _integers(f"spatial_shapes[{level}]", pair)
        if not (_holds(height >= 1, traced) and _holds(width >= 1, traced)):
            raise ValueError(f"spatial_shapes[{level}]: expected H, W >= 1, got {pair}")
        sizes.append((height, width))

    if level_start_index is None:
        starts, total = [], 0
        for height, width in sizes:
            starts.append(total)
            total = total + height * width
        if not _holds(total == pixels, traced):
            raise ValueError(
                f"spatial_shapes: expected levels with {pixels} pixels in all "
                f"(value.shape[1]), got {total} from {sizes}"
            )
        return sizes, starts

    if isinstance(level_start_index, Tensor):
        traced = traced or torch.compiler.is_compiling()
        level_start_index = level_start_index.tolist()
    starts = _integers("level_start_index", list(level_start_index))
    if len(starts) != len(sizes):
        raise ValueError(
            f"level_start_index: expected {len(sizes)} entries (from spatial_shapes), "
            f"got {len(starts)}"
        )
    for level, (start, (height, width)) in enumerate(zip(starts, sizes, strict=True)):
        inside = _holds(start >= 0, traced) and _holds(start + height * width <= pixels, traced)
        if not inside:
            raise ValueError(
                f"level_start_index[{level}]: expected {height} x {width} pixels from it to lie "
                f"inside value.shape[1] = {pixels}, got {start}"
            )
    return sizes, starts


def ms_deform_attn(
    value: Tensor, sizes: int, sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    """Checks the tensors of `ms_deform_attn` against each other; `sizes` is the number of levels.

    Raises:
        ValueError: rank, shape, dtype or device is not as documented there.
    """
    rank("value", value, "B, S, M, D")
    rank("sampling_locations", sampling_locations, "B, Q, M, L, P, 2")
    rank("attention_weights", attention_weights, "B, Q, M, L, P")
    dtype("value", value, FLOATING)
    accepted = (value.dtype, torch.float32) if value.dtype != torch.float32 else (torch.float32,)
    dtype("sampling_locations", sampling_locations, accepted, " (that of value, or float32)")
    dtype("attention_weights", attention_weights, accepted, " (that of value, or float32)")
    device("sampling_locations", sampling_locations, value.device, "value")
    device("attention_weights", attention_weights, value.device, "value")
    batch, _, heads, channels = value.shape
    if heads < 1 or channels < 1:
        raise ValueError(f"value: expected M, D >= 1, got shape {list(value.shape)}")
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    shape(
        "sampling_locations",
        sampling_locations,
        (batch, queries, heads, sizes, points, 2),
        "value and spatial_shapes",
    )
    shape(
        "attention_weights",
        attention_weights,
        sampling_locations.shape[:5],
        "sampling_locations",
    )


def reference_points(points: Tensor, batch: int, queries: int, levels: int) -> None:
    """Checks reference points against the sizes that they are given for.

    Raises:
        ValueError: not [B or 1, Q, L or 1, 2 or 4].
    """
    rank("reference_points", points, "B or 1, Q, L or 1, 2 or 4")
    if (
        points.shape[0] not in (1, batch)
        or points.shape[1] != queries
        or points.shape[2] not in (1, levels)
        or points.shape[3] not in (2, 4)
    ):
        raise ValueError(
            f"reference_points: expected [{batch} or 1, {queries}, {levels} or 1, 2 or 4], "
            f"got {list(points.shape)}"
        )


def padding_mask(mask: object, batch: int, pixels: int, name: str = "padding_mask") -> None:
    """Checks a mask over the pixels of value.

    Raises:
        TypeError: not a tensor.
        ValueError: dtype or shape is not as documented.
    """
    is_tensor(name, mask)
    assert isinstance(mask, Tensor)
    dtype(name, mask, (torch.bool,), " (True where value is padding)")
    shape(name, mask, (batch, pixels), "B, S of value")


def points_per_level(points: Sequence[int] | None, levels: int, total: int) -> list[int]:
    """The number of points of each level, checked against the number of all points.

    Raises:
        ValueError: they do not add up to `total`, or None and the levels cannot share it equally.
    """
    if points is None:
        if total % levels:
            raise ValueError(
                f"sampling_offsets: expected a multiple of {levels} points (one share for each "
                f"level of spatial_shapes; points_per_level gives unequal ones), got {total}"
            )
        return [total // levels] * levels
    counts = _integers("points_per_level", list(points))
    if len(counts) != levels or any(count < 0 for count in counts) or sum(counts) != total:
        raise ValueError(
            f"points_per_level: expected {levels} numbers (one for each level of spatial_shapes) "
            f"that add up to {total} (sampling_offsets.shape[3]), got {counts}"
        )
    return counts


def ms_deform_attn_from_offsets(
    value: Tensor,
    levels: int,
    points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> None:
    """Checks the tensors of `ms_deform_attn_from_offsets` against each other.

    Args:
        value: as documented there.
        levels: the number of levels.
        points: reference_points.
        offsets: sampling_offsets.
        logits: attention_logits.

    Raises:
        ValueError: rank, shape, dtype or device is not as documented there.
    """
    rank("value", value, "B, S, M, D")
    rank("sampling_offsets", offsets, "B, Q, M, K, 2")
    rank("attention_logits", logits, "B, Q, M, K")
    dtype("value", value, FLOATING)
    batch, _, heads, channels = value.shape
    if heads < 1 or channels < 1:
        raise ValueError(f"value: expected M, D >= 1, got shape {list(value.shape)}")
    # fp64 beside a narrower value would be rounded.
    accepted = FLOATING if value.dtype == torch.float64 else FLOATING[1:]
    why = "" if value.dtype == torch.float64 else f" (beside a {_names([value.dtype])} value)"
    for name, tensor in (
        ("reference_points", points),
        ("sampling_offsets", offsets),
        ("attention_logits", logits),
    ):
        dtype(name, tensor, accepted, why)
        device(name, tensor, value.device, "value")
    queries, total = offsets.shape[1], offsets.shape[3]
    shape("sampling_offsets", offsets, (batch, queries, heads, total, 2), "value")
    shape("attention_logits", logits, offsets.shape[:4], "sampling_offsets")
    reference_points(points, batch, queries, levels)


def offset_scale(scale: object, points: Tensor, total: int, compute: torch.dtype) -> Tensor | None:
    """What boxes are scaled with per unit of offset, as a tensor [K] in the dtype of arithmetic.

    Raises:
        TypeError: neither a number nor a tensor.
        ValueError: given beside reference points without boxes, not finite, or not one for each
            point.
    """
    if scale is None:
        return None
    if points.shape[3] != 4:
        raise ValueError(
            "offset_scale: expected None beside reference_points of width 2 (their offsets are in "
            f"pixels), got {scale if not isinstance(scale, Tensor) else 'a tensor'}"
        )
    if isinstance(scale, Tensor):
        dtype("offset_scale", scale, FLOATING)
        device("offset_scale", scale, points.device, "value")
        shape("offset_scale", scale, (total,), "one for each point of sampling_offsets")
        return scale.detach().to(compute)
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise TypeError(
            f"offset_scale: expected a number, a torch.Tensor or None, got {type(scale).__name__}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"offset_scale: expected a finite number, got {scale}")
    # Filled on the device: a tensor made from Python numbers would be copied from the host.
    return torch.full((total,), float(scale), dtype=compute, device=points.device)
