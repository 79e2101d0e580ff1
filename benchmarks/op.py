# SPDX-License-Identifier: Apache-2.0
"""The operator alone, beside other implementations of it, and beside what the machine can do.

    python benchmarks/op.py                                     # all shapes in fp32, long
    python benchmarks/op.py --cases 'injector-*' --locations local --dtype fp32 bf16
    python benchmarks/op.py --against torch-ms-deform-attn      # one rival only
    python benchmarks/op.py --scaling                           # does cost grow linearly?
    python benchmarks/op.py --host                              # what does a call cost the host?

Shapes are those of tests/cases.py: ViT-Adapter's injectors and extractors, and Deformable DETR's
encoder and decoder. Sampling points lie anywhere, or around their query as in trained models.

A shape is timed only after the output and all three gradients have passed the tests' gate. All
implementations of one shape take turns in one process, each right after an untimed call of its own:
times are with warm caches. "backward" is the backward pass alone, all three gradients, on a graph
that is kept. Memory is the peak of one step in a fresh process, on top of the inputs.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import _bandwidth
import _host
import _report
import _rivals
import _scaling
import cases
import gate
from _command import (
    LOOK,
    add_device_arguments,
    chosen_backend,
    columns,
    device_of,
    positive,
    positive_float,
    progress_on,
    span,
    times,
    wide_console,
)
from _memory import ChildError, Peak, first_line, is_out_of_memory, peak_in_child
from _rivals import OURS, RIVALS, Implementation
from _timing import Case, OutOfMemory, Timing, ratio, take_turns
from _traffic import PASSES, Traffic, limit, plane_bytes, traffic
from tolerances import RIVAL_SHARE

LOCATIONS = ("uniform", "local")
RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20

Key = tuple[str, str, str]  # dtype, pass, implementation


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

    @property
    def warmup(self) -> int:
        return 1 if torch.device(self.device).type == "cpu" else 5


@dataclass(frozen=True)
class Result:
    """What was measured of one implementation in one pass of one case.

    Attributes:
        status: "ok", or why there is no timing.
        ratio: its time to ours; ours is 1.
        note: for a person.
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

    @property
    def ours(self) -> bool:
        return self.implementation is OURS

    @property
    def label(self) -> str:
        return f"{label(self.case)}, {self.dtype}, {self.which}"

    def gb_per_s(self, moved: int) -> float | None:
        return None if self.timing is None else moved / self.timing.median / 1e9

    @property
    def peak_mib(self) -> float | None:
        growth = None if self.peak is None else self.peak.growth_bytes
        return None if growth is None else growth / MIB


def label(case: cases.Case) -> str:
    return f"{case.name}, {case.locations}"


# --- correct first ------------------------------------------------------------------------------


def red(case: cases.Case, dtype: str, device: str) -> str | None:
    """What the gate finds wrong with our results, or None."""
    try:
        gate.check_backend(case, dtype, "auto", device)
    except (AssertionError, RuntimeError) as error:
        return f"{label(case)}, {dtype}: {first_line(error)}"
    return None


# --- measured -----------------------------------------------------------------------------------


def inputs_of(case: cases.Case, dtype: str, device: str) -> cases.Inputs:
    value, points = cases.DTYPES[dtype]
    return case.inputs().to(value, device, points)


def prepare_step(
    implementation: str, case: cases.Case, dtype: str, which: str, device: str, threads: int
) -> Callable[[], object]:
    """In a fresh process: one step, run once so that libraries are loaded and code is generated."""
    torch.set_num_threads(threads)
    inputs = inputs_of(case, dtype, device)
    call = next(each for each in (OURS, *RIVALS) if each.name == implementation).bind(inputs)
    make = _rivals.forward_step if which == "forward" else _rivals.training_step
    step = make(call, inputs)
    step()
    return step


def measure_memory(settings: Settings, result: Result) -> Peak:
    name = result.implementation.name
    args = (name, result.case, result.dtype, result.which, settings.device, settings.threads)
    try:
        return peak_in_child(prepare_step, *args, device=settings.device)
    except ChildError as error:
        if result.ours:
            raise
        return Peak("cannot run", detail=str(error).strip().splitlines()[-1])


