# SPDX-License-Identifier: Apache-2.0
"""Whether our cost grows linearly with queries and images, and falls with threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from benchmarks.common import report as _report
from benchmarks.common.console import LOOK, columns
from benchmarks.common.timing import Case, OutOfMemory, Timing, take_turns
from benchmarks.op import implementations as _rivals
from vitadapter_ops.testing import cases

if TYPE_CHECKING:
    from benchmarks.op.cli import Settings

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
    cores = _report.usable_cores() if device.type == "cpu" else 1
    steps: dict[tuple[Variant, str], Case] = {}
    for variant in variants(case, settings.threads, cores):
        value, points = cases.DTYPES[dtype]
        inputs = variant.case.inputs().to(value, settings.device, points)
        call = _rivals.OURS.bind(inputs)
        for which in settings.passes:
            step = _rivals.step_of(_rivals.OURS, call, inputs, which)
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
