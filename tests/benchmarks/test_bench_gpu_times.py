# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/times.py: what is drawn, timed and said, and what one that breaks costs."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.gpu import times
from benchmarks.gpu.decisive import decisive, draw
from benchmarks.gpu.times_shown import Row, losses
from benchmarks.op.implementations import OURS, Implementation
from benchmarks.op.targets import CHAIN, FUSED


def test_decisive_shapes_are_drawn_as_the_benchmark_draws_them():
    for case in decisive(rehearse=False):
        assert case.locations == "local"
    (case, _) = decisive(rehearse=True)
    inputs = draw(case, "bf16_points_fp32", "cpu")
    expected = case.inputs()
    assert inputs.value.shape == expected.value.shape
    assert inputs.value.dtype == torch.bfloat16
    assert inputs.sampling_locations.dtype == torch.float32
    assert inputs.sampling_locations.shape == expected.sampling_locations.shape
    spread = (inputs.sampling_locations.double() - expected.sampling_locations).abs().mean()
    assert spread < 0.6  # around the same positions: noise of two pixels on maps of 4 to 8
    sums = inputs.attention_weights.sum((3, 4))
    torch.testing.assert_close(sums, torch.ones_like(sums))


def row(name, which, us, case="encoder-800x1333", dtype="fp32"):
    return Row(case, dtype, name, which, us)


def test_where_a_rival_wins_is_said_against_the_faster_of_our_kernels():
    rows = [
        row("vitadapter_ops", "forward", 10.0),
        row("vitadapter_ops-triton", "forward", 8.0),
        row("deformops", "forward", 9.0),
        row("vitadapter_ops", "backward", 10.0),
        row("deformops", "backward", 5.0),
        row("grid_sample", "backward", 7.0),
    ]
    said = losses(rows)
    assert said == ["encoder-800x1333, fp32, backward: deformops 0.50x our time"]
    assert losses(rows[:3]) == ["nowhere (1 comparisons)"]
    assert losses(rows[:2]) == ["no rival was timed"]


def test_an_implementation_that_fails_does_not_cost_the_others(monkeypatch):
    def broken(inputs):
        raise RuntimeError("no kernel image is available")

    rival = Implementation("broken", broken, "torch")
    (case, _) = decisive(rehearse=True)
    rows = times.measure_one(case, "fp32", "cpu", rival)
    rows += times.measure_one(case, "fp32", "cpu", OURS)
    named = {(each.implementation, each.which): each for each in rows}
    assert named["vitadapter_ops", "backward"].us > 0
    assert "no kernel image" in named["broken", ""].note
    for part in ("points", "value", "zeros"):
        assert named["vitadapter_ops", part].us > 0
    for name in (FUSED, CHAIN):
        assert named[name, "forward"].us > 0
        assert named[name, "both"].us > 0


def test_an_implementation_that_breaks_the_device_costs_its_own_rows(tmp_path, monkeypatch):
    """It breaks once: the program that begins anew has another process, and leaves it out."""
    out = tmp_path / "times.json"
    breaking = Implementation("breaking", lambda inputs: None, "torch")
    other = Implementation("other", OURS.bind, "torch")
    chosen = [OURS, breaking, other]
    monkeypatch.setattr(times, "present", lambda rehearse: chosen)
    measured = []

    def measure_one(case, dtypes, device, each):
        measured.append(each.name)
        return [Row(case.name, dtypes, each.name, "forward", 1.0)]

    class Begun(Exception):
        pass

    def begin_anew(program, command):
        raise Begun(command)

    monkeypatch.setattr(times, "measure_one", measure_one)
    monkeypatch.setattr(times.graphs, "answers", lambda device: measured[-1] != "breaking")
    monkeypatch.setattr(times.os, "execv", begin_anew)
    with pytest.raises(Begun) as begun:
        times.main(["--rehearse", "--out", str(out)])
    command = begun.value.args[0]
    assert "--resume" in command
    assert times.main(command[3:]) == 0
    assert measured == ["vitadapter_ops", "breaking", "other", *["vitadapter_ops", "other"] * 3]
    found = json.loads(out.read_text())
    assert found["broke"] == ["breaking"]
    assert not found["complete"]
    assert len(found["rows"]) == len(measured)
