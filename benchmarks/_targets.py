# SPDX-License-Identifier: Apache-2.0
"""What results are held to, and whether they hold."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from _command import LOOK, columns
from _rivals import DETERMINISTIC, OURS
from _timing import Timing, ratio

if TYPE_CHECKING:
    from op import Result

# How far a result is on the way to a target: a ratio or microseconds, and whose it is.
Found = tuple[float, "Result"]
ENOUGH, MOST = ">=", "<="

VIT_ADAPTER, ENCODER = "*ctor-*", "encoder-detr"  # injectors and extractors; one case
GPU_ENCODER, GPU_DECODER, DINOV3 = "encoder-800x1333", "decoder-800x1333", "dinov3-*"
DEFORMABLE_DETR = "torch-ms-deform-attn*"  # its kernel, at its own dtype and in fp32
OTHER_TRITON = "*triton*"


@dataclass(frozen=True)
class Target:
    """One thing to reach in every case that it speaks of.

    Attributes:
        cases, which, dtypes: shapes by name, passes, and dtypes, with * as in a shell.
        what: for a person.
        bound: ENOUGH or MOST.
        limit: a ratio or microseconds.
        unit: "x" or " us".
        found: from results and a kind of time ("warm", "cold") to all that is about the target.
    """

    cases: str
    which: str
    dtypes: str
    what: str
    bound: str
    limit: float
    unit: str
    found: Callable[[Target, Sequence[Result], str], Iterator[Found]]

    def holds(self, result: Result) -> bool:
        """Whether the target speaks of this result."""
        return (
            fnmatch.fnmatch(result.case.name, self.cases)
            and fnmatch.fnmatch(result.which, self.which)
            and fnmatch.fnmatch(result.dtype, self.dtypes)
        )

    def worst(self, results: Sequence[Result], kind: str = "warm") -> Found | None:
        """What is furthest from the target; None where nothing is about it."""
        choose = min if self.bound == ENOUGH else max
        return choose(self.found(self, results, kind), key=lambda each: each[0], default=None)

    def met(self, value: float) -> bool:
        return value >= self.limit if self.bound == ENOUGH else value <= self.limit

    def show(self, value: float) -> str:
        return f"{value:.2f}{self.unit}"

    @property
    def text(self) -> str:
        return f"{self.bound} {self.limit:g}{self.unit}"


def median(timing: object) -> float | None:
    return timing.median if isinstance(timing, Timing) else None


def _timed(results: Sequence[Result], name: str) -> dict[tuple[str, str, str], Result]:
    """Results of one of our implementations by shape, dtype and pass."""
    return {
        (each.shape, each.dtype, each.which): each
        for each in results
        if each.implementation.name == name and each.timing is not None
    }


def faster(cases: str, which: str, rivals: str, limit: float, dtypes: str = "fp32") -> Target:
    """At least this ratio of the time of the fastest of some rivals to ours."""

    def found(target: Target, results: Sequence[Result], kind: str) -> Iterator[Found]:
        best: dict[tuple[str, str, str], Found] = {}
        for each in results:
            name, value = each.implementation.name, each.ratio_of(kind)
            rival = fnmatch.fnmatch(name, rivals) and not name.startswith(OURS.name)
            if rival and value is not None and target.holds(each):
                key = (each.shape, each.dtype, each.which)
                best[key] = min(best.get(key, (value, each)), (value, each), key=lambda f: f[0])
        yield from best.values()

    return Target(cases, which, dtypes, rivals.replace("*", ""), ENOUGH, limit, "x", found)


def at_most(cases: str, which: str, limit: float, dtypes: str) -> Target:
    """At most so many microseconds on the device."""

    def found(target: Target, results: Sequence[Result], kind: str) -> Iterator[Found]:
        for each in results:
            seconds = median(each.time_of(kind))
            if each.ours and seconds is not None and target.holds(each):
                yield seconds * 1e6, each

    return Target(cases, which, dtypes, "device time", MOST, limit, " us", found)


def at_most_times(
    cases: str, limit: float, slow: tuple[str, str], fast: tuple[str, str], what: str
) -> Target:
    """One of our passes may take so many times what another takes, at any dtype.

    Args:
        cases: shapes by name.
        limit: how many times.
        slow: implementation and pass.
        fast: likewise.
        what: for a person.
    """

    def found(target: Target, results: Sequence[Result], kind: str) -> Iterator[Found]:
        base = _timed(results, fast[0])
        for (shape, dtype, which), each in _timed(results, slow[0]).items():
            other = base.get((shape, dtype, fast[1]))
            if which == slow[1] and other is not None and target.holds(each):
                times = ratio(median(each.time_of(kind)), median(other.time_of(kind)))
                if times is not None:
                    yield times, each

    return Target(cases, slow[1], "*", what, MOST, limit, "x", found)


def against_fp32(results: Sequence[Result], kind: str = "warm") -> list[Found]:
    """How much faster than with fp32 our operator is with 16-bit storage, slowest first."""
    ours = _timed(results, OURS.name)
    pairs = []
    for (shape, dtype, which), each in ours.items():
        base = ours.get((shape, "fp32", which))
        if base is not None and dtype.startswith(("bf16", "fp16")):
            value = ratio(median(base.time_of(kind)), median(each.time_of(kind)))
            if value is not None:
                pairs.append((value, each))
    return sorted(pairs, key=lambda pair: pair[0])


NARROW = Target(
    "*",
    "*",
    "16 bits",
    "ours in fp32",
    ENOUGH,
    1,
    "x",
    lambda target, results, kind: iter(against_fp32(results, kind)),
)
CPU_TARGETS = (
    faster(VIT_ADAPTER, "forward", "torch-ms-deform-attn", 8),
    faster(VIT_ADAPTER, "forward", "grid_sample", 40),
    faster(VIT_ADAPTER, "backward", "torch-ms-deform-attn", 6),
    faster(VIT_ADAPTER, "backward", "grid_sample", 15),
    faster(ENCODER, "forward", "torch-ms-deform-attn", 6),
    faster(ENCODER, "forward", "grid_sample", 40),
    faster(ENCODER, "backward", "torch-ms-deform-attn", 4),
    faster(ENCODER, "backward", "grid_sample", 10),
    NARROW,
)
BACKWARD, FORWARD = (OURS.name, "backward"), (OURS.name, "forward")
GPU_TARGETS = (
    *(faster(GPU_ENCODER, which, DEFORMABLE_DETR, 3) for which in ("forward", "backward")),
    *(faster(GPU_ENCODER, which, DEFORMABLE_DETR, 5, "bf16") for which in ("forward", "backward")),
    at_most(GPU_DECODER, "forward", 6, "bf16"),
    at_most(GPU_DECODER, "backward", 30, "bf16"),
    *(
        faster(cases, which, DEFORMABLE_DETR, 4, "*")
        for cases in (VIT_ADAPTER, DINOV3)
        for which in ("forward", "backward")
    ),
    *(faster("*", which, OTHER_TRITON, 1.5, "*") for which in ("forward", "backward")),
    at_most_times(GPU_ENCODER, 2, BACKWARD, FORWARD, "our forward"),
    at_most_times(GPU_ENCODER, 3, (DETERMINISTIC.name, "backward"), BACKWARD, "our default"),
    NARROW,
)


def targets_of(device_type: str) -> tuple[Target, ...]:
    return GPU_TARGETS if device_type == "cuda" else CPU_TARGETS


def as_json(targets: Sequence[Target], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every target with the worst result about it; `met` is None where nothing was measured."""
    records = []
    for target in targets:
        warm, cold = target.worst(results), target.worst(results, "cold")
        records.append(
            {
                "cases": target.cases,
                "pass": target.which,
                "dtypes": target.dtypes,
                "what": target.what,
                "target": target.text,
                "met": None if warm is None else target.met(warm[0]),
                "worst": None if warm is None else warm[0],
                "in": None if warm is None else f"{warm[1].shape}, {warm[1].dtype}",
                "worst_cold": None if cold is None else cold[0],
            }
        )
    return records


def table(targets: Sequence[Target], results: Sequence[Result]) -> Table:
    """Targets, met or missed, with the case that is furthest from each.

    Times with warm caches decide; with cold ones, measured on a GPU alone, they only stand beside.
    """
    made = Table(title="Targets: >= the other's time to ours, <= ours to the other's", **LOOK)
    columns(made, "shapes", "pass", "dtype", "other", "target", "worst", "cold", "in")
    for target in targets:
        warm, cold = target.worst(results), target.worst(results, "cold")
        made.add_row(
            {VIT_ADAPTER: "ViT-Adapter", DINOV3: "DINOv3 adapter"}.get(target.cases, target.cases),
            target.which,
            target.dtypes if warm is None else warm[1].dtype,
            target.what,
            target.text,
            "not measured" if warm is None else _verdict(target, warm[0]),
            "-" if cold is None else target.show(cold[0]),
            "-" if warm is None else warm[1].case.name,
        )
    return made


def _verdict(target: Target, value: float) -> str:
    met = "[green]met[/]" if target.met(value) else "[bold red]missed[/]"
    return f"{met} {target.show(value)}"
