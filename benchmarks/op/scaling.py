# SPDX-License-Identifier: Apache-2.0
"""Whether our cost grows linearly with queries and images, and falls with threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.console import LOOK, columns
from benchmarks.common.report import usable_cores
from benchmarks.common.timing import Case, OutOfMemory, Timing, take_turns
from benchmarks.op.implementations import OURS, step_of
from benchmarks.op.measure import green_dtypes
from benchmarks.op.results import Settings
from vitadapter_ops.testing import cases

NOTE = (
    "Each figure is the cost of one query, one image, or of one thread's share of the work, as a "
    "multiple of the row's first: 1.00 is linear, more is worse."
)


@dataclass(frozen=True)
class Variant:
    """One case along one axis.

    Attributes:
        axis: "queries", "images" or "threads, one head".
        amount: of the axis.
        factor: what its time is multiplied with to become comparable with its axis's first.
    """

    axis: str
    amount: int
    factor: float
    case: cases.Case
    threads: int


def variants(case: cases.Case, threads: int, cores: int) -> list[Variant]:
    several = [
        Variant(
            "queries", case.queries * k, 1 / k, replace(case, queries=case.queries * k), threads
        )
        for k in (1, 2, 4)
    ]
    several += [Variant("images", b, 1 / b, replace(case, batch=b), threads) for b in (1, 2, 4)]
    one = replace(case, heads=1, batch=1)
    counts = sorted({*(2**k for k in range(cores.bit_length())), cores})
    return several + [Variant("threads, one head", n, n, one, n) for n in counts]


def measure(
    settings: Settings, case: cases.Case, dtype: str
) -> dict[tuple[Variant, str], Timing | OutOfMemory]:
    """Every variant and pass of one case, taking turns."""
    device = torch.device(settings.device)
    cores = usable_cores() if device.type == "cpu" else 1
    steps: dict[tuple[Variant, str], Case] = {}
    for variant in variants(case, settings.threads, cores):
        value, points = cases.DTYPES[dtype]
        inputs = variant.case.inputs().to(value, settings.device, points)
        call = OURS.bind(inputs)
        for which in settings.passes:
            step = step_of(OURS, call, inputs, which)
            steps[variant, which] = _on(variant.threads, step)
    try:
        return take_turns(
            steps,
            device=device,
            warmup=settings.warmup,
            repeats=settings.rounds,
            seconds=settings.seconds,
        )
    finally:
        torch.set_num_threads(settings.threads)


def _on(threads: int, step) -> Case:
    """A case with its own number of threads, after an untimed call that starts them."""

    def before() -> None:
        torch.set_num_threads(threads)
        step()

    return Case(step, before)


def cost(timings: dict[tuple[Variant, str], Timing | OutOfMemory], axis: str, which: str):
    """(variant, cost as a multiple of the first's) along one axis; None where it did not fit."""
    along = [
        (v, timing) for (v, kind), timing in timings.items() if (v.axis, kind) == (axis, which)
    ]
    first = along[0][1]
    return [
        (
            variant,
            timing.median * variant.factor / (first.median * along[0][0].factor)
            if isinstance(timing, Timing) and isinstance(first, Timing)
            else None,
        )
        for variant, timing in along
    ]


def table(timings: dict[tuple[Variant, str], Timing | OutOfMemory]) -> Table:
    passes: Sequence[str] = list(dict.fromkeys(which for _, which in timings))
    case = next(iter(timings))[0].case
    result = Table(title=f"{case.name}, {case.locations}: is cost linear?", **LOOK)
    columns(result, "axis", "pass", "amount: cost of one")
    for axis in dict.fromkeys(variant.axis for variant, _ in timings):
        for which in passes:
            cells = [
                f"{variant.amount}: " + ("out of memory" if each is None else f"{each:.2f}")
                for variant, each in cost(timings, axis, which)
            ]
            result.add_row(axis, which, "   ".join(cells))
    return result


def show(settings: Settings, console: Console) -> bool:
    """Measures and prints every case that passes the gate; returns whether all did."""
    green = True
    for case in settings.cases:
        # Cost changes with the shape, and so may which code runs: both ends must be right.
        dtypes = green_dtypes(settings, console, case, replace(case, heads=1, batch=1))
        green &= len(dtypes) == len(settings.dtypes)
        for dtype in dtypes:
            console.print(table(measure(settings, case, dtype)))
            console.print()
    console.print(NOTE, style="dim", highlight=False)
    return green
