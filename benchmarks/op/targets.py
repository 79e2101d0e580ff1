# SPDX-License-Identifier: Apache-2.0
"""What results are held to, and whether they hold."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from benchmarks.common.cards import CARDS, card_of
from benchmarks.common.console import LOOK, columns
from benchmarks.common.graphs import COLD, WARM
from benchmarks.common.timing import ratio
from benchmarks.op.implementations import DETERMINISTIC, OURS, TRITON, is_rival
from benchmarks.op.traffic import BOTH, PASSES


@dataclass(frozen=True)
class Measured:
    """What one implementation took in one pass of one shape.

    Attributes:
        case: name of the shape.
        shape: the same, with where the points lie.
        dtype, which, implementation: names; `which` is the pass.
        seconds: median time by kind of time.
        ratios: the same to ours in the same run.
        mib: peak memory.
    """

    case: str
    shape: str
    dtype: str
    which: str
    implementation: str
    seconds: Mapping[str, float]
    ratios: Mapping[str, float] = field(default_factory=dict)
    mib: float | None = None

    @property
    def ours(self) -> bool:
        return self.implementation == OURS.name

    @property
    def key(self) -> tuple[str, str, str]:
        return self.shape, self.dtype, self.which


# How far a result is on the way to a target: a ratio or microseconds, and whose it is.
Found = tuple[float, Measured]
ENOUGH, MORE, MOST = ">=", ">", "<="

VIT_ADAPTER, ENCODER = "*ctor-*", "encoder-detr"  # injectors and extractors; one case
GPU_ENCODER, GPU_DECODER, DINOV3 = "encoder-800x1333", "decoder-800x1333", "dinov3-*"
DEFORMABLE_DETR = "torch-ms-deform-attn*"  # its kernel, at its own dtype and in fp32
DEFORMOPS = "deformops*"  # by its own choice, and with fp32 sums


@dataclass(frozen=True)
class Target:
    """One thing to reach in every case that it speaks of.

    Attributes:
        cases, which, dtypes: shapes by name, passes, and dtypes, with * as in a shell.
        what: for a person.
        bound: ENOUGH, MORE or MOST.
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
    found: Callable[[Target, Sequence[Measured], str], Iterator[Found]]

    def holds(self, result: Measured) -> bool:
        """Whether the target speaks of this result."""
        return (
            fnmatch.fnmatch(result.case, self.cases)
            and fnmatch.fnmatch(result.which, self.which)
            and fnmatch.fnmatch(result.dtype, self.dtypes)
        )

    def worst(self, results: Sequence[Measured], kind: str = WARM) -> Found | None:
        """What is furthest from the target; None where nothing is about it."""
        choose = max if self.bound == MOST else min
        return choose(self.found(self, results, kind), key=lambda each: each[0], default=None)

    def met(self, value: float) -> bool:
        if self.bound == MORE:
            return value > self.limit
        return value >= self.limit if self.bound == ENOUGH else value <= self.limit

    def show(self, value: float) -> str:
        return f"{value:.2f}{self.unit}"

    @property
    def text(self) -> str:
        return f"{self.bound} {self.limit:g}{self.unit}"