def prepare(
    settings: Settings, case: cases.Case, dtype: str
) -> tuple[dict[Key, Callable[[], object]], dict[str, str], dict[str, str]]:
    """Everything that is timed at one dtype.

    Returns:
        The steps; why there are none, by implementation; notes, by implementation.
    """
    inputs = inputs_of(case, dtype, settings.device)
    expected = _rivals.forward_step(OURS.bind(inputs), inputs)()
    steps: dict[Key, Callable[[], object]] = {}
    failed, notes = {}, {}
    for each in settings.implementations:
        try:
            call = each.bind(inputs)
            forward = _rivals.forward_step(call, inputs)
            difference = (forward().double() - expected.double()).abs().max()
            share = float(difference / expected.double().abs().max())
            if not share <= RIVAL_SHARE:  # also when it is not a number
                notes[each.name] = f"output differs from ours by {share:.0%} of the largest value"
            made = {"forward": forward}
            if "backward" in settings.passes:
                made["backward"] = _rivals.backward_step(call, inputs)
        except Exception as error:
            if each is OURS:
                raise
            memory = is_out_of_memory(error)
            failed[each.name] = "out of memory" if memory else f"cannot run: {first_line(error)}"
        else:
            steps |= {(dtype, which, each.name): made[which] for which in settings.passes}
    return steps, failed, notes


def measure_time(settings: Settings, case: cases.Case, dtypes: Sequence[str]) -> list[Result]:
    """All implementations, passes and dtypes of one case, taking turns."""
    steps: dict[Key, Callable[[], object]] = {}
    failed, notes = {}, {}
    for dtype in dtypes:
        made, failed[dtype], notes[dtype] = prepare(settings, case, dtype)
        steps |= made
    timings = take_turns(
        {key: Case(step, before=step) for key, step in steps.items()},
        device=torch.device(settings.device),
        warmup=settings.warmup,
        repeats=settings.rounds,
        seconds=settings.seconds,
    )
    results = []
    for dtype in dtypes:
        inputs = inputs_of(case, dtype, "cpu")
        for which in settings.passes:
            moved = traffic(inputs, which)
            base = timings[dtype, which, OURS.name]
            for each in settings.implementations:
                key = (dtype, which, each.name)
                timing = timings.get(key)
                status = failed[dtype].get(each.name, "ok")
                if isinstance(timing, OutOfMemory):
                    status, timing = "out of memory", None
                result = Result(
                    case,
                    dtype,
                    which,
                    each,
                    _report.without_paths(status),
                    timing,
                    ratio(_median(timing), _median(base)),
                    moved,
                    plane_bytes(inputs),
                    notes[dtype].get(each.name, ""),
                )
                results.append(result)
    return results


def _median(timing: Timing | OutOfMemory | None) -> float | None:
    return timing.median if isinstance(timing, Timing) else None


# --- judged -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """At least this ratio of a rival's time to ours, in fp32 on a CPU, in every case it names."""

    cases: str
    which: str
    rival: str
    ratio: float

    def holds(self, result: Result) -> bool:
        """Whether the target speaks of this result."""
        return (
            fnmatch.fnmatch(result.case.name, self.cases)
            and (result.which, result.implementation.name) == (self.which, self.rival)
            and result.dtype == "fp32"
            and result.ratio is not None
        )


VIT_ADAPTER, ENCODER = "*ctor-*", "encoder-detr"  # injectors and extractors; one case
TARGETS = (
    Target(VIT_ADAPTER, "forward", "torch-ms-deform-attn", 8),
    Target(VIT_ADAPTER, "forward", "grid_sample", 40),
    Target(VIT_ADAPTER, "backward", "torch-ms-deform-attn", 6),
    Target(VIT_ADAPTER, "backward", "grid_sample", 15),
    Target(ENCODER, "forward", "torch-ms-deform-attn", 6),
    Target(ENCODER, "forward", "grid_sample", 40),
    Target(ENCODER, "backward", "torch-ms-deform-attn", 4),
    Target(ENCODER, "backward", "grid_sample", 10),
)


def worst_of(target: Target, results: Sequence[Result]) -> Result | None:
    """The result that is furthest from the target; None where none speaks of it."""
    about = [result for result in results if target.holds(result)]
    return min(about, key=lambda result: result.ratio or 0, default=None)


