# SPDX-License-Identifier: Apache-2.0
"""benchmarks/op/traffic.py and bandwidth.py: bytes counted by hand, and what limits a time."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import children
from benchmarks.op import bandwidth
from benchmarks.op.bandwidth import NotMeasured
from benchmarks.op.traffic import limit, pixels_gathered, plane_bytes, traffic
from op_results import MACHINE, result
from vitadapter_ops.testing import cases


def four_points(dtype):
    """On a map of 2 rows and 3 columns: points with 4, 2, 1 and 0 corners on it; M 1, D 8."""
    pixels = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [2.5, 1.5], [3.5, 0.5]])
    locations = ((pixels + 0.5) / torch.tensor([3.0, 2.0])).view(1, 1, 1, 1, 4, 2)
    weights = torch.ones(1, 1, 1, 1, 4)
    return cases.Inputs(torch.zeros(1, 6, 1, 8), [(2, 3)], locations, weights, None).to(dtype)


def test_only_corners_on_the_map_are_gathered():
    assert pixels_gathered(four_points(torch.float32)) == 7


def test_forward_traffic_by_hand():
    moved = traffic(four_points(torch.float32), "forward")
    assert moved.gathered == 7 * 32
    # Value, 4 points of 3 numbers, output.
    assert moved.least == 6 * 32 + 4 * 3 * 4 + 32
    assert moved.loads(64) == 7
    assert moved.loads(16) == 7 * 2


def test_backward_traffic_by_hand():
    moved = traffic(four_points(torch.bfloat16), "backward")
    # Pixels in bf16 are read; their gradients in fp32 are read and written.
    assert moved.gathered == 7 * (16 + 2 * 32)
    # Of value only the 7 pixels gathered; its gradient; points and their gradients; the output's.
    assert moved.least == min(7, 6) * 16 + 6 * 16 + 2 * 4 * 3 * 2 + 16
    assert moved.loads(16) == 7 * (1 + 2)


def test_result_states_gathered_bytes_per_second():
    moved = traffic(four_points(torch.float32), "forward")
    assert result(seconds=2.0).gb_per_s(moved.gathered) == pytest.approx(7 * 32 / 2 / 1e9)


@pytest.mark.parametrize(
    ("heads", "channels", "factor"),
    # Two lines a pixel. 8 heads: every 16th line, an eighth of the places. 6 heads: every 12th,
    # which takes all multiples of four. One head: no gaps.
    [(8, 32, 8), (6, 32, 2), (1, 32, 1)],
)
def test_plane_with_pixels_apart_takes_more_of_a_cache(heads, channels, factor):
    value = torch.empty(1, 100, heads, channels)
    points = torch.empty(1, 1, heads, 1, 1, 2)
    packed, apart = plane_bytes(cases.Inputs(value, [(10, 10)], points, points[..., 0], None))
    assert packed == 100 * channels * 4
    assert apart == factor * packed


def test_plane_that_the_kernels_copy_is_read_in_fp32():
    value = torch.empty(1, 100, 16, 32, dtype=torch.bfloat16)
    points = torch.empty(1, 25, 16, 1, 4, 2)
    inputs = cases.Inputs(value, [(10, 10)], points, points[..., 0], None)
    assert plane_bytes(inputs) == (100 * 32 * 2, 100 * 32 * 4)


@pytest.mark.parametrize(
    ("gb_per_s", "bound", "served"),
    [(10, "not bandwidth", "L3"), (40, "L3", "L3"), (90, "L2", "L2"), (150, "L1", "L1")],
)
def test_limit_names_the_level_that_served_and_what_bounds(gb_per_s, bound, served):
    moved = dataclasses.replace(result().traffic, pixels=10**9, row=1, sums=0, least=0)
    found = limit(MACHINE, moved, (1 << 19, 1 << 24), 1 / gb_per_s)
    assert (found.packed, found.read) == ("L2", "L3")
    assert (found.served_by, found.bound) == (served, bound)
    assert found.of_nearest == pytest.approx(gb_per_s / 200)


def test_limit_of_a_case_that_saturates_the_bus_is_memory():
    moved = dataclasses.replace(result().traffic, pixels=10**9, row=1, sums=0, least=18 * 10**9)
    assert limit(MACHINE, moved, (1, 1), 1.0).bound == "memory"


def test_cache_sizes_leave_out_instructions(tmp_path):
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert bandwidth.cache_sizes(tmp_path) == [48 * 1024, 2 * 2**20]
    assert bandwidth.cache_sizes(tmp_path / "missing") == []


def test_bandwidths_without_a_compiler_are_not_measured(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(bandwidth, "cache_sizes", lambda: [1 << 15])
    with pytest.raises(NotMeasured, match="no-such-compiler"):
        bandwidth.measure(1)


def test_copy_kernel_copies(tmp_path):
    pytest.importorskip("triton")
    code = (
        "import torch\nfrom benchmarks.op import copy_kernel\n"
        "source = torch.rand(copy_kernel.BLOCK * 5)\n"
        "target = torch.empty_like(source)\n"
        "copy_kernel.copy(target, source, 2, 1)\n"
        "assert torch.equal(source, target)\n"
    )
    where = {"PYTHONPATH": str(children.ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **where}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
