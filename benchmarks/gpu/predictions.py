# SPDX-License-Identifier: Apache-2.0
"""Times that the CUDA kernels should take on a GPU, computed from shapes, counts and rates.

    python -m benchmarks.gpu.predictions        # rewrites benchmarks/gpu/predictions.json

A kernel takes as long as what it is bound by: issue slots, bytes from L1, L2 or memory, reductions
in L2, or the chain of dependent instructions and loads of each warp. Instructions are counted in
the machine code of sm_90, pixels by locality.py around their queries; rates are a data sheet's or
guesses, and say so in BASIS. Every kernel costs the gap to the one before it in a CUDA graph on
top, and caches are warm. table.py puts what was measured beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.common.cards import CARDS, Card
from vitadapter_ops.testing import cases

FILE = Path(__file__).with_suffix(".json")

SIZES = {"fp32": 4, "bf16": 2}
SUM = 4  # bytes of an element of grad_value while it is summed
# Of our backward: gathers and dot products without gradient of value; that gradient alone; what
# comes before and after it.
BACKWARD_PARTS = ("points", "value", "zeros", "cast")
PARTS = ("forward", "backward", *BACKWARD_PARTS, "deterministic")

# --- a multiprocessor -----------------------------------------------------------------------------

MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.9e9
ISSUED = MULTIPROCESSORS * SCHEDULERS * CLOCK  # warp instructions per second
L1 = MULTIPROCESSORS * 128 * CLOCK  # bytes per second
# Guesses, in bytes per second: of L2 to L1, and of fp32 sums in L2.
L2, REDUCTIONS = 5.5e12, 2.5e12
# Of the issue slots and of L1 a good kernel reaches this much, of the memory's data sheet that.
REACHED, MEMORY_REACHED = 0.8, 0.9
# Of the 50 MB of L2, what is found there when it is used again.
L2_HOLDS = 40 << 20
GAP = 1.5e-6  # from one kernel of a graph to the next, with its launch and its last block
# Of a load from L2 while others load, and cycles from an instruction to the next of the same warp.
LOAD, STEP = 0.25e-6, 2.5
WARPS = {"forward": 24, "backward": 16}  # of a multiprocessor, by registers

BASIS = {
    "issue": "instructions counted in sm_90 machine code, 132 multiprocessors at 1.9 GHz, 80% of "
    "the issue slots",
    "L1": "gathered bytes from L1 at 80% of 128 B per clock and multiprocessor",
    "L2": "bytes that are new to a block (locality.py) from L2 at 5.5 TB/s, a guess",
    "reductions": "a reduction for each gathered pixel, L2 summing 2.5 TB/s, a guess",
    "memory": "bytes moved at least, where they are more than L2 keeps, at 90% of the data sheet's "
    "3.35 TB/s (H100) or 4.8 TB/s (H200)",
    "latency": "a warp's dependent instructions and loads from L2 of 0.25 us, a guess, in as many "
    "waves as it takes",
    "gap": "the gap of 1.5 us to the kernel before",
}


# --- the kernels, by their machine code -----------------------------------------------------------


@dataclass(frozen=True)
class Loops:
    """Instructions of a warp in the loop over points; a row has `lanes` lanes.

    Attributes:
        lanes: of one row.
        forward: for two points.
        backward: for one point.
        points, value: the same without the reductions, or with nothing else.
    """

    lanes: int
    forward: int
    backward: int
    points: int
    value: int


LOOPS = {
    ("fp32", 32): Loops(8, 57, 128, 84, 80),
    ("bf16", 32): Loops(4, 154, 230, 166, 130),
    ("fp32", 12): Loops(4, 57, 128, 84, 80),
    ("bf16", 12): Loops(4, 90, 160, 110, 90),
}
# Outside of it: once for each warp, and for each pass over points that places two a lane, where
# they are of several levels and of one.
ONCE = {"forward": 180, "backward": 280}
PLACING = {"forward": (300, 162), "backward": (400, 233)}
# Of the reductions for gathered pixels, those that leave a block.
REDUCED = 1.0


# --- the shapes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """What locality.py counts: corners on the map, and how many of those are new to a block."""

    inside: float
    new: Mapping[str, float]


# By how much a result is waited for.
DECISIVE = {
    "encoder-800x1333": Pixels(0.907, {"fp32": 0.233, "bf16": 0.164}),
    "decoder-800x1333": Pixels(0.911, {"fp32": 0.760, "bf16": 0.681}),
    "injector-B-512-x2": Pixels(0.885, {"fp32": 0.286, "bf16": 0.218}),
    "extractor-B-512-x2": Pixels(0.901, {"fp32": 0.216, "bf16": 0.144}),
    "dinov3-L-896": Pixels(0.942, {"fp32": 0.223, "bf16": 0.151}),
    "dinov3-S-896": Pixels(0.943, {"fp32": 0.151, "bf16": 0.151}),
}


@dataclass(frozen=True)
class Work:
    """One shape at one dtype, in the units of the rates."""

    case: cases.Case
    dtype: str

    @property
    def size(self) -> int:
        return SIZES[self.dtype]

    @property
    def loops(self) -> Loops:
        return LOOPS[self.dtype, self.case.channels]

    @property
    def taken(self) -> int:
        """Points of a row."""
        return len(self.case.shapes) * self.case.points

    @property
    def rows(self) -> int:
        return self.case.batch * self.case.queries * self.case.heads

    @property
    def warps(self) -> int:
        return math.ceil(self.rows * self.loops.lanes / 32)

    @property
    def corners(self) -> float:
        """Pixels gathered, those beside the map included: another one is read in their place."""
        return 4.0 * self.rows * self.taken

    @property
    def value(self) -> int:
        """Elements of value."""
        pixels = sum(height * width for height, width in self.case.shapes)
        return self.case.batch * pixels * self.case.heads * self.case.channels

    @property
    def points(self) -> int:
        """Bytes of locations and weights."""
        return self.rows * self.taken * 3 * self.size

    @property
    def out(self) -> int:
        return self.rows * self.case.channels * self.size

    @property
    def touched(self) -> float:
        """Elements of value that some corner lies on, were the corners anywhere."""
        pixels = self.value / self.case.channels
        hits = self.corners * DECISIVE[self.case.name].inside
        return self.value * -math.expm1(-hits / pixels)

    def instructions(self, which: str, loop: float) -> float:
        """Of one warp; `loop` are those for one point."""
        passes = math.ceil(self.taken / (2 * self.loops.lanes))
        placing = PLACING[which][len(self.case.shapes) == 1]
        return ONCE[which] + passes * placing + self.taken * loop

    def chain(self, which: str, loop: float, loads: float) -> float:
        """Seconds of all waves of warps, each one dependent instruction or load after the other."""
        waves = max(1.0, self.warps / (MULTIPROCESSORS * WARPS[which]))
        one = self.instructions(which, loop) * STEP / CLOCK + loads * LOAD
        return waves * one


Bounds = dict[str, float]  # seconds by key of BASIS


def gather(work: Work, which: str, loop: float) -> Bounds:
    """What reading the corners costs, with `loop` instructions for one point."""
    pixels = DECISIVE[work.case.name]
    bytes_read = work.corners * work.case.channels * work.size
    steps = work.taken / (2 if which == "forward" else 1)
    return {
        "issue": work.warps * work.instructions(which, loop) / ISSUED / REACHED,
        "L1": bytes_read / L1 / REACHED,
        "L2": bytes_read * pixels.inside * pixels.new[work.dtype] / L2,
        "latency": work.chain(which, loop, 1 + steps),
    }


def memory(card: Card, size: float) -> Bounds:
    """What moving bytes costs that L2 does not keep from one call to the next."""
    return {"memory": size / (card.memory * MEMORY_REACHED)} if size > L2_HOLDS else {}


def forward(work: Work, card: Card) -> Bounds:
    found = gather(work, "forward", work.loops.forward / 2)
    return {**found, **memory(card, work.touched * work.size + work.points + work.out)}


def sums(work: Work, element: int) -> Bounds:
    """Reductions into sums of this many bytes each."""
    hits = work.corners * DECISIVE[work.case.name].inside * REDUCED
    return {"reductions": hits * work.case.channels * element / REDUCTIONS}


def main_backward(work: Work, card: Card, element: int = SUM) -> Bounds:
    """The kernel that makes all gradients."""
    found = {**gather(work, "backward", work.loops.backward), **sums(work, element)}
    moved = work.touched * (work.size + 2 * element) + 2 * work.points + work.out
    return {**found, **memory(card, moved)}


def streamed(card: Card, size: float) -> Bounds:
    """A kernel that reads and writes `size` bytes in order."""
    return memory(card, size) or {"L2": size / L2}


def kernels(work: Work, card: Card, part: str) -> list[Bounds]:
    """The kernels of a part, each with what bounds it; none where nothing is to be done."""
    held = work.value * SUM
    zeros = [streamed(card, held)]
    cast = [streamed(card, held + work.value * work.size)] if work.size != SUM else []
    if part == "forward":
        return [forward(work, card)]
    if part == "zeros":
        return zeros
    if part == "cast":
        return cast
    if part == "points":
        moved = work.touched * work.size + 2 * work.points + work.out
        return [{**gather(work, "backward", work.loops.points), **memory(card, moved)}]
    if part == "value":
        # Reads grad_out and points alone.
        count = work.instructions("backward", work.loops.value)
        issue = work.warps * count / ISSUED / REACHED
        latency = work.chain("backward", work.loops.value, 2)
        return [*zeros, {"issue": issue, "latency": latency, **sums(work, SUM)}, *cast]
    if part == "backward":
        return [*zeros, main_backward(work, card), *cast]
    # Deterministic: the largest terms first, sums of 8 bytes, and from them the gradient.
    wide = work.value * 8
    largest = streamed(card, work.out + work.points / 3)
    last = streamed(card, wide + work.value * work.size)
    return [largest, streamed(card, wide), main_backward(work, card, 8), last]


def predict(work: Work, card: Card, part: str) -> tuple[float, str] | None:
    """Seconds, and the key of BASIS that decides; None where the part does not exist."""
    slowest = [max(each.items(), key=lambda pair: pair[1]) for each in kernels(work, card, part)]
    if not slowest:
        return None
    basis, most = max(slowest, key=lambda pair: pair[1])
    return sum(taken + GAP for _, taken in slowest), basis if most > GAP else "gap"


def record() -> dict[str, Any]:
    """All that predictions.json holds."""
    rows = []
    by_name = {case.name: case for case in cases.GPU_BENCH}
    for card in CARDS:
        for name in DECISIVE:
            for dtype in SIZES:
                for part in PARTS:
                    found = predict(Work(by_name[name], dtype), card, part)
                    if found is not None:
                        row = {"card": card.kind, "case": name, "dtype": dtype, "part": part}
                        rows.append({**row, "us": round(found[0] * 1e6, 1), "basis": found[1]})
    return {"schema": 1, "benchmark": "gpu-predictions", "basis": BASIS, "rows": rows}


if __name__ == "__main__":
    report.write_json(FILE, record())
