# SPDX-License-Identifier: Apache-2.0
"""Errors a caller can act on: which argument, what was expected, what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SpatialShapes = Sequence[tuple[int, int]] | Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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


def levels(
    spatial_shapes: SpatialShapes,
    level_start_index: Sequence[int] | Tensor | None,
    pixels: int,
) -> tuple[list[tuple[int, int]], list[int]]:
    """Checks the level table and returns it as Python integers: (H, W) and first pixel of each.

    A tensor is read back to the host: one synchronisation when it lies on a GPU.

    Raises:
        ValueError: the levels do not fill, or do not lie inside, the `pixels` of value.
    """
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(
                f"spatial_shapes: expected a tensor [L, 2], got shape {list(spatial_shapes.shape)}"
            )
        if spatial_shapes.is_floating_point():
            raise ValueError(f"spatial_shapes: expected integers, got {spatial_shapes.dtype}")
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
        if height < 1 or width < 1:
            raise ValueError(f"spatial_shapes[{level}]: expected H, W >= 1, got {pair}")
        sizes.append((height, width))

    if level_start_index is None:
        starts, total = [], 0
        for height, width in sizes:
            starts.append(total)
            total = total + height * width
        if total != pixels:
            raise ValueError(
                f"spatial_shapes: expected levels with {pixels} pixels in all "
                f"(value.shape[1]), got {total} from {sizes}"
            )
        return sizes, starts

    if isinstance(level_start_index, Tensor):
        level_start_index = level_start_index.tolist()
    starts = _integers("level_start_index", list(level_start_index))
    if len(starts) != len(sizes):
        raise ValueError(
            f"level_start_index: expected {len(sizes)} entries (from spatial_shapes), "
            f"got {len(starts)}"
        )
    for level, (start, (height, width)) in enumerate(zip(starts, sizes, strict=True)):
        if start < 0 or start + height * width > pixels:
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
