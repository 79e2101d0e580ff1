# SPDX-License-Identifier: Apache-2.0
"""Errors a caller can act on: which argument, what was expected, what came."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What is given as sizes: integers of Python or numpy, or tensors of no dimension.
SpatialShapes = Sequence[tuple[int, int]] | Tensor

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
# Of value; the only list of them in Python.
FLOATING = (torch.float64, torch.float32, *SIXTEEN_BITS)


_PLAIN = frozenset((tuple, list, torch.Size))


def kind(
    tensors: Sequence[Tensor | None],
    spatial_shapes: SpatialShapes,
    level_start_index: Sequence[int] | Tensor | None,
    points_per_level: Sequence[int] | None,
    backend: str,
) -> Hashable:
    """All that the checks of a call look at, for a call of the most usual form; otherwise None.

    That is sizes as lists or tuples of Python integers, and tensors of no class of their own. What
    passed the checks once need not be checked again when it comes with the same kind. But for
    layouts, which the operators check themselves. Iterates over nothing that the checks would not
    accept.
    """
    if type(spatial_shapes) not in _PLAIN or type(backend) is not str:
        return None
    parts: list[Hashable] = [backend]
    for pair in spatial_shapes:
        if type(pair) not in _PLAIN or len(pair) != 2:
            return None
        height, width = pair
        # Not by their hash: 4.0 and True have that of an integer.
        if type(height) is not int or type(width) is not int:
            return None
        parts += (height, width)
    for integers in (level_start_index, points_per_level):
        parts.append(None)  # where sizes end
        if integers is None:
            continue
        if type(integers) not in _PLAIN:
            return None
        for integer in integers:
            if type(integer) is not int:
                return None
            parts.append(integer)
    try:
        for tensor in tensors:
            if tensor is None:
                parts.append(None)
            elif type(tensor) is Tensor:
                parts += (tensor.shape, tensor.dtype, tensor.device)
            else:
                return None
    except RuntimeError:  # nested tensors have no shape
        return None
    return tuple(parts)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _described(value: object) -> str:
    return "None" if value is None else type(value).__name__


def is_tensor(name: str, value: object, described: Callable[[object], str] = _described) -> None:
    """Raises TypeError unless `value` is a tensor, ValueError unless it is a dense one.

    Args:
        name: for the message.
        value: anything.
        described: what the message says of a value that is none.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {described(value)}")
    if torch.compiler.is_compiling():
        return  # Dynamo does not let the backward of an autograd.Function ask for a layout
    dense(name, value)


def dense(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the elements of `tensor` lie in memory one beside the other."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{name}: expected a dense tensor, got one of layout {layout}")


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


def _sequence(name: str, value: Any, expected: str) -> list[Any]:
    """The entries of a sequence, of an array of numpy or of a tensor.

    Raises:
        TypeError: it is something else. What can be iterated over only once, or has no order, is
            refused: it may not mean the same at the next call.
        ValueError: a tensor or array that holds no integers, or none that can be read.
    """
    if isinstance(value, Tensor | np.ndarray) and value.ndim > 0:
        if isinstance(value, Tensor):
            is_tensor(name, value)
            if value.device.type == "meta":
                raise ValueError(f"{name}: expected a tensor whose numbers can be read, got meta")
            integers = not (value.is_floating_point() or value.is_complex())
            integers = integers and value.dtype != torch.bool
        else:
            integers = value.dtype.kind in "iu"
        if not integers:
            raise ValueError(f"{name}: expected integers, got {value.dtype}")
        entries: list[Any] = value.tolist()
        return entries
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | memoryview):
        got = _described(value)
        if isinstance(value, Tensor | np.ndarray):
            got += " without a dimension"
        raise TypeError(f"{name}: expected {expected}, got {got}")
    return list(value)


def _integer(name: str, value: Any) -> int:
    """A Python integer; one that a graph computes stays what it is.

    Raises:
        ValueError: not an integer.
    """
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor):
        # What tracing takes from a shape is a tensor.
        if value.ndim == 0 and value.dtype in _INTEGERS and value.device.type != "meta":
            return int(value.item())
    elif not isinstance(value, bool | np.bool_):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(f"{name}: expected integers, got {value!r}")


_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))


def integers(name: str, values: Any, expected: str = "a sequence of integers") -> list[int]:
    """Integers from a sequence, an array of numpy or a tensor [N].

    Raises:
        TypeError: none of these.
        ValueError: an entry is no integer.
    """
    return [_integer(name, value) for value in _sequence(name, values, expected)]


def positive(name: str, number: Any) -> int:
    """A Python integer of at least 1, from one of numpy or a tensor of one entry too.

    One that a graph computes stays what it is.

    Raises:
        TypeError: not an integer.
        ValueError: below 1.
    """
    if isinstance(number, bool) or not isinstance(number, int | torch.SymInt):
        try:
            if isinstance(number, bool) or getattr(number, "dtype", None) == torch.bool:
                raise TypeError
            number = operator.index(number)
        except TypeError:
            raise TypeError(f"{name}: expected an integer, got {number!r}") from None
    if number < 1:
        raise ValueError(f"{name}: expected a positive number, got {number}")
    return number


