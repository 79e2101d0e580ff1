# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host before the kernel runs: checks, dispatch, allocation, launch.

Calls without gradients of a shape so small that its kernel is over before the next call comes, one
after the other without waiting for the device. On a CPU the kernel itself is part of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from rich.table import Table

import cases
import vitadapter_ops
from _command import LOOK, columns
from _timing import Timing

# At most so many microseconds for a call that goes through Triton.
TARGET = 25.0

LEVELS = ((4, 4), (2, 2), (1, 1), (1, 1))
CALLS = 200  # fewer than a device's queue holds: no call waits for it
NOTE = f"Without gradients, median of batches of {CALLS} calls. Target for triton: {TARGET:g} us."


def steps(device: str) -> dict[tuple[str, str], Callable[[], object]]:
    """A call of each operator on each backend that runs on a device."""
    located = cases.Case("host", LEVELS, 1, 1, 8, 32).inputs().to(torch.float32, device)
    fused = cases.OffsetCase("host", LEVELS, (4,) * 4, 1, 1, 8, 32).inputs()
    fused = fused.to(torch.float32, device)
    made: dict[tuple[str, str], Callable[[], object]] = {}
    for backend in vitadapter_ops.available_backends():
        native = backend in ("cpu", "cuda") and backend != torch.device(device).type
        interpreted = backend == "triton" and torch.device(device).type == "cpu"
        if native or interpreted:
            continue
        made["ms_deform_attn", backend] = lambda backend=backend: vitadapter_ops.ms_deform_attn(
            located.value, LEVELS, *located.tensors[1:], backend=backend
        )
        made["ms_deform_attn_from_offsets", backend] = lambda backend=backend: (
            vitadapter_ops.ms_deform_attn_from_offsets(
                fused.value, LEVELS, *fused.tensors[1:], backend=backend
            )
        )
    return made


def measure(device: str, batches: int) -> dict[tuple[str, str], Timing]:
    """Seconds of a call, one sample for each batch; operators and backends take turns."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    made = steps(device)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in made}
    with torch.inference_mode():
        for turn in range(batches + 1):
            for key, step in made.items():
                wait()
                begin = time.perf_counter()
                for _ in range(CALLS):
                    step()
                seconds = (time.perf_counter() - begin) / CALLS
                if turn > 0:  # the first batch compiles
                    samples[key].append(seconds)
    return {key: Timing(tuple(each)) for key, each in samples.items()}


def table(timings: dict[tuple[str, str], Timing]) -> Table:
    result = Table(title="Host time of a call", **LOOK)
    columns(result, "operator", "backend", "[us]", "p20-p80")
    for (op, backend), timing in timings.items():
        low, middle, high = (1e6 * each for each in (timing.p20, timing.median, timing.p80))
        result.add_row(op, backend, f"{middle:.1f}", f"{low:.1f}-{high:.1f}")
    return result