def rows_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a times-<card>.json; the deterministic backward is an implementation of its own."""
    own = {"implementation": DETERMINISTIC.name, "pass": "backward"}
    return [{**row, **(own if row["pass"] == "deterministic" else {})} for row in record["rows"]]


def of_times(record: Mapping[str, Any]) -> list[Measured]:
    """What a times-<card>.json has that targets speak of: the passes, not the backward's parts.

    A ratio is to ours in the same file, which is one run. Memory is that of a training step, and
    stands with the backward.
    """
    rows = rows_of(record)
    peaks = {
        (row["case"], row["dtype"], row["implementation"]): row["mib"]
        for row in rows
        if row["mib"] is not None
    }
    found = []
    for row in rows:
        case, dtype, name, which = (row[k] for k in ("case", "dtype", "implementation", "pass"))
        if which in (*PASSES, BOTH) and row["us"] is not None:
            mib = peaks.get((case, dtype, name)) if which == "backward" else None
            # The shapes of this benchmark have points around their queries alone.
            seconds = {WARM: row["us"] * 1e-6}
            found.append(Measured(case, case, dtype, which, name, seconds, mib=mib))
    ours = {each.key: each for each in found if each.ours}
    return [
        replace(each, ratios={WARM: each.seconds[WARM] / ours[each.key].seconds[WARM]})
        if each.key in ours
        else each
        for each in found
    ]


def _timed(results: Sequence[Measured], name: str) -> dict[tuple[str, str, str], Measured]:
    """Results of one of our implementations by shape, dtype and pass."""
    return {each.key: each for each in results if each.implementation == name and each.seconds}


def _is_among(name: str, rivals: str) -> bool:
    return fnmatch.fnmatch(name, rivals) and is_rival(name)


def _least(several: Iterator[Found]) -> Iterator[Found]:
    """Of each shape, dtype and pass the smallest value: the rival at its best."""
    best: dict[tuple[str, str, str], Found] = {}
    for value, each in several:
        other = best.get(each.key)
        if other is None or value < other[0]:
            best[each.key] = value, each
    yield from best.values()


def faster(cases: str, which: str, rivals: str, limit: float, dtypes: str = "fp32") -> Target:
    """At least this ratio of the time of the fastest of some rivals to ours."""

    def found(target: Target, results: Sequence[Measured], kind: str) -> Iterator[Found]:
        yield from _least(
            (each.ratios[kind], each)
            for each in results
            if _is_among(each.implementation, rivals) and kind in each.ratios and target.holds(each)
        )

    return Target(cases, which, dtypes, rivals.replace("*", ""), ENOUGH, limit, "x", found)


def less_memory(cases: str, which: str, rivals: str, dtypes: str = "*") -> Target:
    """Less peak memory than the most frugal of some rivals."""

    def found(target: Target, results: Sequence[Measured], kind: str) -> Iterator[Found]:
        ours = {each.key: each.mib for each in results if each.ours}

        def several() -> Iterator[Found]:
            for each in results:
                value = ratio(each.mib, ours.get(each.key))
                rival = _is_among(each.implementation, rivals)
                if kind == WARM and rival and value is not None and target.holds(each):
                    yield value, each

        yield from _least(several())

    what = f"{rivals.replace('*', '')}, memory"
    return Target(cases, which, dtypes, what, MORE, 1, "x", found)


def at_most(cases: str, which: str, limit: float, dtypes: str) -> Target:
    """At most so many microseconds on the device."""

    def found(target: Target, results: Sequence[Measured], kind: str) -> Iterator[Found]:
        for each in results:
            if each.ours and kind in each.seconds and target.holds(each):
                yield each.seconds[kind] * 1e6, each

    return Target(cases, which, dtypes, "device time", MOST, limit, " us", found)


def among_ours(
    cases: str, bound: str, limit: float, one: tuple[str, str], other: tuple[str, str], what: str
) -> Target:
    """What one of our passes takes, in times of another one of ours, at any dtype.

    Args:
        cases: shapes by name.
        bound: ENOUGH or MOST.
        limit: how many times.
        one: implementation and pass.
        other: likewise, the unit.
        what: for a person.
    """

    def found(target: Target, results: Sequence[Measured], kind: str) -> Iterator[Found]:
        base = _timed(results, other[0])
        for (shape, dtype, which), each in _timed(results, one[0]).items():
            unit = base.get((shape, dtype, other[1]))
            if which == one[1] and unit is not None and target.holds(each):
                times = ratio(each.seconds.get(kind), unit.seconds.get(kind))
                if times is not None:
                    yield times, each

    return Target(cases, one[1], "*", what, bound, limit, "x", found)


def against_fp32(results: Sequence[Measured], kind: str = WARM) -> list[Found]:
    """How much faster than with fp32 our operator is with 16-bit storage, slowest first."""
    ours = _timed(results, OURS.name)
    pairs = []
    for (shape, dtype, which), each in ours.items():
        base = ours.get((shape, "fp32", which))
        if base is not None and dtype.startswith(("bf16", "fp16")):
            value = ratio(base.seconds.get(kind), each.seconds.get(kind))
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
# The fused operator and the chain of operations that it replaces, as gpu/times.py names them.
FUSED, CHAIN = f"{OURS.name}-fused", f"{OURS.name}-chain"
# With warm caches, in one run. The same for both kinds: what differs between them is memory, which
# decides none of these shapes.
SXM_TARGETS = (
    *(faster(GPU_ENCODER, which, DEFORMABLE_DETR, 3) for which in PASSES),
    *(faster(GPU_ENCODER, which, DEFORMABLE_DETR, 4, "bf16") for which in PASSES),
    *(faster(GPU_ENCODER, which, DEFORMOPS, 1.5, "*") for which in PASSES),
    less_memory(GPU_ENCODER, "backward", DEFORMOPS),
    among_ours(GPU_ENCODER, MOST, 3, BACKWARD, FORWARD, "to our forward"),
    among_ours(
        GPU_ENCODER, MOST, 3, (DETERMINISTIC.name, "backward"), BACKWARD, "deterministic to default"
    ),
    *(
        among_ours(GPU_ENCODER, ENOUGH, 2, (CHAIN, which), (FUSED, which), "unfused to fused")
        for which in ("forward", BOTH)
    ),
    at_most(GPU_DECODER, "forward", 6, "bf16"),
    at_most(GPU_DECODER, "backward", 30, "bf16"),
    *(
        faster(cases, which, DEFORMABLE_DETR, 4, "*")
        for cases in (VIT_ADAPTER, DINOV3)
        for which in PASSES
    ),
    *(
        among_ours("*", MOST, 1.5, (TRITON.name, which), (OURS.name, which), "our Triton to CUDA")
        for which in PASSES
    ),
    NARROW,
)
GPU_TARGETS: Mapping[str, tuple[Target, ...]] = {card.kind: SXM_TARGETS for card in CARDS}
TITLES = {VIT_ADAPTER: "ViT-Adapter", DINOV3: "DINOv3 adapter", "*": "all"}


def targets_of(gpu: str | None) -> tuple[Target, ...]:
    """The targets of a GPU by torch's name for it; of a CPU where that is None."""
    if gpu is None:
        return CPU_TARGETS
    card = card_of(gpu)
    return () if card is None else GPU_TARGETS[card.kind]