def pairs(spatial_shapes: Any, name: str = "spatial_shapes") -> list[tuple[int, int]]:
    """(H, W) of each level as Python integers.

    Args:
        spatial_shapes: a sequence of pairs, or a tensor or array of numpy [L, 2]. A tensor is read
            back to the host: one synchronisation when it lies on a GPU. A pair may be a sequence,
            tensor or array, a side also a tensor without a dimension or an integer of numpy.
        name: of the argument, for errors.

    Raises:
        TypeError: something else.
        ValueError: not pairs, or not of integers.
    """
    if isinstance(spatial_shapes, Tensor):
        is_tensor(name, spatial_shapes)
    table = isinstance(spatial_shapes, Tensor | np.ndarray) and spatial_shapes.ndim > 0
    if table and (spatial_shapes.ndim != 2 or spatial_shapes.shape[1] != 2):
        raise ValueError(
            f"{name}: expected a tensor [L, 2], got shape {list(spatial_shapes.shape)}"
        )
    sizes = []
    for level, row in enumerate(
        _sequence(name, spatial_shapes, "(H, W) of each level, or a tensor [L, 2]")
    ):
        here = f"{name}[{level}]"
        whole = isinstance(row, Sequence | Tensor | np.ndarray) and not isinstance(row, str)
        if not whole or (isinstance(row, Tensor | np.ndarray) and row.ndim != 1) or len(row) != 2:
            raise ValueError(f"{here}: expected (H, W), got {row!r}")
        height, width = integers(here, row)
        sizes.append((height, width))
    return sizes


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, tuple | list) and any(map(_holds_tensor, value))
    )


def _holds(condition: bool, traced: bool) -> bool:
    """The condition; of numbers that a graph will read, true and an assertion of the graph."""
    if traced:
        torch._check(condition)  # type: ignore[no-untyped-call]
        return True
    return condition


def level_count(spatial_shapes: Any, expected: int | None = None, source: str = "") -> int:
    """The number of levels, without reading a tensor back.

    Args:
        spatial_shapes: a table of levels.
        expected: how many there are to be; None: any.
        source: where that comes from.

    Raises:
        TypeError: no table of levels.
        ValueError: not as many as expected.
    """
    try:
        got = len(spatial_shapes)
    except TypeError:
        got = len(pairs(spatial_shapes))  # it says what it should be
    if expected is not None and got != expected:
        raise ValueError(f"spatial_shapes: expected {expected} levels ({source}), got {got}")
    return got


def levels(
    spatial_shapes: SpatialShapes,
    level_start_index: Sequence[int] | Tensor | None,
    pixels: int,
    names: tuple[str, str] = ("spatial_shapes", "level_start_index"),
) -> tuple[list[tuple[int, int]], list[int]]:
    """Checks the level table and returns it as Python integers: (H, W) and first pixel of each.

    A tensor is read back to the host: one synchronisation when it lies on a GPU. A compiled graph
    that holds the reading asserts the same when it runs, with a RuntimeError.

    Args:
        spatial_shapes: as `pairs` takes it.
        level_start_index: L integers as `integers` takes them; None: one level after the other.
        pixels: of value.
        names: of the first two, for errors.

    Raises:
        TypeError: one of them is no sequence and no tensor.
        ValueError: the levels do not fill, or do not lie inside, the `pixels` of value.
    """
    shapes_name, starts_name = names
    compiling = torch.compiler.is_compiling()
    traced = compiling and _holds_tensor(spatial_shapes)
    sizes = pairs(spatial_shapes, shapes_name)
    if not sizes:
        raise ValueError(f"{shapes_name}: expected at least one level, got none")
    # A graph can not have one form for levels with pixels and another for those without.
    least = 1 if traced else 0
    for level, (height, width) in enumerate(sizes):
        if not (_holds(height >= least, traced) and _holds(width >= least, traced)):
            raise ValueError(
                f"{shapes_name}[{level}]: expected H, W >= {least}, got {(height, width)}"
            )

    if level_start_index is None:
        starts, total = [], 0
        for height, width in sizes:
            starts.append(total)
            total = total + height * width
        if not _holds(total == pixels, traced):
            raise ValueError(
                f"{shapes_name}: expected levels with {pixels} pixels in all "
                f"(S of value), got {total} from {sizes}"
            )
        return sizes, starts

    traced = traced or (compiling and _holds_tensor(level_start_index))
    starts = integers(starts_name, level_start_index)
    if len(starts) != len(sizes):
        raise ValueError(
            f"{starts_name}: expected {len(sizes)} entries (from {shapes_name}), got {len(starts)}"
        )
    for level, (start, (height, width)) in enumerate(zip(starts, sizes, strict=True)):
        inside = _holds(start >= 0, traced) and _holds(start + height * width <= pixels, traced)
        if not inside:
            raise ValueError(
                f"{starts_name}[{level}]: expected {height} x {width} pixels (from {shapes_name}) "
                f"from it to lie inside the {pixels} of value, got {start}"
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
    counts = integers("points_per_level", points, f"{levels} integers or None")
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
        is_tensor("offset_scale", scale)
        dtype("offset_scale", scale, FLOATING)
        device("offset_scale", scale, points.device, "value")
        shape("offset_scale", scale, (total,), "one for each point of sampling_offsets")
        return scale.to(compute)
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
        raise TypeError(
            f"offset_scale: expected a number, a torch.Tensor or None, got {type(scale).__name__}"
        )
    try:
        number = float(scale)
    except OverflowError:
        number = math.inf
    if not abs(number) <= torch.finfo(compute).max:
        got = str(number) if isinstance(scale, float) else "one too large for it"
        raise ValueError(
            f"offset_scale: expected a finite number in {_names([compute])}, got {got}"
        )
    # Filled on the device: a tensor made from Python numbers would be copied from the host.
    return torch.full((total,), number, dtype=compute, device=points.device)
