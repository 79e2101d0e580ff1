# SPDX-License-Identifier: Apache-2.0
"""The decisive shapes alone, and what a backward is made of: the times stage of gpu_check.py.

    python -m benchmarks.gpu.times --out times.json --seconds 90
    python -m benchmarks.gpu.times profiled encoder-800x1333 bf16 backward    # one call, for ncu

Where op.py asks for every shape, dtype and kind of time, this asks what decides between kernels:
device time with warm caches (_graphs.py) of forward and backward, of the backward's parts, of the
deterministic one, of the Triton kernels, of the fused operator beside its chain, and of each rival
that is importable, with the peak memory of a training step. Inputs are drawn on the device.

Each implementation is timed alone, ours first, and the result is written after each. One after
which the device answers nothing any more costs its own rows alone: this program begins anew without
it, and goes on with the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import graphs as _graphs
from benchmarks.common import report as _report
from benchmarks.common.console import LOOK, columns, wide_console
from benchmarks.common.graphs import answers
from benchmarks.common.memory import first_line, is_out_of_memory, measure
from benchmarks.common.options import positive_float
from benchmarks.common.timing import Case, OutOfMemory, Timing, take_turns
from benchmarks.gpu.predictions import DECISIVE
from benchmarks.op import fused
from benchmarks.op import implementations as _rivals
from benchmarks.op import targets as _targets
from benchmarks.op.implementations import OURS, RIVALS, TRITON, Implementation, is_rival
from benchmarks.op.targets import CHAIN, FUSED
from benchmarks.op.traffic import BOTH, PASSES
from vitadapter_ops import _extension
from vitadapter_ops.testing import cases
from vitadapter_ops.testing.tolerances import RIVAL_SHARE

DTYPES = ("fp32", "bf16")
# Of our backward: gathers and dot products without gradient of value; that gradient alone; what
# comes before and after it.
PARTS = ("points", "value", "zeros", "cast")
ROUNDS, SECONDS = 15, 0.08
# Too slow, or too large, to be timed at encoder scale within the stage's time.
SMALL_ONLY = ("grid_sample",)
SMALL_QUERIES = 3000

Key = tuple[str, str]  # implementation, pass


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


def decisive(rehearse: bool) -> list[cases.Case]:
    known = {case.name: replace(case, locations="local") for case in cases.GPU_BENCH}
    chosen = [known[name] for name in DECISIVE]
    if rehearse:
        levels = ((6, 8), (3, 4))
        small = {"shapes": levels, "batch": 1, "heads": 2}
        chosen = [
            replace(chosen[0], **small, queries=60, grids=levels),
            replace(chosen[1], **small, queries=7),
        ]
    return chosen


def draw(case: cases.Case, dtypes: str, device: str) -> cases.Inputs:
    """Local points as `Case.inputs` has them, drawn on the device; fp32 has every location."""
    dtype, points = cases.DTYPES[dtypes]
    g = torch.Generator(device).manual_seed(0)
    pixels = sum(height * width for height, width in case.shapes)
    size = (case.batch, case.queries, case.heads, len(case.shapes), case.points)
    value = torch.randn(case.batch, pixels, case.heads, case.channels, generator=g, device=device)
    positions = case.positions(torch.Generator().manual_seed(0)).float().to(device)
    sides = torch.tensor([(w, h) for h, w in case.shapes], dtype=torch.float32, device=device)
    noise = torch.randn(*size, 2, generator=g, device=device) * cases.LOCAL_SPREAD
    locations = positions[:, :, None, None, None] + noise / sides[:, None]
    weights = torch.rand(size, generator=g, device=device)
    weights = weights / weights.sum((3, 4), keepdim=True)
    return cases.Inputs(
        value.to(dtype), list(case.shapes), locations.to(points), weights.to(points), None
    )


def draw_offsets(case: cases.Case, dtypes: str, device: str) -> cases.OffsetInputs:
    _, points = cases.DTYPES[dtypes]
    g = torch.Generator(device).manual_seed(0)
    some = draw(case, dtypes, device)
    total = len(case.shapes) * case.points
    size = (case.batch, case.queries, case.heads, total)
    offsets = torch.randn(*size, 2, generator=g, device=device) * cases.LOCAL_SPREAD
    reference = case.positions(torch.Generator().manual_seed(0))[:1, :, None].float().to(device)
    return cases.OffsetInputs(
        some.value,
        some.spatial_shapes,
        reference,
        offsets.to(points),
        torch.randn(size, generator=g, device=device).to(points),
        [case.points] * len(case.shapes),
        None,
        None,
        None,
    )


# --- what is timed ------------------------------------------------------------------------------


def implementations(rehearse: bool) -> list[Implementation]:
    """Ours, and the rivals that are here, without the one that compiles for minutes."""
    found = [OURS]
    for each in RIVALS:
        reason = each.missing()
        if each is _rivals.COMPILED or (reason is not None and rehearse):
            continue
        if reason is None:
            found.append(each)
        else:
            print(f"{each.name} is not timed: {reason}", file=sys.stderr)
    return found


def parts_of(inputs: cases.Inputs, grad: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps for PARTS, without autograd."""
    value, where, weights = inputs.tensors
    backward = torch.ops.vitadapter_ops.ms_deform_attn_backward.default
    given = (grad, value, inputs.flat_shapes, inputs.starts, where, weights)
    yield "points", partial(backward, *given, False, True, True)
    yield "value", partial(backward, *given, True, False, False)
    sums = torch.empty(value.shape, device=value.device)
    yield "zeros", sums.zero_
    if value.dtype != torch.float32:
        yield "cast", partial(sums.to, value.dtype)


