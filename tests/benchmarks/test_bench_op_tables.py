# SPDX-License-Identifier: Apache-2.0
"""benchmarks/op/tables.py: what is said of the results, in tables that fit into a terminal."""

from __future__ import annotations

import dataclasses

from benchmarks.common.console import wide_console
from benchmarks.common.memory import Peak
from benchmarks.common.timing import Timing
from benchmarks.op import tables, targets
from op_results import GPU, MACHINE, gpu_result, judged, line_of, result, shown


def test_losses_are_named_worst_first():
    results = [
        result(ratios={"warm": 0.9}),
        result(ratios={"warm": 0.5}, which="backward"),
        result(ratios={"warm": 1.5}),
        result(name="vitadapter_ops", ratios={"warm": 1.0}),
    ]
    assert tables.losses(results) == [
        "injector-S-512, uniform, fp32, backward: grid_sample 0.50x",
        "injector-S-512, uniform, fp32, forward: grid_sample 0.90x",
    ]
    assert tables.losses(results[2:]) == ["nowhere in this run (1 comparisons)"]
    assert tables.losses(results[3:]) == ["no rival was timed"]


def test_tables_fit_into_120_columns():
    long = {"case": "extractor-L-1024", "which": "backward", "dtype": "bf16_points_fp32"}
    results = [
        result(**{**long, "name": name, "seconds": 12.345, "peak": Peak("ok", 1 << 30)})
        for name in ("vitadapter_ops", "grid_sample-compiled")
    ]
    results.append(result(long["case"], "backward", "vitadapter_ops"))
    for table in (
        tables.case_table(results),
        tables.limits_table(MACHINE, results),
        targets.table(targets.CPU_TARGETS, judged(results)),
        targets.table(targets.GPU_TARGETS["H200"], judged(results)),
        tables.gpu_case_table(
            [dataclasses.replace(each, timings={"warm": Timing((0.0123,))}) for each in results]
        ),
        tables.gpu_limits_table(GPU, results),
    ):
        assert "…" not in shown(table)


def test_a_card_without_targets_is_named(capsys):
    results = [gpu_result("encoder-800x1333", "forward", "vitadapter_ops", 10)]
    tables.show_verdict(wide_console(), "NVIDIA A100-SXM4-80GB", results)
    line = line_of(capsys.readouterr().out, "No targets for NVIDIA A100-SXM4-80GB")
    assert line.endswith("they are kept for H100 80 GB and H200")
