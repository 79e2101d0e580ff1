# SPDX-License-Identifier: Apache-2.0
"""The last line of checks for raw operators whose kernel is Python, as csrc/arguments.h is for C++.

Torch sends a call to the kernel of one of its tensors: of a meta tensor beside others to the
operator's fake, which would hand out memory that nothing has written.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from . import _checks
from .reference import compute_dtype


def checked(schema: str, kernel: Callable[..., Any], *, fake: bool = False) -> Callable[..., Any]:
    """A kernel that is only called with arguments that agree.

    Args:
        schema: of the operator, "(Tensor value, ...) -> ...".
        kernel: of the operator.
        fake: it computes shapes alone, of sizes that may be symbolic: those are not compared.

    Raises:
        TypeError: a tensor is none.
        ValueError: a tensor is not dense, lies elsewhere than value, or has another dtype or other
            sizes; or a level does not lie inside value. Names the argument.
    """
    declared = [each.split() for each in re.split(r",\s*", schema.partition(")")[0].strip("( "))]
    names = [name for _, name in declared]
    required = {name for kind, name in declared if kind == "Tensor"}
    tensors = {name for kind, name in declared if kind.startswith("Tensor")}

    @functools.wraps(kernel)
    def check(*given: Any) -> Any:
        arguments = dict(zip(names, given, strict=False))
        value = arguments["value"]
        _checks.is_tensor("value", value)
        for name in names:
            if name in required or (name in tensors and arguments[name] is not None):
                _checks.is_tensor(name, arguments[name])
                _checks.device(name, arguments[name], value.device, "value")
        _check_dtypes(arguments)
        if not fake:
            _check_sizes(arguments)
        return kernel(*given)

    return check


def _check_dtypes(arguments: Mapping[str, Any]) -> None:
    value = arguments["value"]
    _checks.dtype("value", value, _checks.FLOATING)
    compute = compute_dtype(value.dtype)
    points = "sampling_locations" if "sampling_locations" in arguments else "sampling_offsets"
    weights = "attention_weights" if "attention_weights" in arguments else "attention_logits"
    _checks.dtype(points, arguments[points], tuple(dict.fromkeys((value.dtype, compute))))
    own = (arguments[points].dtype,)
    for name, dtypes, source in (
        (weights, own, points),
        ("grad_weights", own, weights),
        ("grad_output", (value.dtype,), "value"),
        ("reference_points", (compute,), "value"),
        ("offset_scale", (compute,), "value"),
    ):
        if arguments.get(name) is not None:
            _checks.dtype(name, arguments[name], dtypes, f" (from {source})")


def _check_sizes(arguments: Mapping[str, Any]) -> None:
    value, starts = arguments["value"], arguments["level_start_index"]
    _checks.rank("value", value, "B, S, M, D")
    sides = arguments["spatial_shapes"]
    if len(sides) != 2 * len(starts):
        raise ValueError(
            f"spatial_shapes: expected {2 * len(starts)} sides (from level_start_index), "
            f"got {len(sides)}"
        )
    sizes = list(zip(sides[::2], sides[1::2], strict=True))
    for level, size in enumerate(sizes):
        if min(size) < 1:
            raise ValueError(f"spatial_shapes[{level}]: expected H, W >= 1, got {size}")
    _checks.levels(sizes, starts, value.shape[1])
    if "sampling_locations" in arguments:
        locations, weights = arguments["sampling_locations"], arguments["attention_weights"]
        _checks.ms_deform_attn(value, len(sizes), locations, weights)
        queries = locations.shape[1]
    else:
        queries = _check_offsets(arguments, len(sizes))
    if "grad_output" in arguments:
        batch, _, heads, channels = value.shape
        shape = (batch, queries, heads * channels)
        _checks.shape("grad_output", arguments["grad_output"], shape, "the output")


def _check_offsets(arguments: Mapping[str, Any], levels: int) -> int:
    """The number of queries."""
    value, points = arguments["value"], arguments["reference_points"]
    offsets, logits = arguments["sampling_offsets"], arguments["attention_logits"]
    _checks.ms_deform_attn_from_offsets(value, levels, points, offsets, logits)
    total = offsets.shape[3]
    _checks.points_per_level(arguments["points_per_level"], levels, total)
    if arguments["padding_mask"] is not None:
        _checks.padding_mask(arguments["padding_mask"], *value.shape[:2])
    compute = compute_dtype(value.dtype)
    _checks.offset_scale(arguments["offset_scale"], points, total, compute)
    if arguments.get("grad_weights") is not None:
        _checks.shape("grad_weights", arguments["grad_weights"], logits.shape, "attention_logits")
    return int(offsets.shape[1])