def without_gradients(step: Callable[[], object]) -> Callable[[], object]:
    def within() -> object:
        with torch.inference_mode():
            return step()

    return within


def fused_steps(case: cases.Case, dtypes: str, device: str) -> Iterator[tuple[Key, Callable]]:
    """The fused operator and the chain that it replaces; "both" is a training step."""
    inputs = draw_offsets(case, dtypes, device)
    value, _, offsets, logits = inputs.tensors
    grad = _rivals.cotangent_of(fused.fused(inputs, value, offsets, logits))
    for name, method in ((FUSED, "fused"), (CHAIN, "chain")):
        function = fused.function_of(inputs, method)
        yield (name, "forward"), partial(fused.forward, function, value, offsets, logits)
        leaves = [t.detach().clone().requires_grad_() for t in (value, offsets, logits)]
        yield (name, BOTH), partial(fused.both, function, leaves, grad)


def one(step: Callable[[], object], device: torch.device) -> tuple[Case, str]:
    """What to time of a step: on a GPU a graph of many calls; and a note where that cannot be."""
    if device.type != "cuda":
        return Case(step, before=step), ""
    # A pool of its own: after a capture that failed, none succeeds in the same.
    kinds, note = _graphs.cases_of([step], device, None, ("warm",))
    return kinds["warm"], note


def measure_one(case: cases.Case, dtypes: str, device: str, each: Implementation) -> list[Row]:
    """Times of one implementation; with ours the parts of its backward, and the fused operator."""
    where = torch.device(device)
    inputs = draw(case, dtypes, device)
    if inputs.value.dtype not in each.dtypes:
        return []
    if each.name in SMALL_ONLY and case.queries > SMALL_QUERIES:
        return []
    expected = _rivals.forward_step(OURS.bind(inputs), inputs)()
    grad = _rivals.cotangent_of(expected)
    timed: dict[Key, Case] = {}
    notes: dict[str, str] = {}
    peaks: dict[str, float] = {}

    def add(name: str, which: str, step: Callable[[], object]) -> None:
        timed[name, which], note = one(step, where)
        notes[name] = notes.get(name) or note

    try:
        call = each.bind(inputs)
        got = _rivals.step_of(each, call, inputs, "forward")()
        share = ((got.double() - expected.double()).abs().max() / expected.abs().max()).item()
        if not share <= RIVAL_SHARE:
            notes[each.name] = f"output differs from ours by {share:.0%} of the largest value"
        training = _rivals.step_of(each, call, inputs, BOTH, grad)
        training()
        if where.type == "cuda":
            peaks[each.name] = (measure(training, where).growth_bytes or 0) / 2**20
        for which in PASSES:
            add(each.name, which, _rivals.step_of(each, call, inputs, which, grad))
        if each is OURS:
            for part, step in parts_of(inputs, grad):
                add(OURS.name, part, without_gradients(step))
            if case.grids:
                for (name, which), step in fused_steps(case, dtypes, device):
                    add(name, which, step)
        timings = take_turns(timed, device=where, warmup=2, repeats=ROUNDS, seconds=SECONDS)
    except Exception as error:
        memory = is_out_of_memory(error)
        note = "out of memory" if memory else f"cannot run: {first_line(error)}"
        return [Row(case.name, dtypes, each.name, "", None, note=_report.without_paths(note))]
    return list(_rows(case, dtypes, timings, notes, peaks))


def _rows(case, dtypes, timings, notes, peaks) -> Iterator[Row]:
    for (name, which), timing in timings.items():
        note = _report.without_paths(notes.pop(name, "") or "")
        if isinstance(timing, OutOfMemory):
            yield Row(case.name, dtypes, name, which, None, note="out of memory")
        elif isinstance(timing, Timing):
            microseconds = [1e6 * each for each in (timing.median, timing.p20, timing.p80)]
            mib = peaks.pop(name, None)
            yield Row(case.name, dtypes, name, which, *microseconds, mib, note)
    for name, note in notes.items():
        if note:
            yield Row(case.name, dtypes, name, "", None, note=_report.without_paths(note))


