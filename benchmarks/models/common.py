# SPDX-License-Identifier: Apache-2.0
"""What the commands of this folder share: autocast, the record of a run, and its last words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import vitadapter_ops
from benchmarks.common import report
from benchmarks.common.console import chosen_backend
from vitadapter_ops.testing import cases

DTYPES = ("fp32", "bf16")  # bf16 is autocast


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """fp32 as it is; anything lower through autocast, as it is trained."""
    return torch.autocast(device.type, cases.DTYPES[dtype][0], enabled=dtype != "fp32")


def record_of(device: torch.device, dtypes: Sequence[str], *packages: str) -> dict[str, Any]:
    """Origin of a run and the backends that serve it; `packages` as for `report.versions`."""
    explained = {
        dtype: vitadapter_ops.explain_backend(device=device.type, dtype=cases.DTYPES[dtype][0])
        for dtype in dtypes
    }
    return {
        **report.origin(device, *packages, "vitadapter_ops"),
        "backends": {
            "available": list(vitadapter_ops.available_backends()),
            "ran": {dtype: chosen_backend(text) for dtype, text in explained.items()},
            "explained": {dtype: report.without_paths(text) for dtype, text in explained.items()},
        },
    }


def count_of(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def say(console: Console, *lines: str) -> None:
    """Small print below a table."""
    for line in lines:
        console.print(line, style="dim", highlight=False, markup=False)


def say_written(console: Console, *paths: Path) -> None:
    console.print("Written: " + ", ".join(map(str, paths)), highlight=False, markup=False)
