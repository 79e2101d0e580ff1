# SPDX-License-Identifier: Apache-2.0
"""Time several cases in one process, taking turns, so that noise hits all of them alike.

A machine drifts while it is measured: clocks fall, a neighbour starts a job. Timing case A to
the end before case B would book that drift on B. Here every round runs A, B, C, ... once, and
what is reported are medians over rounds. torch.utils.benchmark.Timer measures each to its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.common.memory import first_line, is_out_of_memory

Key = TypeVar("Key")

# Rounds that a case gets however slow it is: fewer have no median worth the name.
LEAST_ROUNDS = 3


def ratio(value: float | None, base: float | None) -> float | None:
    """value / base, or None where one of them is missing or base is zero."""
    return None if value is None or not base else value / base


@dataclass(frozen=True)
class Timing:
    """What one case took, in seconds, one sample per round."""

    seconds: tuple[float, ...]

    @property
    def p20(self) -> float:
        return float(np.quantile(self.seconds, 0.2))

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p80(self) -> float:
        return float(np.quantile(self.seconds, 0.8))

    def as_json(self) -> dict[str, Any]:
        return {
            "median_s": self.median,
            "p20_s": self.p20,
            "p80_s": self.p80,
            "samples_s": list(self.seconds),
        }


@dataclass(frozen=True)
class OutOfMemory:
    """A case that did not fit; it is left out of all later rounds."""

    detail: str


@dataclass(frozen=True)
class Case:
    """One thing to time: `run` is on the clock, `before` and `after` are not.

    Attributes:
        calls: how many calls `run` makes; what is recorded is the time of one.
        clock: see `time_once`.
    """

    run: Callable[[], object]
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    calls: int = 1
    clock: str = "device"


def time_once(run: Callable[[], object], device: torch.device, clock: str = "device") -> float:
    """Seconds for one run of `run`.

    Args:
        run: what to time.
        device: where its work is done.
        clock: on a GPU, "device" for the time between two of its events, or "host" for the wall
            clock from an idle device to an idle device. Elsewhere always the wall clock.
    """
    if device.type == "cuda" and clock == "host":
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        return time.perf_counter() - begin
    if device.type == "cuda":
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        stream = torch.cuda.current_stream(device)
        start.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def take_turns(
    cases: Mapping[Key, Case],
    *,
    device: torch.device,
    warmup: int,
    repeats: int,
    seconds: float | None = None,
    on_step: Callable[[Key], object] = lambda key: None,
) -> dict[Key, Timing | OutOfMemory]:
    """Run every case once per round: `warmup` rounds unrecorded, then `repeats` recorded.

    Args:
        cases: what to time, in the order of a round.
        device: decides the clock.
        warmup: rounds thrown away; they pay for caches, code generation and first allocations.
        repeats: rounds kept, at least one.
        seconds: a case that has been on the clock this long sits out the other rounds, once it has
            had LEAST_ROUNDS; None: every case runs in all rounds.
        on_step: called with a case's key whenever one of its turns is over, also when the turn
            is skipped because the case ran out of memory or of time earlier.

    Returns:
        A Timing per case, or OutOfMemory for a case that did not fit. Other errors are raised.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"expected repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    samples: dict[Key, list[float]] = {key: [] for key in cases}
    spent = dict.fromkeys(cases, 0.0)
    failed: dict[Key, OutOfMemory] = {}

    def had_enough(key: Key) -> bool:
        return seconds is not None and (len(samples[key]) >= LEAST_ROUNDS and spent[key] >= seconds)

    for turn in range(warmup + repeats):
        for key, case in cases.items():
            if key not in failed and not had_enough(key):
                try:
                    if case.before is not None:
                        case.before()
                    sample = time_once(case.run, device, case.clock)
                    if turn >= warmup:
                        samples[key].append(sample / case.calls)
                        spent[key] += sample
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    failed[key] = OutOfMemory(first_line(error))
                # The error, and with it the frames that hold tensors, is gone by now.
                if case.after is not None:
                    case.after()
                if key in failed and device.type == "cuda":
                    torch.cuda.empty_cache()
            on_step(key)
    return {key: failed.get(key) or Timing(tuple(samples[key])) for key in cases}