def against_fp32(results: Sequence[Result]) -> list[tuple[float, Result]]:
    """How much faster than with fp32 our operator is with 16-bit storage, slowest first."""
    ours = [result for result in results if result.ours and result.timing is not None]
    fp32 = {
        (label(result.case), result.which): result.timing
        for result in ours
        if result.dtype == "fp32"
    }
    pairs = []
    for result in ours:
        base = fp32.get((label(result.case), result.which))
        faster = ratio(_median(base), _median(result.timing))
        if result.dtype.startswith(("bf16", "fp16")) and faster is not None:
            pairs.append((faster, result))
    return sorted(pairs, key=lambda pair: pair[0])


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


def case_table(results: Sequence[Result]) -> Table:
    """All results of one case."""
    case = results[0].case
    title = (
        f"{label(case)}: B {case.batch}, Q {case.queries}, M {case.heads}, D {case.channels}, "
        f"L {len(case.shapes)}, P {case.points}; median (p20-p80)"
    )
    table = Table(title=title, **LOOK)
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


def targets_table(results: Sequence[Result]) -> Table:
    table = Table(title="Targets (fp32 on a CPU): a rival's time to ours", **LOOK)
    columns(table, "shapes", "pass", "rival", "target", "", "worst", "in")
    for target in TARGETS:
        worst = worst_of(target, results)
        shapes = "ViT-Adapter" if target.cases == VIT_ADAPTER else target.cases
        row = [shapes, target.which, target.rival, f">= {target.ratio:g}x"]
        if worst is None or worst.ratio is None:
            row += ["not measured", "-", "-"]
        else:
            row += [_verdict(worst.ratio >= target.ratio), times(worst.ratio), label(worst.case)]
        table.add_row(*row)
    pairs = against_fp32(results)
    row = ["all", "both", "ours, fp32 to 16 bits", ">= 1x", "not measured", "-", "-"]
    if pairs:
        faster, result = pairs[0]
        row[1] = result.which
        row[4:] = [_verdict(faster >= 1), times(faster), f"{label(result.case)}, {result.dtype}"]
    table.add_row(*row)
    return table


def _verdict(met: bool) -> str:
    return "[green]met[/]" if met else "[bold red]missed[/]"


NOTES = (
    "(1) Pixels that an ideal run gathers, for each sampling point those of its four corners that "
    "are on the map; the backward pass also reads and writes their gradients. Per second.",
    "(2) All arguments read once, of value only what is gathered, and all results written once.",
    "(3) Peak of one step in a process of its own, on top of its inputs; for backward, of forward "
    "and backward.",
)
LIMIT_NOTES = (
    "(4) One head of one image, packed, and the nearest level that holds it. Loads are of the "
    "widest vectors.",
    "(5) The same as the CPU kernels read it: a copy, or, where pixels are more than points, with "
    "pixels M * D apart as they are stored, which share fewer places in a cache.",
    "(6) The level of (5), or a nearer one where more was measured than that level delivers: "
    "neighbouring queries share pixels.",
)


def show_bandwidths(console: Console, machine: _bandwidth.Machine, threads: int) -> None:
    levels = ", ".join(
        f"{level.name} {level.gb_per_s:.0f} GB/s"
        + ("" if level.bytes is None else f" ({level.bytes // 1024} KiB)")
        for level in machine.levels
    )
    count = f"{threads} thread{'s' * (threads != 1)}"
    console.print(f"Loads with {count}, measured: {levels}.", highlight=False)


def show_verdict(console: Console, results: Sequence[Result]) -> None:
    console.print("Where we lose", style="bold")
    for line in losses(results):
        console.print(f"  {line}", highlight=False, markup=False)
    console.print()
    if any(result.ours for result in results):
        console.print(targets_table(results))
        console.print()


# --- kept ---------------------------------------------------------------------------------------

FIELDS = (
    *("date", "commit", "uncommitted_changes", "cpu", "gpu", "cores", "threads", "os"),
    *("python", "torch", "cuda", "backend", "device", "case", "locations", "dtype"),
    *("batch", "queries", "heads", "channels", "levels", "points", "pass"),
    *("implementation", "version", "status", "rounds", "p20_ms", "p50_ms", "p80_ms", "ratio"),
    *("gathered_gb_per_s", "least_gb_per_s", "peak_mib", "note"),
)


def record_of(settings: Settings) -> dict[str, Any]:
    """What every row shares."""
    device = torch.device(settings.device)
    return {
        "date": _report.today(),
        "machine": _report.machine(device),
        "versions": _report.versions("vitadapter_ops"),
        "git": _report.git_state(),
        "backends": {
            "ran": {
                dtype: chosen_backend(
                    vitadapter_ops.explain_backend(device, cases.DTYPES[dtype][0])
                )
                for dtype in settings.dtypes
            }
        },
    }


