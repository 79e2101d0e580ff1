# SPDX-License-Identifier: Apache-2.0
"""What a run keeps: a CSV to which every run appends its rows, and all of the last run as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from benchmarks.common.console import chosen_backend
from benchmarks.common.graphs import CALL, COLD
from benchmarks.common.timing import Timing
from benchmarks.op import targets
from benchmarks.op.bandwidth import Machine
from benchmarks.op.results import Result, Settings, gpu_shares, is_gpu
from benchmarks.op.tables import losses
from vitadapter_ops import explain_backend
from vitadapter_ops.testing.cases import DTYPES

SHARED = (  # by all rows of a run
    *("date", "commit", "uncommitted_changes", "cpu", "gpu", "cores", "threads", "os"),
    *("python", "torch", "cuda"),
)
FIELDS = (
    *SHARED,
    *("backend", "device", "case", "locations", "dtype"),
    *("batch", "queries", "heads", "channels", "levels", "points", "pass"),
    *("implementation", "version", "status", "rounds", "p20_ms", "p50_ms", "p80_ms", "ratio"),
    *("gathered_gb_per_s", "least_gb_per_s", "peak_mib", "note"),
)
GPU_FIELDS = (
    *FIELDS,
    *(f"{kind}_{what}" for kind in (COLD, CALL) for what in ("p20_ms", "p50_ms", "p80_ms")),
    *("cold_ratio", "call_ratio", "of_l2", "of_memory"),
)


def fields_of(device: str) -> tuple[str, ...]:
    return GPU_FIELDS if is_gpu(device) else FIELDS


def record_of(settings: Settings) -> dict[str, Any]:
    """What every row shares."""
    device = torch.device(settings.device)
    ran = {
        dtype: chosen_backend(explain_backend(device, DTYPES[dtype][0]))
        for dtype in settings.dtypes
    }
    return {**report.origin(device, "vitadapter_ops"), "backends": {"ran": ran}}


def gpu_of(record: Mapping[str, Any]) -> str | None:
    """The name of the GPU that a run was on."""
    gpu = record["machine"]["gpu"]
    return None if gpu is None else str(gpu["name"])


def row_of(
    record: Mapping[str, Any], device: str, result: Result, machine: Machine | None
) -> dict[str, Any]:
    """A result with what is known of its run, by `fields_of`."""
    case, timing, host = result.case, result.timing, record["machine"]
    row = {
        "date": record["date"],
        **record["git"],
        **{name: host[name] for name in ("cpu", "cores", "threads", "os")},
        "gpu": gpu_of(record),
        **{name: record["versions"][name] for name in ("python", "torch", "cuda")},
        "backend": record["backends"]["ran"][result.dtype] if result.ours else None,
        "device": device,
        "case": case.name,
        "locations": case.locations,
        "dtype": result.dtype,
        "batch": case.batch,
        "queries": case.queries,
        "heads": case.heads,
        "channels": case.channels,
        "levels": len(case.shapes),
        "points": case.points,
        "pass": result.which,
        "implementation": result.implementation.name,
        "version": result.implementation.version,
        "status": result.status,
        "peak_mib": result.peak_mib,
        "ratio": result.ratio,
        "gathered_gb_per_s": result.gb_per_s(result.traffic.gathered),
        "least_gb_per_s": result.gb_per_s(result.traffic.least),
        "note": result.note,
    }
    row |= _milliseconds("", timing)
    row["rounds"] = None if timing is None else len(timing.seconds)
    if is_gpu(device):
        for kind in (COLD, CALL):
            row |= _milliseconds(f"{kind}_", result.timings.get(kind))
            row[f"{kind}_ratio"] = result.ratios.get(kind)
        if machine is not None:
            row |= gpu_shares(machine, result)
    return row


def _milliseconds(prefix: str, timing: Timing | None) -> dict[str, float]:
    if timing is None:
        return {}
    figures = {"p20": timing.p20, "p50": timing.median, "p80": timing.p80}
    return {f"{prefix}{name}_ms": 1e3 * seconds for name, seconds in figures.items()}


@dataclass
class Files:
    """The files of one run, in `folder`, and what is in them so far."""

    folder: Path
    settings: Settings
    record: Mapping[str, Any]
    machine: Machine | None = None
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.csv = report.result_file(self.folder, "op", self.settings.device, "csv")
        self.json = report.result_file(self.folder, "op", self.settings.device)

    def rows(self, results: Sequence[Result]) -> list[dict[str, Any]]:
        device = self.settings.device
        return [row_of(self.record, device, each, self.machine) for each in results]

    def add(self, results: Sequence[Result]) -> None:
        """Keeps the results of one more case, should the run be ended."""
        self.results.extend(results)
        report.append_csv(self.csv, fields_of(self.settings.device), self.rows(results))
        self.write_json()

    def write_json(self, left_out: Sequence[str] = ()) -> None:
        """Everything that the run found out."""
        rows = self.rows(self.results)
        goals = targets.targets_of(gpu_of(self.record))
        report.write_json(
            self.json,
            {
                "schema": 1,
                "benchmark": "op",
                **self.record,
                "rounds": self.settings.rounds,
                "bandwidth": None if self.machine is None else asdict(self.machine),
                "results": [{k: v for k, v in row.items() if k not in SHARED} for row in rows],
                "targets": targets.as_json(goals, [each.measured for each in self.results]),
                "losses": losses(self.results),
                "left_out": list(left_out),
            },
        )
