# SPDX-License-Identifier: Apache-2.0
"""The gate, time and memory of every implementation of a case."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console

from benchmarks.common import graphs
from benchmarks.common.console import progress_on
from benchmarks.common.gate import RedGateError, held, show_red
from benchmarks.common.graphs import WARM
from benchmarks.common.memory import ChildError, Peak, first_line, is_out_of_memory, peak_of
from benchmarks.common.report import without_paths
from benchmarks.common.timing import Case, OutOfMemory, Timing, ratio, take_turns
from benchmarks.op import implementations
from benchmarks.op.implementations import OURS, Implementation
from benchmarks.op.results import Result, Settings, inputs_of, label
from benchmarks.op.traffic import BOTH, plane_bytes, traffic
from vitadapter_ops.testing import cases, gate
from vitadapter_ops.testing.tolerances import RIVAL_SHARE

Key = tuple[str, str, str, str]  # dtype, pass, implementation, kind of time


def check(case: cases.Case, dtype: str, device: str) -> None:
    """Raises RedGateError where our results are wrong."""
    with held(f"{label(case)}, {dtype}"):
        gate.check_backend(case, dtype, "auto", device, judge=device)


def green_dtypes(settings: Settings, console: Console, *several: cases.Case) -> list[str]:
    """Those dtypes of the run at which all these cases pass the gate; the others are shown."""
    green = []
    for dtype in settings.dtypes:
        try:
            for case in several:
                check(case, dtype, settings.device)
        except RedGateError as error:
            show_red(console, error)
        else:
            green.append(dtype)
    return green


def prepare_step(
    implementation: str, case: cases.Case, dtype: str, which: str, device: str, threads: int
) -> Callable[[], object]:
    """One step, run once so that libraries are loaded and code is generated."""
    torch.set_num_threads(threads)
    inputs = inputs_of(case, dtype, device)
    each = implementations.named(implementation)
    # Memory of the backward is that of a graph made and used.
    which = which if which == "forward" else BOTH
    step = implementations.step_of(each, each.bind(inputs), inputs, which)
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
            count = graphs.copies(size, graphs.l2_bytes(device))
            several += [several[0].copy() for _ in range(count - 1)]
        expected = implementations.forward_step(OURS.bind(several[0]), several[0])()
        cotangent = implementations.cotangent_of(expected)
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
    got = implementations.step_of(each, call, several[0], "forward")()
    share = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
    notes = []
    if not share <= RIVAL_SHARE:  # also when it is not a number
        notes.append(f"output differs from ours by {share:.0%} of the largest value")
    steps: dict[Key, Case] = {}
    # Its own: after a capture that failed, none succeeds in the same.
    pool = torch.cuda.graph_pool_handle() if settings.on_gpu else None
    for which in settings.passes:
        copies = [
            implementations.step_of(each, call, inputs, which, cotangent) for inputs in several
        ]
        if settings.on_gpu:
            kinds, note = graphs.cases_of(copies, torch.device(settings.device), pool)
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

    def of(dtype: str, which: str, name: str) -> dict[str, Timing]:
        found = {kind: timings.get((dtype, which, name, kind)) for kind in graphs.KINDS}
        return {kind: each for kind, each in found.items() if isinstance(each, Timing)}

    results = []
    for dtype in dtypes:
        inputs = inputs_of(case, dtype, settings.device)
        for which in settings.passes:
            moved = traffic(inputs, which)
            ours = of(dtype, which, OURS.name)
            for each in settings.implementations:
                if inputs.value.dtype not in each.dtypes:
                    continue
                status = made.failed.get((dtype, each.name), "ok")
                if isinstance(timings.get((dtype, which, each.name, WARM)), OutOfMemory):
                    status = "out of memory"
                own = of(dtype, which, each.name)
                ratios = {k: ratio(own[k].median, ours[k].median) for k in own if k in ours}
                results.append(
                    Result(
                        case,
                        dtype,
                        which,
                        each,
                        without_paths(status),
                        own,
                        {kind: value for kind, value in ratios.items() if value is not None},
                        moved,
                        plane_bytes(inputs),
                        without_paths(made.notes.get((dtype, each.name), "")),
                    )
                )
    return results


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
            dtypes = green_dtypes(settings, console, case)
            green &= len(dtypes) == len(settings.dtypes)
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


def profile(settings: Settings, console: Console) -> None:
    """One call of ours for each shape, dtype and pass, which a profiler records alone."""
    for case in settings.cases:
        for dtype in settings.dtypes:
            inputs = inputs_of(case, dtype, settings.device)
            call = OURS.bind(inputs)
            cotangent = implementations.cotangent_of(call(*inputs.tensors))
            for which in settings.passes:
                step = implementations.step_of(OURS, call, inputs, which, cotangent)
                for _ in range(settings.warmup):
                    step()
                torch.cuda.synchronize()
                with torch.cuda.profiler.profile():
                    step()
                    torch.cuda.synchronize()
                console.print(f"Profiled: {label(case)}, {dtype}, {which}", highlight=False)
