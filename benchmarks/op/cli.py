# SPDX-License-Identifier: Apache-2.0
"""The operator alone, beside other implementations of it, and beside what the machine can do.

    python -m benchmarks.op                                     # all shapes in fp32, long
    python -m benchmarks.op --cases 'injector-*' --locations local --dtype fp32 bf16
    python -m benchmarks.op --against torch-ms-deform-attn      # one rival only
    python -m benchmarks.op --scaling                           # does cost grow linearly?
    python -m benchmarks.op --host                              # what does a call cost the host?
    python -m benchmarks.op --device cuda                       # the shapes and targets of a GPU
    ncu --profile-from-start off ... python -m benchmarks.op --device cuda --cases 'encoder-*' \
        --dtype bf16 --passes backward --profile                # one call, see docs/gpu.md

Shapes are those of vitadapter_ops.testing.cases: ViT-Adapter's injectors and extractors, and
Deformable DETR's encoder and decoder; on a GPU also DINOv3's adapter. Sampling points lie
anywhere, or around their query as in trained models.

A shape is timed only after the output and all three gradients have passed the tests' gate. All
implementations of one shape take turns in one process, each right after an untimed call of its own:
times are with warm caches, and on a GPU also with cold ones and with the host's part (_graphs.py).
"backward" is the backward pass alone, all three gradients, on a graph that is kept; "both" is
forward and backward. Memory is the peak of one step on top of the inputs.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

if not __debug__:
    raise SystemExit("python -O removes the checks of the correctness gate; run without it")

try:
    import torch
    from rich.console import Console
    from rich.table import Table

    import vitadapter_ops
except ModuleNotFoundError as missing:
    if missing.name not in ("rich", "torch", "vitadapter_ops"):
        raise  # not something that was never installed, but something broken
    raise SystemExit(
        f"{missing.name} is not installed. Run `make bench-op`, which installs all that is needed; "
        "or `pip install '.[bench]'` in the checkout."
    ) from missing

# The shapes, the gate and its tolerances are the tests' own.

from benchmarks.common import graphs as _graphs
from benchmarks.common import report as _report
from benchmarks.common.console import (
    LOOK,
    chosen_backend,
    columns,
    progress_on,
    span,
    times,
    wide_console,
)
from benchmarks.common.memory import ChildError, Peak, first_line, is_out_of_memory, peak_of
from benchmarks.common.options import add_device_arguments, device_of, positive, positive_float
from benchmarks.common.timing import Case, OutOfMemory, Timing, ratio, take_turns
from benchmarks.op import bandwidth as _bandwidth
from benchmarks.op import host as _host
from benchmarks.op import implementations as _rivals
from benchmarks.op import scaling as _scaling
from benchmarks.op import targets as _targets
from benchmarks.op.implementations import OURS, RIVALS, Implementation
from benchmarks.op.targets import Measured, targets_of
from benchmarks.op.traffic import BOTH, PASSES, Traffic, limit, plane_bytes, traffic
from vitadapter_ops.testing import cases, gate
from vitadapter_ops.testing.tolerances import RIVAL_SHARE

LOCATIONS = ("uniform", "local")
RESULTS = _report.RESULTS
MIB = 2**20

WARM, COLD, CALL = _graphs.KINDS
Key = tuple[str, str, str, str]  # dtype, pass, implementation, kind of time: WARM alone on a CPU


@dataclass(frozen=True)
class Settings:
    """One run, as asked for on the command line and filled up with defaults."""

    device: str
    cases: tuple[cases.Case, ...]
    dtypes: tuple[str, ...]
    passes: tuple[str, ...]
    implementations: tuple[Implementation, ...]
    rounds: int
    seconds: float
    threads: int
    at_most: float | None = None

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def warmup(self) -> int:
        return 2 if self.on_gpu else 1


@dataclass(frozen=True)
class Result:
    """What was measured of one implementation in one pass of one case.

    Attributes:
        status: "ok", or why there is no timing.
        timing: on a GPU, of the device alone, with warm caches.
        ratio: its time to ours; ours is 1.
        note: for a person.
        others: other timings by kind, each with its ratio.
    """

    case: cases.Case
    dtype: str
    which: str
    implementation: Implementation
    status: str
    timing: Timing | None
    ratio: float | None
    traffic: Traffic
    planes: tuple[int, int]
    note: str
    peak: Peak | None = None
    others: Mapping[str, tuple[Timing | None, float | None]] = field(default_factory=dict)

    def time_of(self, kind: str) -> Timing | None:
        return self.timing if kind == WARM else self.others.get(kind, (None, None))[0]

    def ratio_of(self, kind: str) -> float | None:
        return self.ratio if kind == WARM else self.others.get(kind, (None, None))[1]

    @property
    def shape(self) -> str:
        return label(self.case)

    @property
    def ours(self) -> bool:
        return self.implementation is OURS

    @property
    def measured(self) -> Measured:
        """What targets are held against."""
        kinds = (WARM, *self.others)
        seconds = {kind: median(self.time_of(kind)) for kind in kinds}
        ratios = {kind: self.ratio_of(kind) for kind in kinds}
        return Measured(
            self.case.name,
            self.shape,
            self.dtype,
            self.which,
            self.implementation.name,
            {kind: each for kind, each in seconds.items() if each is not None},
            {kind: each for kind, each in ratios.items() if each is not None},
            self.peak_mib,
        )

    @property
    def label(self) -> str:
        return f"{label(self.case)}, {self.dtype}, {self.which}"

    def gb_per_s(self, moved: int) -> float | None:
        return None if self.timing is None else moved / self.timing.median / 1e9

    @property
    def peak_mib(self) -> float | None:
        growth = None if self.peak is None else self.peak.growth_bytes
        return None if growth is None else growth / MIB


def median(timing: object) -> float | None:
    return timing.median if isinstance(timing, Timing) else None


def label(case: cases.Case) -> str:
    return f"{case.name}, {case.locations}"


# --- correct first ------------------------------------------------------------------------------


def red(case: cases.Case, dtype: str, device: str) -> str | None:
    """What the gate finds wrong with our results, or None."""
    try:
        gate.check_backend(case, dtype, "auto", device, judge=device)
    except (AssertionError, RuntimeError) as error:
        return f"{label(case)}, {dtype}: {first_line(error)}"
    return None


# --- measured -----------------------------------------------------------------------------------


def inputs_of(case: cases.Case, dtype: str, device: str) -> cases.Inputs:
    value, points = cases.DTYPES[dtype]
    return cases.drawn(case).to(value, device, points)


def prepare_step(
    implementation: str, case: cases.Case, dtype: str, which: str, device: str, threads: int
) -> Callable[[], object]:
    """One step, run once so that libraries are loaded and code is generated."""
    torch.set_num_threads(threads)
    inputs = inputs_of(case, dtype, device)
    each = next(each for each in (OURS, *RIVALS) if each.name == implementation)
    # Memory of the backward is that of a graph made and used.
    which = which if which == "forward" else BOTH
    step = _rivals.step_of(each, each.bind(inputs), inputs, which)
    step()
    return step


def measure_memory(settings: Settings, result: Result) -> Peak:
    name = result.implementation.name
    args = (name, result.case, result.dtype, result.which, settings.device, settings.threads)
    try:
        return peak_of(prepare_step, *args, device=settings.device)
    except ChildError as error:
        if result.ours:
            raise
        return Peak("cannot run", detail=str(error).strip().splitlines()[-1])


@dataclass
class Prepared:
    """What is timed of a case: its steps; why there are none, and notes, by dtype and name."""

    steps: dict[Key, Case] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    notes: dict[tuple[str, str], str] = field(default_factory=dict)


def prepare(settings: Settings, case: cases.Case, dtypes: Sequence[str]) -> Prepared:
    made = Prepared()
    device = torch.device(settings.device)
    for dtype in dtypes:
        several = [inputs_of(case, dtype, settings.device)]
        if settings.on_gpu:
            size = sum(tensor.nbytes for tensor in several[0].tensors)
            count = _graphs.copies(size, _graphs.l2_bytes(device))
            several += [several[0].copy() for _ in range(count - 1)]
        expected = _rivals.forward_step(OURS.bind(several[0]), several[0])()
        cotangent = _rivals.cotangent_of(expected)
        for each in settings.implementations:
            if several[0].value.dtype not in each.dtypes:
                continue
            try:
                prepare_one(settings, made, each, dtype, several, expected, cotangent)
            except Exception as error:
                if each is OURS:
                    raise
                memory = is_out_of_memory(error)
                reason = "out of memory" if memory else f"cannot run: {first_line(error)}"
                made.failed[dtype, each.name] = reason
            if settings.on_gpu:
                torch.cuda.empty_cache()
    return made


def prepare_one(
    settings: Settings,
    made: Prepared,
    each: Implementation,
    dtype: str,
    several: Sequence[cases.Inputs],
    expected: torch.Tensor,
    cotangent: torch.Tensor,
) -> None:
    """Adds one implementation at one dtype: all of its passes, or none."""
    call = each.bind(several[0])
    got = _rivals.step_of(each, call, several[0], "forward")()
    share = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
    notes = []
    if not share <= RIVAL_SHARE:  # also when it is not a number
        notes.append(f"output differs from ours by {share:.0%} of the largest value")
    steps: dict[Key, Case] = {}
    # Its own: after a capture that failed, none succeeds in the same.
    pool = torch.cuda.graph_pool_handle() if settings.on_gpu else None
    for which in settings.passes:
        copies = [_rivals.step_of(each, call, inputs, which, cotangent) for inputs in several]
        if settings.on_gpu:
            kinds, note = _graphs.cases_of(copies, torch.device(settings.device), pool)
            notes += [f"{which}: {note}"] if note else []
        else:
            kinds = {WARM: Case(copies[0], before=copies[0])}
        steps |= {(dtype, which, each.name, kind): step for kind, step in kinds.items()}
    made.steps |= steps
    made.notes[dtype, each.name] = "; ".join(notes)


def measure_time(settings: Settings, case: cases.Case, dtypes: Sequence[str]) -> list[Result]:
    """All implementations, passes and dtypes of one case, taking turns."""
    made = prepare(settings, case, dtypes)
    timings = take_turns(
        made.steps,
        device=torch.device(settings.device),
        warmup=settings.warmup,
        repeats=settings.rounds,
        seconds=settings.seconds,
    )

    def compared(
        dtype: str, which: str, name: str, kind: str
    ) -> tuple[Timing | None, float | None]:
        timing, base = (timings.get((dtype, which, who, kind)) for who in (name, OURS.name))
        found = timing if isinstance(timing, Timing) else None
        return found, ratio(median(timing), median(base))

    results = []
    for dtype in dtypes:
        inputs = inputs_of(case, dtype, settings.device)
        for which in settings.passes:
            moved = traffic(inputs, which)
            for each in settings.implementations:
                if inputs.value.dtype not in each.dtypes:
                    continue
                status = made.failed.get((dtype, each.name), "ok")
                if isinstance(timings.get((dtype, which, each.name, WARM)), OutOfMemory):
                    status = "out of memory"
                timing, compared_to_ours = compared(dtype, which, each.name, WARM)
                kinds = (COLD, CALL) if settings.on_gpu else ()
                result = Result(
                    case,
                    dtype,
                    which,
                    each,
                    _report.without_paths(status),
                    timing,
                    compared_to_ours,
                    moved,
                    plane_bytes(inputs),
                    _report.without_paths(made.notes.get((dtype, each.name), "")),
                    others={kind: compared(dtype, which, each.name, kind) for kind in kinds},
                )
                results.append(result)
    return results


# --- judged -------------------------------------------------------------------------------------


def losses(results: Sequence[Result]) -> list[str]:
    """Where a rival is faster, one line each, the worst first; or that there is no such case."""
    compared = [each for each in results if not each.ours and each.ratio is not None]
    if not compared:
        return ["no rival was timed"]
    lost = sorted((each for each in compared if each.ratio < 1), key=lambda each: each.ratio)
    if not lost:
        return [f"nowhere in this run ({len(compared)} comparisons)"]
    return [f"{each.label}: {each.implementation.name} {times(each.ratio)}" for each in lost]


# --- shown --------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


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
        cold, call = (median(each.time_of(kind)) for kind in (COLD, CALL))
        table.add_row(
            each.implementation.name,
            each.dtype,
            each.which,
            "-" if each.timing is None else span(each.timing.as_json(), "us"),
            times(each.ratio),
            _number(None if cold is None else 1e6 * cold),
            times(each.ratio_of(COLD)),
            _number(None if call is None else 1e6 * call),
            times(each.ratio_of(CALL)),
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


def limits_table(machine: _bandwidth.Machine, results: Sequence[Result]) -> Table:
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


def gpu_shares(machine: _bandwidth.Machine, each: Result) -> dict[str, float | None]:
    """What a result reaches of the measured bandwidths: of L2 when warm, of memory when cold."""
    l2, memory = machine.levels
    warm, cold = each.timing, each.time_of(COLD)
    moved = each.traffic
    return {
        "of_l2": None if warm is None else moved.gathered / warm.median / 1e9 / l2.gb_per_s,
        "of_memory": None if cold is None else moved.least / cold.median / 1e9 / memory.gb_per_s,
    }


def gpu_limits_table(machine: _bandwidth.Machine, results: Sequence[Result]) -> Table:
    """How far our operator is from what the GPU can do."""
    table = Table(title="Share of the measured bandwidths", **LOOK)
    names = ("shapes", "dtype", "pass", "gathered (1), warm\nof L2", "least (2), cold\nof memory")
    columns(table, *names)
    for each in results:
        if each.ours and each.timing is not None:
            shares = gpu_shares(machine, each).values()
            shown = ("-" if share is None else f"{share:.0%}" for share in shares)
            table.add_row(each.shape, each.dtype, each.which, *shown)
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


def show_bandwidths(console: Console, machine: _bandwidth.Machine, threads: int | None) -> None:
    levels = ", ".join(
        f"{level.name} {level.gb_per_s:.0f} GB/s"
        + ("" if level.bytes is None else f" ({level.bytes // 1024} KiB)")
        for level in machine.levels
    )
    what = "Copies"
    if threads:
        what = f"Loads with {threads} thread{'s' * (threads != 1)}"
    console.print(f"{what}, measured: {levels}.", highlight=False)


def gpu_of(record: Mapping[str, Any]) -> str | None:
    """The name of the GPU that a run was on."""
    gpu = record["machine"]["gpu"]
    return None if gpu is None else str(gpu["name"])


def show_verdict(console: Console, record: Mapping[str, Any], results: Sequence[Result]) -> None:
    console.print("Where we lose", style="bold")
    for line in losses(results):
        console.print(f"  {line}", highlight=False, markup=False)
    console.print()
    gpu = gpu_of(record)
    targets = targets_of(gpu)
    if gpu is not None and not targets:
        console.print(_targets.why_none(gpu), highlight=False, markup=False)
    elif any(result.ours for result in results):
        console.print(_targets.table(targets, [each.measured for each in results]))
        console.print()


# --- kept ---------------------------------------------------------------------------------------

FIELDS = (
    *("date", "commit", "uncommitted_changes", "cpu", "gpu", "cores", "threads", "os"),
    *("python", "torch", "cuda", "backend", "device", "case", "locations", "dtype"),
    *("batch", "queries", "heads", "channels", "levels", "points", "pass"),
    *("implementation", "version", "status", "rounds", "p20_ms", "p50_ms", "p80_ms", "ratio"),
    *("gathered_gb_per_s", "least_gb_per_s", "peak_mib", "note"),
)

GPU_FIELDS = (
    *FIELDS,
    *(f"{kind}_{what}" for kind in (COLD, CALL) for what in ("p20_ms", "p50_ms", "p80_ms")),
    *("cold_ratio", "call_ratio", "of_l2", "of_memory"),
)


def fields_of(device: str) -> tuple[str, ...]:
    return GPU_FIELDS if torch.device(device).type == "cuda" else FIELDS


def record_of(settings: Settings) -> dict[str, Any]:
    """What every row shares."""
    device = torch.device(settings.device)
    return {
        **_report.origin(device, "vitadapter_ops"),
        "backends": {
            "ran": {
                dtype: chosen_backend(
                    vitadapter_ops.explain_backend(device, cases.DTYPES[dtype][0])
                )
                for dtype in settings.dtypes
            }
        },
    }


def row_of(
    record: dict[str, Any], device: str, result: Result, machine: _bandwidth.Machine | None
) -> dict[str, Any]:
    """A result with what is known of its run, by `fields_of`."""
    case, timing, host = result.case, result.timing, record["machine"]
    row = {
        "date": record["date"],
        **record["git"],
        **{field: host[field] for field in ("cpu", "cores", "threads", "os")},
        "gpu": host["gpu"] and host["gpu"]["name"],
        **{field: record["versions"][field] for field in ("python", "torch", "cuda")},
        "backend": record["backends"]["ran"][result.dtype] if result.ours else None,
        "device": device,
        "case": case.name,
        "locations": case.locations,
        "dtype": result.dtype,
        "batch": case.batch,
        "queries": case.queries,
        "heads": case.heads,
        "channels": case.channels,
        "levels": len(case.shapes),
        "points": case.points,
        "pass": result.which,
        "implementation": result.implementation.name,
        "version": result.implementation.version,
        "status": result.status,
        "peak_mib": result.peak_mib,
        "ratio": result.ratio,
        "gathered_gb_per_s": result.gb_per_s(result.traffic.gathered),
        "least_gb_per_s": result.gb_per_s(result.traffic.least),
        "note": result.note,
    }
    row |= _milliseconds("", timing)
    row["rounds"] = None if timing is None else len(timing.seconds)
    if torch.device(device).type == "cuda":
        for kind in (COLD, CALL):
            row |= _milliseconds(f"{kind}_", result.time_of(kind))
            row[f"{kind}_ratio"] = result.ratio_of(kind)
        if machine is not None:
            row |= gpu_shares(machine, result)
    return row


def _milliseconds(prefix: str, timing: Timing | None) -> dict[str, float]:
    if timing is None:
        return {}
    figures = {"p20": timing.p20, "p50": timing.median, "p80": timing.p80}
    return {f"{prefix}{name}_ms": 1e3 * seconds for name, seconds in figures.items()}


def as_text(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: f"{each:.6g}" if isinstance(each, float) else each for name, each in row.items()}


def write_json(
    path: Path,
    record: dict[str, Any],
    settings: Settings,
    machine: _bandwidth.Machine | None,
    results: Sequence[Result],
    left_out: Sequence[str],
) -> None:
    """Everything that a run found out."""
    shared = set(record["git"]) | {"date", "cpu", "gpu", "cores", "threads", "os"}
    shared |= {"python", "torch", "cuda"}
    rows = [row_of(record, settings.device, each, machine) for each in results]
    targets = targets_of(gpu_of(record))
    _report.write_json(
        path,
        {
            "schema": 1,
            "benchmark": "op",
            **record,
            "rounds": settings.rounds,
            "bandwidth": None if machine is None else asdict(machine),
            "results": [{k: v for k, v in row.items() if k not in shared} for row in rows],
            "targets": _targets.as_json(targets, [each.measured for each in results]),
            "losses": losses(results),
            "left_out": list(left_out),
        },
    )


# --- run ----------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="op.py",
        description="Time our operator beside others, after the tests' correctness gate.",
        epilog="Prints a table for each case, and appends its rows to a CSV file.",
    )
    add_device_arguments(parser)
    names = [case.name for case in (*cases.BENCH, *cases.GPU_BENCH)]
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="PATTERN",
        help="shapes, by name, with * and ? as in a shell (default: those meant for the device): "
        + ", ".join(names),
    )
    parser.add_argument(
        "--locations",
        nargs="+",
        choices=LOCATIONS,
        default=LOCATIONS,
        help="where queries sample: anywhere, or around their own position (default: both)",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=list(cases.DTYPES),
        help="dtypes of value, and of locations and weights (default: fp32; on a GPU fp32, fp16, "
        "bf16)",
    )
    parser.add_argument(
        "--passes",
        nargs="+",
        choices=(*PASSES, BOTH),
        help="what to time (default: forward, backward; on a GPU also both in one)",
    )
    parser.add_argument(
        "--against",
        nargs="*",
        metavar="NAME",
        help=f"rivals to time: {', '.join(each.name for each in RIVALS)}; no name for none "
        f"(default: all that are installed, without {_rivals.COMPILED.name}, which compiles for "
        "minutes)",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=30,
        help="how often each is timed at most (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=positive_float,
        default=1.0,
        help="time after which one that is slow is not timed again (default: %(default)s)",
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="instead of rivals: our cost for more queries, images and threads; writes nothing",
    )
    parser.add_argument(
        "--host",
        action="store_true",
        help="instead of rivals: the host's time for a call, by backend; writes nothing",
    )
    parser.add_argument(
        "--at-most",
        type=positive_float,
        metavar="SECONDS",
        help="start no further shape after this time (default: measure all)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="instead of timing: one call of ours for each shape, dtype and pass, between "
        "cudaProfilerStart and cudaProfilerStop; writes nothing",
    )
    parser.add_argument("--json", type=Path, help="file for all that was found (default: none)")
    parser.add_argument(
        "--csv", type=Path, help="file to append to (default: benchmarks/results/op-<device>.csv)"
    )
    parser.add_argument("--no-csv", action="store_true", help="write no file")
    args = parser.parse_args(argv)
    args.device = device_of(parser, args.device)
    on_gpu = torch.device(args.device).type == "cuda"
    if args.profile and not on_gpu:
        parser.error(f"--profile: works on a GPU only, not on {args.device}")
    args.dtype = args.dtype or (["fp32", "fp16", "bf16"] if on_gpu else ["fp32"])
    args.passes = args.passes or ((*PASSES, BOTH) if on_gpu else PASSES)
    for pattern in args.cases or ():
        if not fnmatch.filter(names, pattern):
            parser.error(f"--cases: {pattern!r} names none of {', '.join(names)}")
    args.rivals = _chosen_rivals(parser, args.against)
    if args.csv is None:
        args.csv = RESULTS / f"op-{torch.device(args.device).type}.csv"
    try:
        _report.check_csv(args.csv, fields_of(args.device))
    except ValueError as error:
        parser.error(f"--csv: {error}")
    return args


def _chosen_rivals(
    parser: argparse.ArgumentParser, asked: Sequence[str] | None
) -> tuple[Implementation, ...]:
    reasons = {each.name: each.missing() for each in RIVALS}
    installed = [name for name, reason in reasons.items() if reason is None]
    if asked is None:
        asked = [name for name in installed if name != _rivals.COMPILED.name]
    for name in asked:
        if name not in reasons:
            parser.error(f"--against: expected some of {', '.join(reasons)}, got {name!r}")
        if reasons[name] is not None:
            parser.error(
                f"--against: {name} is not installed ({reasons[name]}); "
                f"installed: {', '.join(installed)}. `make bench-rivals` installs the others"
            )
    return tuple(each for each in RIVALS if each.name in asked)


def settings_of(args: argparse.Namespace) -> Settings:
    """The command line with every default filled in."""
    on_gpu = torch.device(args.device).type == "cuda"
    if args.cases is None:
        several = cases.GPU_BENCH if on_gpu else cases.BENCH
    else:
        several = tuple(
            case
            for case in (*cases.BENCH, *cases.GPU_BENCH)
            if any(fnmatch.fnmatch(case.name, pattern) for pattern in args.cases)
        )
    chosen = [
        replace(case, locations=locations)
        for case in several
        for locations in LOCATIONS
        if locations in args.locations
    ]
    if on_gpu:  # time may run out: what is most like a trained model comes first
        chosen.sort(key=lambda case: case.locations != "local")
    return Settings(
        device=args.device,
        cases=tuple(chosen),
        dtypes=tuple(dict.fromkeys(args.dtype)),
        passes=tuple(which for which in (*PASSES, BOTH) if which in args.passes),
        implementations=(OURS, *args.rivals),
        rounds=args.rounds,
        seconds=args.seconds,
        threads=args.threads or torch.get_num_threads(),
        at_most=args.at_most,
    )


def measure_all(
    settings: Settings, console: Console, keep: Callable[[list[Result]], None]
) -> tuple[bool, list[str]]:
    """Gate, time and memory of every case; `keep` gets each case's results as they come.

    Returns:
        Whether every case passed the gate; the cases that were left out, as time was up.
    """
    green = True
    left_out: list[str] = []
    begin = time.monotonic()
    # It does not depend on where the sampling points lie.
    peaks: dict[tuple[str, str, str, str], Peak] = {}
    with progress_on(console) as progress:
        task = progress.add_task("", total=len(settings.cases) * 3)
        for case in settings.cases:
            if settings.at_most is not None and time.monotonic() - begin > settings.at_most:
                left_out.append(label(case))
                progress.advance(task, 3)
                continue
            progress.update(task, description=f"{label(case)}: correct?")
            wrong = {dtype: red(case, dtype, settings.device) for dtype in settings.dtypes}
            for reason in filter(None, wrong.values()):
                show_red(console, reason)
                green = False
            dtypes = [dtype for dtype in settings.dtypes if wrong[dtype] is None]
            if not dtypes:
                progress.advance(task, 3)
                continue
            progress.update(task, description=f"{label(case)}: time", advance=1)
            try:
                results = measure_time(settings, case, dtypes)
                progress.update(task, description=f"{label(case)}: memory", advance=1)
                for number, result in enumerate(results):
                    if result.timing is not None:
                        key = case.name, result.dtype, result.which, result.implementation.name
                        if key not in peaks:
                            peaks[key] = measure_memory(settings, result)
                        results[number] = replace(result, peak=peaks[key])
            except Exception:  # ours cannot run: the other shapes are still worth having
                console.print(traceback.format_exc(), highlight=False, markup=False)
                console.print(f"Not timed: {label(case)}, see above", style="bold red")
                green = False
            else:
                keep(results)
            progress.advance(task)
    return green, left_out


def show_red(console: Console, reason: str) -> None:
    console.print(f"Not timed, because the results are wrong: {reason}", style="bold red")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    settings = settings_of(args)
    torch.set_num_threads(settings.threads)
    console = wide_console()
    record = record_of(settings)
    console.print(_report.caption(record), style="dim", highlight=False)

    if args.host:
        console.print(_host.table(_host.measure(settings.device, settings.rounds)))
        console.print(_host.NOTE, style="dim", highlight=False)
        return 0
    if args.scaling:
        return show_scaling(settings, console)

    if settings.on_gpu:
        _graphs.use_own_stream(torch.device(settings.device))
    if args.profile:
        return profile(settings, console)

    machine = None
    try:
        if settings.on_gpu:
            machine = _bandwidth.measure_gpu(torch.device(settings.device))
        else:
            machine = _bandwidth.measure(settings.threads)
        show_bandwidths(console, machine, None if settings.on_gpu else settings.threads)
    except _bandwidth.NotMeasured as error:
        console.print(f"Bandwidths: not measured ({error})", highlight=False, markup=False)
    console.print()

    results: list[Result] = []

    def keep(new: list[Result]) -> None:
        results.extend(new)
        console.print(gpu_case_table(new) if settings.on_gpu else case_table(new))
        if len(settings.implementations) > 1:
            lost = "; ".join(losses(new))
            console.print(f"  Where a rival wins: {lost}", highlight=False, markup=False)
        for line in remarks(new):
            console.print(f"  {line}", highlight=False, markup=False)
        console.print()
        if not args.no_csv:
            rows = [as_text(row_of(record, settings.device, each, machine)) for each in new]
            _report.append_csv(args.csv, fields_of(settings.device), rows)
        if args.json is not None:  # as far as it got, should it be ended
            write_json(args.json, record, settings, machine, results, [])

    green, left_out = measure_all(settings, console, keep)
    notes = (*NOTES, *GPU_NOTES) if settings.on_gpu else NOTES
    if machine is not None and results:
        show = gpu_limits_table if settings.on_gpu else limits_table
        console.print(show(machine, results))
        console.print()
        notes += () if settings.on_gpu else LIMIT_NOTES
    for line in notes:
        console.print(line, style="dim", highlight=False, markup=False)
    console.print()
    show_verdict(console, record, results)
    if left_out:
        console.print(f"Left out, as time was up: {'; '.join(left_out)}", highlight=False)
    if args.json is not None:
        write_json(args.json, record, settings, machine, results, left_out)
        console.print(f"Written: {args.json}", highlight=False, markup=False)
    if not args.no_csv and results:
        console.print(f"Appended to: {args.csv}", highlight=False, markup=False)
    return 0 if green else 1


def profile(settings: Settings, console: Console) -> int:
    """One call of ours for each shape, dtype and pass, which a profiler records alone."""
    for case in settings.cases:
        for dtype in settings.dtypes:
            inputs = inputs_of(case, dtype, settings.device)
            call = OURS.bind(inputs)
            cotangent = _rivals.cotangent_of(call(*inputs.tensors))
            for which in settings.passes:
                step = _rivals.step_of(OURS, call, inputs, which, cotangent)
                for _ in range(settings.warmup):
                    step()
                torch.cuda.synchronize()
                with torch.cuda.profiler.profile():
                    step()
                    torch.cuda.synchronize()
                console.print(f"Profiled: {label(case)}, {dtype}, {which}", highlight=False)
    return 0


def show_scaling(settings: Settings, console: Console) -> int:
    green = True
    for case in settings.cases:
        # Cost changes with the shape, and so may which code runs: both ends must be right.
        variants = (case, replace(case, heads=1, batch=1))
        for dtype in settings.dtypes:
            wrong = [reason for each in variants if (reason := red(each, dtype, settings.device))]
            for reason in wrong:
                show_red(console, reason)
                green = False
            if not wrong:
                console.print(_scaling.table(_scaling.measure(settings, case, dtype)))
                console.print()
    console.print(_scaling.NOTE, style="dim", highlight=False)
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
