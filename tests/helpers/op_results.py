# SPDX-License-Identifier: Apache-2.0
"""What a run of benchmarks/op would have measured, and how it reads."""

from __future__ import annotations

import dataclasses
import io

import torch
from rich.console import Console

from benchmarks.common.timing import Timing
from benchmarks.op.bandwidth import Level, Machine
from benchmarks.op.implementations import Implementation, named
from benchmarks.op.results import Result
from benchmarks.op.traffic import plane_bytes, traffic
from vitadapter_ops.testing import cases

TINY = cases.Case("tiny", ((6, 8), (3, 4)), 1, 48, 2, 8, grids=((6, 8),))
MACHINE = Machine(
    (
        Level("L1", 1 << 15, 200.0),
        Level("L2", 1 << 20, 100.0),
        Level("L3", 1 << 25, 50.0),
        Level("memory", None, 20.0),
    ),
    64,
)
GPU = Machine((Level("L2", 50 << 20, 5000.0), Level("memory", None, 3000.0)), 16)


def rival(name, function, module="torch"):
    """A rival that computes `function(value, shapes, locations, weights)`."""

    def bind(inputs):
        return lambda value, *points: function(value, inputs.spatial_shapes, *points)

    return Implementation(name, bind, module)


def result(case="injector-S-512", which="forward", name="grid_sample", seconds=1.0, **changes):
    """A result as a run would have it, ours taking one second."""
    inputs = TINY.inputs(dtype=torch.float32)
    values = {
        "case": dataclasses.replace(TINY, name=case),
        "dtype": "fp32",
        "which": which,
        "implementation": named(name),
        "status": "ok",
        "timings": {"warm": Timing((seconds,))},
        "ratios": {"warm": seconds},
        "traffic": traffic(inputs, which),
        "planes": plane_bytes(inputs),
        "note": "",
    }
    return Result(**{**values, **changes})


def shown(table):
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    return stream.getvalue()


def judged(results):
    return [each.measured for each in results]


def line_of(text, *words):
    (line,) = [each for each in text.splitlines() if all(word in each for word in words)]
    return line


def gpu_result(case, which, name, micros, *, dtype="fp32", cold=None):
    """A result on a GPU, ours taking 10 microseconds warm and 20 cold."""
    cold = 2 * micros if cold is None else cold
    taken = {"warm": micros, "cold": cold, "call": 3 * micros}
    return result(
        case,
        which,
        name,
        dtype=dtype,
        timings={kind: Timing((each * 1e-6,)) for kind, each in taken.items()},
        ratios={"warm": micros / 10, "cold": cold / 20, "call": micros / 10},
    )
