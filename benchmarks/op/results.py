# SPDX-License-Identifier: Apache-2.0
"""What a run is asked for, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.common.graphs import COLD, WARM
from benchmarks.common.memory import Peak
from benchmarks.common.timing import Timing
from benchmarks.op.bandwidth import Machine
from benchmarks.op.implementations import OURS, Implementation
from benchmarks.op.targets import Measured
from benchmarks.op.traffic import Traffic
from vitadapter_ops.testing import cases

MIB = 2**20


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def label(case: cases.Case) -> str:
    return f"{case.name}, {case.locations}"


def inputs_of(case: cases.Case, dtype: str, device: str) -> cases.Inputs:
    value, points = cases.DTYPES[dtype]
    return cases.drawn(case).to(value, device, points)


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
        return is_gpu(self.device)

    @property
    def warmup(self) -> int:
        return 2 if self.on_gpu else 1


@dataclass(frozen=True)
class Result:
    """What was measured of one implementation in one pass of one case.

    Attributes:
        status: "ok", or why there is no timing.
        timings: by kind (common/graphs.py), on a CPU WARM alone.
        ratios: its time to ours by kind; ours is 1.
        planes: see `traffic.plane_bytes`.
        note: for a person.
    """

    case: cases.Case
    dtype: str
    which: str
    implementation: Implementation
    status: str
    timings: Mapping[str, Timing]
    ratios: Mapping[str, float]
    traffic: Traffic
    planes: tuple[int, int]
    note: str
    peak: Peak | None = None

    @property
    def timing(self) -> Timing | None:
        return self.timings.get(WARM)

    @property
    def ratio(self) -> float | None:
        return self.ratios.get(WARM)

    def seconds(self, kind: str = WARM) -> float | None:
        """The median of one kind of time."""
        timing = self.timings.get(kind)
        return None if timing is None else timing.median

    @property
    def ours(self) -> bool:
        return self.implementation is OURS

    @property
    def measured(self) -> Measured:
        """What targets are held against."""
        return Measured(
            self.case.name,
            label(self.case),
            self.dtype,
            self.which,
            self.implementation.name,
            {kind: timing.median for kind, timing in self.timings.items()},
            self.ratios,
            self.peak_mib,
        )

    @property
    def label(self) -> str:
        return f"{label(self.case)}, {self.dtype}, {self.which}"

    def gb_per_s(self, moved: int, kind: str = WARM) -> float | None:
        seconds = self.seconds(kind)
        return None if seconds is None else moved / seconds / 1e9

    @property
    def peak_mib(self) -> float | None:
        growth = None if self.peak is None else self.peak.growth_bytes
        return None if growth is None else growth / MIB


def gpu_shares(machine: Machine, result: Result) -> dict[str, float | None]:
    """What a result reaches of the measured bandwidths: of L2 when warm, of memory when cold."""
    l2, memory = machine.levels
    gathered = result.gb_per_s(result.traffic.gathered)
    least = result.gb_per_s(result.traffic.least, COLD)
    return {
        "of_l2": None if gathered is None else gathered / l2.gb_per_s,
        "of_memory": None if least is None else least / memory.gb_per_s,
    }
