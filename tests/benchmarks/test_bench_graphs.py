# SPDX-License-Identifier: Apache-2.0
"""benchmarks.common.graphs on a pretended GPU: what is captured, how often, and when not."""

from __future__ import annotations

import contextlib

import pytest
import torch

from benchmarks.common import graphs
from benchmarks.common.graphs import NotCaptured
from benchmarks.common.timing import Case, OutOfMemory, take_turns

DEVICE = torch.device("cuda")


class Graph:
    """A graph whose replay calls again what was called in its capture."""

    recording: list | None = None

    def __init__(self):
        self.calls = []

    def replay(self):
        for call in self.calls:
            call()


@pytest.fixture
def gpu(monkeypatch):
    """Calls run at once; a step may ask whether it is being captured, in Graph.recording."""
    fail = {}

    @contextlib.contextmanager
    def capturing(graph, pool, stream):
        assert stream == "own stream"
        Graph.recording = graph.calls
        try:
            yield
        except RuntimeError:
            if fail:
                raise RuntimeError("the capture was invalidated") from None
            raise
        finally:
            Graph.recording = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "own stream")
    monkeypatch.setattr(graphs, "l2_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(graphs, "time_once", lambda run, device: run() or 1e-4)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **rest: empty(*size, **rest))
    return fail


def counting():
    seen = []

    def step():
        seen.append("captured" if Graph.recording is not None else "eager")
        if Graph.recording is not None:
            Graph.recording.append(lambda: seen.append("replayed"))

    return step, seen


def test_copies_keep_twice_l2_between_two_uses():
    assert graphs.copies(10, 50) == 11
    assert graphs.copies(200, 50) == 2
    assert graphs.copies(0, 50) == 101  # nothing to read: any number does


def test_calls_fill_a_replay_and_cold_ones_take_the_copies_in_turn(gpu):
    steps, seen = zip(*(counting() for _ in range(3)), strict=True)
    made, note = graphs.cases_of(steps, DEVICE, None)
    assert note == ""
    # A tenth of a millisecond each: ten calls, of copies twelve, so that each has as many.
    assert {kind: case.calls for kind, case in made.items()} == {"warm": 10, "cold": 12, "call": 10}
    for each in seen:
        each.clear()
    made["warm"].run()
    assert [each.count("replayed") for each in seen] == [10, 0, 0]
    made["cold"].run()
    assert [each.count("replayed") for each in seen] == [14, 4, 4]
    made["call"].run()
    assert seen[0].count("eager") == 10
    assert (made["warm"].clock, made["call"].clock) == ("device", "host")


def test_every_copy_ran_before_it_is_captured(gpu):
    steps, seen = zip(*(counting() for _ in range(2)), strict=True)
    graphs.cases_of(steps, DEVICE, None)
    assert [each[0] for each in seen] == ["eager", "eager"]


def test_a_step_that_waits_is_timed_eagerly_with_the_first_error_as_note(gpu):
    gpu["capture"] = True

    def waits():
        if Graph.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    made, note = graphs.cases_of([waits, waits], DEVICE, None)
    assert "operation not permitted when stream is capturing" in note
    assert "invalidated" not in note
    assert set(made) == set(graphs.KINDS)
    assert made["cold"].calls == 1
    for case in made.values():
        if case.before is not None:
            case.before()
        case.run()


def test_running_out_of_memory_is_not_taken_for_a_step_that_waits(gpu):
    def greedy():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for gpu["capture"] in (False, True):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            graphs.capture([greedy], 1, DEVICE, None)
        gpu.clear()


def test_an_error_of_ending_the_capture_alone_is_reported(gpu, monkeypatch):
    @contextlib.contextmanager
    def failing(graph, pool, stream):
        yield
        raise RuntimeError("capture has no nodes")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    with pytest.raises(NotCaptured, match="no nodes"):
        graphs.capture([lambda: None], 1, DEVICE, None)


def test_time_of_several_calls_is_recorded_as_of_one():
    import time

    cases = {"ten": Case(lambda: time.sleep(0.02), calls=10)}
    result = take_turns(cases, device=torch.device("cpu"), warmup=0, repeats=1)
    assert not isinstance(result["ten"], OutOfMemory)
    assert 0.002 <= result["ten"].median < 0.02