def why_none(gpu: str) -> str:
    kinds = " and ".join(card.title for card in CARDS)
    return f"No targets for {gpu}: they are kept for {kinds}"


def as_json(targets: Sequence[Target], results: Sequence[Measured]) -> list[dict[str, Any]]:
    """Every target with the worst result about it; `met` is None where nothing was measured."""
    records = []
    for target in targets:
        warm, cold = target.worst(results), target.worst(results, COLD)
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


def table(targets: Sequence[Target], results: Sequence[Measured]) -> Table:
    """Targets, met or missed, with the case that is furthest from each.

    Times with warm caches decide; with cold ones, measured on a GPU alone, they only stand beside.
    """
    made = Table(title="Targets: >= the other's time to ours, <= ours to the other's", **LOOK)
    columns(made, "shapes", "pass", "dtype", "other", "target", "worst", "cold", "in")
    for target in targets:
        warm, cold = target.worst(results), target.worst(results, COLD)
        made.add_row(
            TITLES.get(target.cases, target.cases),
            target.which,
            target.dtypes if warm is None else warm[1].dtype,
            target.what,
            target.text,
            "not measured" if warm is None else _verdict(target, warm[0]),
            "-" if cold is None else target.show(cold[0]),
            "-" if warm is None else warm[1].case,
        )
    return made


def _verdict(target: Target, value: float) -> str:
    met = "[green]met[/]" if target.met(value) else "[bold red]missed[/]"
    return f"{met} {target.show(value)}"
