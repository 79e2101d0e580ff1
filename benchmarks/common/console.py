# SPDX-License-Identifier: Apache-2.0
"""What the benchmark commands print: tables for a terminal of 100 columns, progress."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.common import report
from benchmarks.common.packages import named_if_missing

with named_if_missing("`pip install '.[bench]'` in the checkout installs what benchmarks need."):
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from rich.text import Text

# Everything that saves columns: the tables are to fit into a terminal of 100.
LOOK: dict[str, Any] = {
    "box": SIMPLE_HEAD,
    "collapse_padding": True,
    "pad_edge": False,
    "show_edge": False,
    "title_justify": "left",
    "title_style": "bold",
}


def columns(table: Table, *headers: str) -> None:
    for number, header in enumerate(headers):
        # As Text: in a string rich would take [ms] for a style.
        table.add_column(Text(header), justify="right" if number else "left", no_wrap=True)


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def span(timing: dict[str, Any], unit: str) -> str:
    """Median and spread with three digits, more or less."""
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    median = timing["median_s"] * scale
    enough = (10, 0) if unit == "s" else (100, 10, 1)
    digits = (1 if unit == "s" else 0) + sum(median < limit for limit in enough)
    low, high = timing["p20_s"] * scale, timing["p80_s"] * scale
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def wide_console() -> Console:
    """Without a terminal rich assumes 80 columns, which would cut the tables."""
    return Console(width=None if sys.stdout.isatty() else 120)


def progress_on(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("about"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )


def chosen_backend(explanation: str) -> str:
    """The line of an explanation that names the backend in use."""
    lines = [line for line in explanation.splitlines() if "chosen by auto" in line]
    return report.without_paths(" ".join(lines[0].split())) if lines else "unknown"
