# SPDX-License-Identifier: Apache-2.0
"""benchmarks/op/files.py: what a run on a GPU keeps, and the published columns."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks.common import report
from benchmarks.op import cli, files
from benchmarks.op.targets import targets_of
from op_results import GPU, gpu_result


def test_rows_of_a_gpu_state_all_three_times_and_shares_of_the_bandwidths(tmp_path):
    each = gpu_result("encoder-800x1333", "forward", "vitadapter_ops", 10)
    settings = cli.settings_of(cli.parse(["--device", "cpu"]))
    record = files.record_of(settings)
    record["machine"]["gpu"] = {"name": "NVIDIA H200"}
    row = files.row_of(record, "cuda", each, GPU)
    assert set(row) <= set(files.GPU_FIELDS)
    assert [row[f"{kind}p50_ms"] for kind in ("", "cold_", "call_")] == pytest.approx(
        [0.01, 0.02, 0.03]
    )
    assert row["of_l2"] == pytest.approx(each.traffic.gathered / 10e-6 / 5e12)
    assert row["of_memory"] == pytest.approx(each.traffic.least / 20e-6 / 3e12)
    assert not set(files.row_of(record, "cpu", each, None)) & {"cold_p50_ms", "of_l2"}
    settings = dataclasses.replace(settings, device="cuda")
    files.Files(tmp_path, settings, record, GPU, [each]).write_json(["decoder"])
    written = json.loads((tmp_path / "op-cuda.json").read_text())
    assert written["results"][0]["cold_p50_ms"] == pytest.approx(0.02)
    assert written["bandwidth"]["levels"][0]["gb_per_s"] == 5000
    assert written["left_out"] == ["decoder"]
    assert len(written["targets"]) == len(targets_of("NVIDIA H200"))


def test_published_rows_have_the_columns_of_this_version():
    report.check_csv(report.RESULTS / "op-cpu.csv", files.FIELDS)