# --- shown --------------------------------------------------------------------------------------


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
    names = (*PASSES, BOTH, *PARTS)
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


# --- run ----------------------------------------------------------------------------------------


def profiled(case: cases.Case, dtypes: str, which: str, device: str) -> None:
    """One call of ours between cudaProfilerStart and cudaProfilerStop, after two others."""
    inputs = draw(case, dtypes, device)
    call = OURS.bind(inputs)
    grad = _rivals.cotangent_of(_rivals.forward_step(call, inputs)())
    step = _rivals.step_of(OURS, call, inputs, which, grad)
    step()
    step()
    if device == "cpu":
        step()
        return
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        step()
        torch.cuda.synchronize()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="_gpu_times.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "profiled",
        nargs="*",
        metavar="profiled CASE DTYPE PASS",
        help="instead of timing: one call, for a profiler",
    )
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--seconds", type=positive_float, default=90.0, help="start no case later")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.shapes = decisive(args.rehearse)
    args.device = "cpu" if args.rehearse else "cuda"
    if args.profiled:
        word, *what = args.profiled
        choices = ([case.name for case in args.shapes], DTYPES, PASSES)
        if word != "profiled" or len(what) != len(choices):
            parser.error(f"expected profiled CASE DTYPE PASS, got {' '.join(args.profiled)}")
        for given, valid in zip(what, choices, strict=True):
            if given not in valid:
                parser.error(f"profiled: expected one of {', '.join(valid)}, got {given!r}")
    elif args.out is None:
        parser.error("--out: expected a file, got none")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.profiled:
        _, name, dtypes, which = args.profiled
        case = next(case for case in args.shapes if case.name == name)
        profiled(case, dtypes, which, args.device)
        return 0
    begin = time.monotonic()
    library = _extension.load(args.device)
    if library.origin is None:  # the times would be those of other kernels
        print(f"the {args.device} kernels are not here: {library.error}")
        return 1
    if args.device == "cuda":
        _graphs.use_own_stream(torch.device(args.device))
    chosen = implementations(args.rehearse)
    if args.resume:
        record = json.loads(args.out.read_text())
    else:
        origin = _report.origin(torch.device(args.device), "vitadapter_ops")
        origin["versions"] |= {each.name: each.version for each in chosen if each.module != "torch"}
        record = {
            "schema": 1,
            "benchmark": "gpu-times",
            **origin,
            **{"library": library.origin, "rows": [], "done": [], "left_out": []},
            **{"broke": [], "losses": [], "complete": False},
        }
    for case, dtypes, each in itertools.product(args.shapes, DTYPES, chosen):
        unit = f"{case.name}, {dtypes}, {each.name}"
        if unit in record["done"] or each.name in record["broke"]:
            continue
        left = args.seconds - (time.monotonic() - begin)
        if left <= 0:
            record["left_out"].append(unit)
            continue
        found = measure_one(case, dtypes, args.device, each)
        record["rows"] += [row.as_json() for row in found]
        record["done"].append(unit)
        alive = answers(args.device)
        if not alive:
            record["broke"].append(each.name)
        record["losses"] = losses(rows_of(record))
        _report.write_json(args.out, record)
        if not alive:
            print(f"After {unit} the device answers no more: begun anew without it", flush=True)
            own = [sys.executable, "-m", "benchmarks.gpu.times", "--out", str(args.out)]
            own += ["--rehearse"] * args.rehearse
            os.execv(sys.executable, [*own, "--seconds", f"{max(left - 1, 1):.0f}", "--resume"])
        if args.device == "cuda":
            torch.cuda.empty_cache()
    record["complete"] = not record["left_out"] and not record["broke"]
    _report.write_json(args.out, record)
    show(record)
    failed = [row for row in rows_of(record) if row.implementation == OURS.name and row.us is None]
    return 1 if failed or OURS.name in record["broke"] else 0


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    return [
        Row(**{"which" if key == "pass" else key: value for key, value in row.items()})
        for row in record["rows"]
    ]


def show(record: Mapping[str, Any]) -> None:
    console, rows = wide_console(), rows_of(record)
    gpu = record["machine"]["gpu"]
    if gpu is not None:
        targets = _targets.targets_of(gpu["name"])
        if targets:
            console.print(_targets.table(targets, _targets.of_times(record)))
        else:
            console.print(_targets.why_none(gpu["name"]), highlight=False, markup=False)
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


if __name__ == "__main__":
    sys.exit(main())
