# SPDX-License-Identifier: Apache-2.0
"""What the benchmark commands share: arguments, tables, progress."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
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

import _report

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


@contextmanager
def exit_on(*numbers: signal.Signals) -> Iterator[None]:
    """Lets these signals raise SystemExit, so that what is to be done at the end is done.

    One that is ignored, as nohup has it for SIGHUP, stays so.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    handlers = {number: signal.getsignal(number) for number in numbers}
    before = {
        n: handler for n, handler in handlers.items() if handler not in (None, signal.SIG_IGN)
    }
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def positive(text: str) -> int:
    value = int(text) if text.lstrip("-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def natural(text: str) -> int:
    return 0 if text == "0" else positive(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or with the CUDA that torch finds."""
    from torch.utils.cpp_extension import CUDA_HOME

    beside = None if CUDA_HOME is None else shutil.which(name, path=str(Path(CUDA_HOME) / "bin"))
    return shutil.which(name) or beside


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        help="where to measure: cpu, cuda, or cuda:N (default: the GPU if torch sees one)",
    )
    parser.add_argument(
        "--threads", type=positive, help="CPU threads for torch (default: torch's own choice)"
    )


def device_of(parser: argparse.ArgumentParser, asked: str) -> str:
    """The device that --device means; ends the program where torch has none of that name."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {asked!r}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {asked!r}")
    if device.type == "cuda":
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= seen:
            parser.error(f"--device {asked}: torch {torch.__version__} sees {seen} CUDA GPUs")
    return asked


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
    return _report.without_paths(" ".join(lines[0].split())) if lines else "unknown"
