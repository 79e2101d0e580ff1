# SPDX-License-Identifier: Apache-2.0
"""benchmarks.models.adapter_vs_vit: end to end on a tiny image, and its refusals."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.common.memory import Peak
from benchmarks.models import adapter_vs_vit as bench

TINY = ["--device", "cpu", "--cases", "tiny", "--pixels", "64", "--rounds", "1", "--warmup", "0"]
TINY += ["--threads", "1"]


@pytest.fixture(autouse=True)
def _threads(threads):
    """The benchmark sets their number."""


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(bench, "GATE_PIXELS", 64)


def test_prints_plain_adapter_ratio_floor_memory_and_profile(fast, tmp_path, capsys, monkeypatch):
    made_up = Peak("ok", 77 * 2**20)
    monkeypatch.setattr(bench, "peak_in_child", lambda *args, **kwargs: made_up)
    assert bench.main([*TINY, "--dtype", "fp32", "--profile", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for header in ("plain ms", "adapter ms", "FPS ratio", "/floor", "adapter MiB"):
        assert header in shown
    (row,) = [line for line in shown.splitlines() if line.startswith("ViT-T")]
    assert row.split()[-2:] == ["77", "77"]
    assert "ms_deform_attn" in shown
    assert "own time" in shown


def test_json_holds_every_time_and_peak(fast, tmp_path):
    assert bench.main([*TINY, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "model-cpu.json").read_text())
    rows = {(row["model"], row["dtype"], row["compiled"]) for row in record["speed"]}
    models = ("vit_tiny", "vit_adapter_tiny")
    assert rows == {(m, p, False) for m in models for p in ("fp32", "bf16")}
    assert all(row["median_s"] > 0 for row in record["speed"])
    assert {row["status"] for row in record["peak_memory"]} == {"ok"}
    assert record["settings"]["pixels"] == 64


def test_wrong_maps_are_not_timed(fast, tmp_path, capsys, monkeypatch):
    right = bench.build

    def wrong(size, kind, device, dtype=torch.float32):
        model = right(size, kind, device, dtype)
        if dtype == torch.float32:
            torch.nn.init.zeros_(model.norm1.weight)
        return model

    monkeypatch.setattr(bench, "build", wrong)
    monkeypatch.setattr(bench, "measure", lambda *args: pytest.fail("timed"))
    assert bench.main([*TINY, "--dtype", "fp32", "--out", str(tmp_path)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Not timed, because the results are wrong: vit_tiny, fp32: map 1 is off by" in said
    assert not list(tmp_path.iterdir())


def test_cases_are_patterns_and_leave_out_the_large_model_unless_named():
    assert bench.parse([])[1].cases == ("tiny", "small", "base")
    assert bench.parse(["--cases", "*"])[1].cases == ("tiny", "small", "base", "large")


def test_floor_is_the_full_count_at_the_rate(fast):
    _, settings = bench.parse([*TINY, "--dtype", "fp32", "--no-memory"])
    key = ("tiny", "fp32", False)
    timings = {(*key, kind): bench.Timing((0.2,)) for kind in bench.KINDS}
    table = bench.table_of(settings, timings, {"fp32": 1e9}, {})
    cells = [next(iter(column.cells)) for column in table.columns]
    flops = bench.counting.count(bench.build_on_meta("tiny"), (64, 64)).full
    assert cells[6] == f"{flops / 1e6:.1f}"
    assert cells[7] == bench.times(0.2 / (flops / 1e9))
    assert cells[4:6] == ["1.00x", "1.00x"]


def test_matrix_products_have_a_rate():
    assert bench.matmul_rate("cpu", "fp32", seconds=0.01) > 1e8
