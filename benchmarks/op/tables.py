# SPDX-License-Identifier: Apache-2.0
"""What a run prints: a table for each case, distances from the machine's limits, the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.common.console import LOOK, columns, span, times
from benchmarks.common.graphs import CALL, COLD
from benchmarks.op.bandwidth import Machine
from benchmarks.op.results import Result, Settings, gpu_shares, label
from benchmarks.op.targets import table as targets_table
from benchmarks.op.targets import targets_of, why_none
from benchmarks.op.traffic import limit
from vitadapter_ops.testing import cases


def losses(results: Sequence[Result]) -> list[str]:
    """Where a rival is faster, one line each, the worst first; or that there is no such case."""
    compared = [each for each in results if not each.ours and each.ratio is not None]
    if not compared:
        return ["no rival was timed"]
    lost = sorted((each for each in compared if each.ratio < 1), key=lambda each: each.ratio)
    if not lost:
        return [f"nowhere in this run ({len(compared)} comparisons)"]
    return [f"{each.label}: {each.implementation.name} {times(each.ratio)}" for each in lost]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _microseconds(seconds: float | None) -> str:
    return _number(None if seconds is None else 1e6 * seconds)


def title_of(case: cases.Case) -> str:
    return (
        f"{label(case)}: B {case.batch}, Q {case.queries}, M {case.heads}, D {case.channels}, "
        f"L {len(case.shapes)}, P {case.points}"
    )


def case_table(results: Sequence[Result]) -> Table:
    """All results of one case."""
    table = Table(title=f"{title_of(results[0].case)}; median (p20-p80)", **LOOK)
    columns(
        table,
        "implementation",
        "dtype",
        "pass",
        "[ms]",
        "ratio\nto ours",
        "gathered (1)\n[GB/s]",
        "least (2)\n[GB/s]",
        "peak (3)\n[MiB]",
    )
    for each in results:
        table.add_row(
            each.implementation.name,
            each.dtype,
            each.which,
            "-" if each.timing is None else span(each.timing.as_json(), "ms"),
            times(each.ratio),
            _number(each.gb_per_s(each.traffic.gathered)),
            _number(each.gb_per_s(each.traffic.least)),
            _number(each.peak_mib),
            style="bold green" if each.ours else "",
        )
    return table


def gpu_case_table(results: Sequence[Result]) -> Table:
    """All results of one case on a GPU."""
    table = Table(title=f"{title_of(results[0].case)}; microseconds, medians (p20-p80)", **LOOK)
    columns(
        table,
        "implementation",
        "dtype",
        "pass",
        "device, warm",
        "to\nours",
        "device,\ncold",
        "to\nours",
        "call",
        "to\nours",
        "[MiB]\n(3)",
    )
    for each in results:
        table.add_row(
            each.implementation.name,
            each.dtype,
            each.which,
            "-" if each.timing is None else span(each.timing.as_json(), "us"),
            times(each.ratio),
            _microseconds(each.seconds(COLD)),
            times(each.ratios.get(COLD)),
            _microseconds(each.seconds(CALL)),
            times(each.ratios.get(CALL)),
            _number(each.peak_mib),
            style="bold green" if each.ours else "",
        )
    return table


def remarks(results: Sequence[Result]) -> list[str]:
    """What did not run, and who disagrees, once for each implementation and dtype."""
    lines = {}
    for each in results:
        detail = "" if each.peak is None else each.peak.detail
        for text in (each.status if each.status != "ok" else "", each.note, detail):
            if text:
                lines[f"{each.implementation.name}, {each.dtype}: {text}"] = None
    return list(lines)


def limits_table(machine: Machine, results: Sequence[Result]) -> Table:
    """How far our operator is from what the machine can do."""
    table = Table(title="Distance from the machine's limits", **LOOK)
    columns(
        table,
        "dtype, pass",
        "loads\n[G/s]",
        "gathered (1)\n[GB/s]",
        "plane (4)\n[KiB]",
        "read (5)\n[KiB]",
        f"of\n{machine.levels[0].name}",
        "served by (6)\nand share",
        "of\nmemory",
        "bound by",
    )
    shown = ""
    for each in results:
        if not each.ours or each.timing is None:
            continue
        if label(each.case) != shown:
            shown = label(each.case)
            table.add_row(f"[italic]{shown}[/]")
        moved = each.traffic
        seconds = each.timing.median
        found = limit(machine, moved, each.planes, seconds)
        table.add_row(
            f"{each.dtype}, {each.which}",
            _number(moved.loads(machine.vector_bytes) / seconds / 1e9, 2),
            _number(moved.gathered / seconds / 1e9),
            f"{each.planes[0] / 1024:.0f} {found.packed}",
            f"{each.planes[1] / 1024:.0f} {found.read}",
            f"{found.of_nearest:.0%}",
            f"{found.served_by} {found.share:.0%}",
            f"{found.of_memory:.0%}",
            found.bound,
        )
    return table


def gpu_limits_table(machine: Machine, results: Sequence[Result]) -> Table:
    """How far our operator is from what the GPU can do."""
    table = Table(title="Share of the measured bandwidths", **LOOK)
    names = ("shapes", "dtype", "pass", "gathered (1), warm\nof L2", "least (2), cold\nof memory")
    columns(table, *names)
    for each in results:
        if each.ours and each.timing is not None:
            shares = gpu_shares(machine, each).values()
            shown = ("-" if share is None else f"{share:.0%}" for share in shares)
            table.add_row(label(each.case), each.dtype, each.which, *shown)
    return table


NOTES = (
    "(1) Pixels that an ideal run gathers, for each sampling point those of its four corners that "
    "are on the map; the backward pass also reads and writes their gradients. Per second.",
    "(2) All arguments read once, of value only what is gathered, and all results written once.",
    "(3) Peak of one step on top of its inputs, on a CPU in a process of its own; for backward, of "
    "forward and backward.",
)
GPU_NOTES = (
    "Device: many calls in one CUDA graph, the gaps between its kernels included. Warm: the same "
    "inputs again and again. Cold: copies of them in turn, twice L2 between two uses. Call: eager "
    "calls by the wall clock, host and device.",
)
LIMIT_NOTES = (
    "(4) One head of one image, packed, and the nearest level that holds it. Loads are of the "
    "widest vectors.",
    "(5) The same as the CPU kernels read it: a copy, or, where pixels are more than points, with "
    "pixels M * D apart as they are stored, which share fewer places in a cache.",
    "(6) The level of (5), or a nearer one where more was measured than that level delivers: "
    "neighbouring queries share pixels.",
)


def show_bandwidths(console: Console, machine: Machine, settings: Settings) -> None:
    levels = ", ".join(
        f"{level.name} {level.gb_per_s:.0f} GB/s"
        + ("" if level.bytes is None else f" ({level.bytes // 1024} KiB)")
        for level in machine.levels
    )
    threads = settings.threads
    loads = f"Loads with {threads} thread{'s' * (threads != 1)}"
    what = "Copies" if settings.on_gpu else loads
    console.print(f"{what}, measured: {levels}.", highlight=False)


def show_case(console: Console, settings: Settings, results: Sequence[Result]) -> None:
    console.print(gpu_case_table(results) if settings.on_gpu else case_table(results))
    if len(settings.implementations) > 1:
        lost = "; ".join(losses(results))
        console.print(f"  Where a rival wins: {lost}", highlight=False, markup=False)
    for line in remarks(results):
        console.print(f"  {line}", highlight=False, markup=False)
    console.print()


def show_limits(
    console: Console, settings: Settings, machine: Machine | None, results: Sequence[Result]
) -> None:
    """How far we are from the machine's limits, and the notes to all tables."""
    notes = (*NOTES, *GPU_NOTES) if settings.on_gpu else NOTES
    if machine is not None and results:
        show = gpu_limits_table if settings.on_gpu else limits_table
        console.print(show(machine, results))
        console.print()
        notes += () if settings.on_gpu else LIMIT_NOTES
    for line in notes:
        console.print(line, style="dim", highlight=False, markup=False)
    console.print()


def show_verdict(console: Console, gpu: str | None, results: Sequence[Result]) -> None:
    """Where others are faster; the targets of a GPU by its name, of a CPU where that is None."""
    console.print("Where we lose", style="bold")
    for line in losses(results):
        console.print(f"  {line}", highlight=False, markup=False)
    console.print()
    targets = targets_of(gpu)
    if gpu is not None and not targets:
        console.print(why_none(gpu), highlight=False, markup=False)
    elif any(result.ours for result in results):
        console.print(targets_table(targets, [each.measured for each in results]))
        console.print()