def csv_row(record: dict[str, Any], device: str, result: Result) -> dict[str, Any]:
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
    if timing is not None:
        milliseconds = (1e3 * each for each in (timing.p20, timing.median, timing.p80))
        row |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), milliseconds, strict=True))
        row["rounds"] = len(timing.seconds)
    return {
        field: f"{each:.6g}" if isinstance(each, float) else each for field, each in row.items()
    }


# --- run ----------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="op.py",
        description="Time our operator beside others, after the tests' correctness gate.",
        epilog="Prints a table for each case, and appends its rows to a CSV file.",
    )
    add_device_arguments(parser)
    names = [case.name for case in cases.BENCH]
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="PATTERN",
        default=["*"],
        help=f"shapes, by name, with * and ? as in a shell (default: all): {', '.join(names)}",
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
        default=["fp32"],
        help="dtypes of value, and of locations and weights (default: fp32)",
    )
    parser.add_argument(
        "--passes", nargs="+", choices=PASSES, default=PASSES, help="what to time (default: both)"
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
        "--csv", type=Path, help="file to append to (default: benchmarks/results/op-<device>.csv)"
    )
    parser.add_argument("--no-csv", action="store_true", help="write no file")
    args = parser.parse_args(argv)
    args.device = device_of(parser, args.device)
    for pattern in args.cases:
        if not fnmatch.filter(names, pattern):
            parser.error(f"--cases: {pattern!r} names none of {', '.join(names)}")
    args.rivals = _chosen_rivals(parser, args.against)
    if args.csv is None:
        args.csv = RESULTS / f"op-{torch.device(args.device).type}.csv"
    try:
        _report.check_csv(args.csv, FIELDS)
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
    chosen = [
        replace(case, locations=locations)
        for case in cases.BENCH
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in args.cases)
        for locations in LOCATIONS
        if locations in args.locations
    ]
    return Settings(
        device=args.device,
        cases=tuple(chosen),
        dtypes=tuple(dict.fromkeys(args.dtype)),
        passes=tuple(which for which in PASSES if which in args.passes),
        implementations=(OURS, *args.rivals),
        rounds=args.rounds,
        seconds=args.seconds,
        threads=args.threads or torch.get_num_threads(),
    )


def measure_all(settings: Settings, console: Console, keep: Callable[[list[Result]], None]) -> bool:
    """Gate, time and memory of every case; `keep` gets each case's results as they come.

    Returns:
        Whether every case passed the gate.
    """
    green = True
    # It does not depend on where the sampling points lie.
    peaks: dict[tuple[str, Key], Peak] = {}
    with progress_on(console) as progress:
        task = progress.add_task("", total=len(settings.cases) * 3)
        for case in settings.cases:
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
            results = measure_time(settings, case, dtypes)
            progress.update(task, description=f"{label(case)}: memory", advance=1)
            for number, result in enumerate(results):
                if result.timing is not None:
                    key = case.name, (result.dtype, result.which, result.implementation.name)
                    if key not in peaks:
                        peaks[key] = measure_memory(settings, result)
                    results[number] = replace(result, peak=peaks[key])
            progress.advance(task)
            keep(results)
    return green


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

    machine = None
    if torch.device(settings.device).type == "cpu":
        try:
            machine = _bandwidth.measure(settings.threads)
            show_bandwidths(console, machine, settings.threads)
        except _bandwidth.NotMeasured as error:
            console.print(f"Bandwidths: not measured ({error})", highlight=False, markup=False)
    console.print()

    results: list[Result] = []

    def keep(new: list[Result]) -> None:
        results.extend(new)
        console.print(case_table(new))
        for line in remarks(new):
            console.print(f"  {line}", highlight=False, markup=False)
        console.print()
        if not args.no_csv:
            rows = [csv_row(record, settings.device, result) for result in new]
            _report.append_csv(args.csv, FIELDS, rows)

    green = measure_all(settings, console, keep)
    notes = NOTES
    if machine is not None and results:
        console.print(limits_table(machine, results))
        console.print()
        notes += LIMIT_NOTES
    for line in notes:
        console.print(line, style="dim", highlight=False, markup=False)
    console.print()
    show_verdict(console, results)
    if not args.no_csv and results:
        console.print(f"Appended to: {args.csv}", highlight=False, markup=False)
    return 0 if green else 1


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
