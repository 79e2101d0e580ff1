# SPDX-License-Identifier: Apache-2.0
"""The decisive shapes alone, and what a backward is made of: the times stage of the check.

    python -m benchmarks.gpu.times --out times.json --seconds 90

Where benchmarks.op asks for every shape, dtype and kind of time, this asks what decides between
kernels: device time with warm caches (graphs.py) of forward and backward, of the backward's parts,
of the deterministic one, of the Triton kernels, of the fused operator beside its chain, and of each
rival that is importable, with the peak memory of a training step.

Each implementation is timed alone, ours first, and the result is written after each. One after
which the device answers nothing any more costs its own rows alone: this program begins anew without
it, and goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import graphs, report
from benchmarks.common.memory import first_line, is_out_of_memory, measure
from benchmarks.common.options import add_seconds
from benchmarks.common.programs import module
from benchmarks.common.timing import Case, OutOfMemory, Timing, take_turns
from benchmarks.gpu.decisive import DTYPES, decisive, draw, draw_offsets
from benchmarks.gpu.times_shown import Row, losses, rows_of, show
from benchmarks.op import fused
from benchmarks.op.implementations import (
    COMPILED,
    OURS,
    RIVALS,
    Implementation,
    cotangent_of,
    forward_step,
    step_of,
)
from benchmarks.op.targets import CHAIN, FUSED
from benchmarks.op.traffic import BOTH, PASSES
from vitadapter_ops import _extension
from vitadapter_ops.testing import cases
from vitadapter_ops.testing.tolerances import RIVAL_SHARE

ROUNDS, SECONDS = 15, 0.08
# Too slow, or too large, to be timed at encoder scale within the stage's time.
SMALL_ONLY = ("grid_sample",)
SMALL_QUERIES = 3000

Key = tuple[str, str]  # implementation, pass


def present(rehearse: bool) -> list[Implementation]:
    """Ours, and the rivals that are here, without the one that compiles for minutes."""
    found = [OURS]
    for each in RIVALS:
        reason = each.missing()
        if each is COMPILED or (reason is not None and rehearse):
            continue
        if reason is None:
            found.append(each)
        else:
            print(f"{each.name} is not timed: {reason}", file=sys.stderr)
    return found


def parts_of(inputs: cases.Inputs, grad: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps for BACKWARD_PARTS, without autograd."""
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
    grad = cotangent_of(fused.fused(inputs, value, offsets, logits))
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
    kinds, note = graphs.cases_of([step], device, None, ("warm",))
    return kinds["warm"], note


def measure_one(case: cases.Case, dtypes: str, device: str, each: Implementation) -> list[Row]:
    """Times of one implementation; with ours the parts of its backward, and the fused operator."""
    where = torch.device(device)
    inputs = draw(case, dtypes, device)
    if inputs.value.dtype not in each.dtypes:
        return []
    if each.name in SMALL_ONLY and case.queries > SMALL_QUERIES:
        return []
    expected = forward_step(OURS.bind(inputs), inputs)()
    grad = cotangent_of(expected)
    timed: dict[Key, Case] = {}
    notes: dict[str, str] = {}
    peaks: dict[str, float] = {}

    def add(name: str, which: str, step: Callable[[], object]) -> None:
        timed[name, which], note = one(step, where)
        notes[name] = notes.get(name) or note

    try:
        call = each.bind(inputs)
        got = step_of(each, call, inputs, "forward")()
        share = ((got.double() - expected.double()).abs().max() / expected.abs().max()).item()
        if not share <= RIVAL_SHARE:
            notes[each.name] = f"output differs from ours by {share:.0%} of the largest value"
        training = step_of(each, call, inputs, BOTH, grad)
        training()
        if where.type == "cuda":
            peaks[each.name] = (measure(training, where).growth_bytes or 0) / 2**20
        for which in PASSES:
            add(each.name, which, step_of(each, call, inputs, which, grad))
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
        return [Row(case.name, dtypes, each.name, "", None, note=report.without_paths(note))]
    return list(_rows(case, dtypes, timings, notes, peaks))


def _rows(case, dtypes, timings, notes, peaks) -> Iterator[Row]:
    for (name, which), timing in timings.items():
        note = report.without_paths(notes.pop(name, "") or "")
        if isinstance(timing, OutOfMemory):
            yield Row(case.name, dtypes, name, which, None, note="out of memory")
        elif isinstance(timing, Timing):
            microseconds = [1e6 * each for each in (timing.median, timing.p20, timing.p80)]
            mib = peaks.pop(name, None)
            yield Row(case.name, dtypes, name, which, *microseconds, mib, note)
    for name, note in notes.items():
        if note:
            yield Row(case.name, dtypes, name, "", None, note=report.without_paths(note))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.times", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="for the results")
    add_seconds(parser, 90.0, "start no case later")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = "cpu" if args.rehearse else "cuda"
    begin = time.monotonic()
    library = _extension.load(device)
    if library.origin is None:  # the times would be those of other kernels
        print(f"the {device} kernels are not here: {library.error}")
        return 1
    if device == "cuda":
        graphs.use_own_stream(torch.device(device))
    chosen = present(args.rehearse)
    if args.resume:
        record = json.loads(args.out.read_text())
    else:
        origin = report.origin(torch.device(device), "vitadapter_ops")
        origin["versions"] |= {each.name: each.version for each in chosen if each.module != "torch"}
        record = {
            "schema": 1,
            "benchmark": "gpu-times",
            **origin,
            **{"library": library.origin, "rows": [], "done": [], "left_out": []},
            **{"broke": [], "losses": [], "complete": False},
        }
    for case, dtypes, each in product(decisive(args.rehearse), DTYPES, chosen):
        unit = f"{case.name}, {dtypes}, {each.name}"
        if unit in record["done"] or each.name in record["broke"]:
            continue
        left = args.seconds - (time.monotonic() - begin)
        if left <= 0:
            record["left_out"].append(unit)
            continue
        found = measure_one(case, dtypes, device, each)
        record["rows"] += [row.as_json() for row in found]
        record["done"].append(unit)
        alive = graphs.answers(device)
        if not alive:
            record["broke"].append(each.name)
        record["losses"] = losses(rows_of(record))
        report.write_json(args.out, record)
        if not alive:
            print(f"After {unit} the device answers no more: begun anew without it", flush=True)
            own = [*module("gpu.times"), "--out", str(args.out), *["--rehearse"] * args.rehearse]
            os.execv(sys.executable, [*own, "--seconds", f"{max(left - 1, 1):.0f}", "--resume"])
        if device == "cuda":
            torch.cuda.empty_cache()
    record["complete"] = not record["left_out"] and not record["broke"]
    report.write_json(args.out, record)
    show(record)
    failed = [row for row in rows_of(record) if row.implementation == OURS.name and row.us is None]
    return 1 if failed or OURS.name in record["broke"] else 0


if __name__ == "__main__":
    sys.exit(main())
