# SPDX-License-Identifier: Apache-2.0
"""Rows of the times stage, and what is printed of them: targets, a table, where a rival wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.table import Table

from benchmarks.common.console import LOOK, columns, wide_console
from benchmarks.gpu.predictions import BACKWARD_PARTS
from benchmarks.op import targets
from benchmarks.op.implementations import OURS, TRITON, is_rival
from benchmarks.op.traffic import BOTH, PASSES


@dataclass(frozen=True)
class Row:
    """One time; `mib`: peak of a training step on top of its inputs, of a whole implementation."""

    case: str
    dtype: str
    implementation: str
    which: str
    us: float | None
    p20_us: float | None = None
    p80_us: float | None = None
    mib: float | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        record = asdict(self)
        record["pass"] = record.pop("which")
        return record


# Of a row in a file.
FIELDS = {"pass" if each.name == "which" else each.name for each in fields(Row)}


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    return [
        Row(**{"which" if key == "pass" else key: value for key, value in row.items()})
        for row in record["rows"]
    ]


def losses(rows: Sequence[Row]) -> list[str]:
    """Where a rival is faster than the better of our kernels, the worst first."""
    ours: dict[tuple[str, str, str], float] = {}
    rivals: dict[tuple[str, str, str], tuple[float, str]] = {}
    for row in rows:
        key = (row.case, row.dtype, row.which)
        if row.us is None or row.which not in PASSES:
            continue
        if row.implementation in (OURS.name, TRITON.name):
            ours[key] = min(row.us, ours.get(key, row.us))
        elif is_rival(row.implementation):
            best = (row.us, row.implementation)
            rivals[key] = min(best, rivals.get(key, best))
    lost = sorted((rivals[key][0] / ours[key], key) for key in rivals if key in ours)
    return [
        f"{', '.join(key)}: {rivals[key][1]} {share:.2f}x our time"
        for share, key in lost
        if share < 1
    ] or ([f"nowhere ({len(lost)} comparisons)"] if lost else ["no rival was timed"])


def table_of(rows: Sequence[Row]) -> Table:
    """A line for each shape, dtype and implementation, a column for each pass."""
    names = (*PASSES, BOTH, *BACKWARD_PARTS)
    table = Table(title="Microseconds on the device, warm; peak of a training step", **LOOK)
    columns(table, "shape", "dtype", "implementation", *names, "MiB")
    lines: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.case, row.dtype, row.implementation), {})[row.which] = row
    for (case, dtype, name), found in lines.items():
        cells = [
            "-" if which not in found or found[which].us is None else f"{found[which].us:.1f}"
            for which in names
        ]
        peak = next((row.mib for row in found.values() if row.mib is not None), None)
        style = "bold green" if name == OURS.name else ""
        shown = "-" if peak is None else f"{peak:.0f}"
        table.add_row(case, dtype, name.replace(OURS.name, "ours"), *cells, shown, style=style)
    return table


def show(record: Mapping[str, Any]) -> None:
    console, rows = wide_console(), rows_of(record)
    gpu = record["machine"]["gpu"]
    if gpu is not None:
        held_to = targets.targets_of(gpu["name"])
        if held_to:
            console.print(targets.table(held_to, targets.of_times(record)))
        else:
            console.print(targets.why_none(gpu["name"]), highlight=False, markup=False)
    console.print(table_of(rows))
    lines = [f"Where a rival wins: {'; '.join(losses(rows))}"]
    lines += [
        f"{row.case}, {row.dtype}, {row.implementation}: {row.note}" for row in rows if row.note
    ]
    if record["broke"]:
        lines.append(f"Broke the device, and were left out from then on: {record['broke']}")
    if record["left_out"]:
        lines.append(f"Left out, as time was up: {'; '.join(record['left_out'])}")
    for line in lines:
        console.print(line, highlight=False, markup=False)
