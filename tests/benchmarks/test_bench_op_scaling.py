# SPDX-License-Identifier: Apache-2.0
"""benchmarks/op/scaling.py: one thing is varied at a time, and linear cost is 1."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.common.timing import Timing
from benchmarks.op import scaling
from op_results import TINY


def test_scaling_varies_one_thing_at_a_time():
    several = scaling.variants(TINY, threads=2, cores=6)
    amounts = {}
    for each in several:
        amounts.setdefault(each.axis, []).append(each.amount)
    assert amounts == {
        "queries": [48, 96, 192],
        "images": [1, 2, 4],
        "threads, one head": [1, 2, 4, 6],
    }
    assert several[2].case == dataclasses.replace(TINY, queries=192)
    assert several[5].case == dataclasses.replace(TINY, batch=4)
    assert (several[9].case, several[9].threads) == (dataclasses.replace(TINY, heads=1), 6)


def test_linear_cost_is_one_on_every_axis():
    def seconds(variant):
        if variant.axis.startswith("threads"):
            return 1.0 / variant.amount
        return 0.1 * variant.amount

    timings = {(each, "forward"): Timing((seconds(each),)) for each in scaling.variants(TINY, 1, 2)}
    for axis in ("queries", "images", "threads, one head"):
        assert [each for _, each in scaling.cost(timings, axis, "forward")] == pytest.approx(
            [1.0] * (2 if axis.startswith("threads") else 3)
        )
