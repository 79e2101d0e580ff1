# SPDX-License-Identifier: Apache-2.0
"""benchmarks/common/timing.py: spread, turns, and what becomes of a case that does not fit."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.common.timing import LEAST_ROUNDS, Case, OutOfMemory, Timing, ratio, take_turns
from optional import require_cuda

CPU = torch.device("cpu")
TOO_MUCH = 2**45  # 128 TiB of float32: no machine has it, every allocator refuses it


@pytest.mark.parametrize(
    ("value", "base", "expected"), [(3.0, 2.0, 1.5), (None, 2.0, None), (3.0, None, None)]
)
def test_ratio_is_missing_where_a_number_is(value, base, expected):
    assert ratio(value, base) == expected


def test_ratio_to_zero_is_missing():
    assert ratio(3.0, 0.0) is None


def test_timing_reports_median_and_spread():
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0))
    assert (timing.p20, timing.median, timing.p80) == pytest.approx((1.8, 3.0, 4.2))


def test_cases_take_turns():
    seen: list[str] = []
    cases = {name: Case(lambda name=name: seen.append(name)) for name in "abc"}
    take_turns(cases, device=CPU, warmup=1, repeats=2)
    assert "".join(seen) == "abcabcabc"


def test_warm_up_rounds_are_not_recorded():
    result = take_turns({"a": Case(lambda: None)}, device=CPU, warmup=3, repeats=2)
    assert len(result["a"].seconds) == 2


def test_slow_case_sits_out_once_it_has_had_its_time_and_least_rounds():
    cases = {"slow": Case(lambda: time.sleep(0.02)), "fast": Case(lambda: None)}
    result = take_turns(cases, device=CPU, warmup=0, repeats=9, seconds=0.001)
    assert len(result["slow"].seconds) == LEAST_ROUNDS
    assert len(result["fast"].seconds) == 9


def test_only_run_is_on_the_clock():
    def wait() -> None:
        time.sleep(0.2)

    case = Case(lambda: None, before=wait, after=wait)
    result = take_turns({"a": case}, device=CPU, warmup=0, repeats=1)
    assert result["a"].median < 0.1


def test_case_that_does_not_fit_is_reported_and_left_out():
    attempts: list[int] = []

    def greedy() -> None:
        attempts.append(1)
        torch.empty(TOO_MUCH)

    cases = {"greedy": Case(greedy), "modest": Case(lambda: None)}
    result = take_turns(cases, device=CPU, warmup=1, repeats=2)
    assert isinstance(result["greedy"], OutOfMemory)
    assert len(attempts) == 1
    assert len(result["modest"].seconds) == 2


def test_every_turn_is_reported_as_progress_even_if_skipped():
    steps: list[str] = []
    cases = {"greedy": Case(lambda: torch.empty(TOO_MUCH)), "modest": Case(lambda: None)}
    take_turns(cases, device=CPU, warmup=1, repeats=2, on_step=steps.append)
    assert steps == ["greedy", "modest"] * 3


def test_other_errors_are_not_swallowed():
    def broken() -> None:
        raise RuntimeError("shapes disagree")

    with pytest.raises(RuntimeError, match="shapes disagree"):
        take_turns({"a": Case(broken)}, device=CPU, warmup=0, repeats=1)


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats >= 1"):
        take_turns({"a": Case(lambda: None)}, device=CPU, warmup=0, repeats=0)


@pytest.mark.gpu
def test_gpu_time_includes_the_kernels_not_just_their_launch():
    require_cuda()
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)
    cases = {"large": Case(lambda: matrix @ matrix), "small": Case(lambda: matrix[:64] @ matrix)}
    result = take_turns(cases, device=device, warmup=2, repeats=5)
    assert result["large"].median > 5 * result["small"].median
