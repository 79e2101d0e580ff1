# SPDX-License-Identifier: Apache-2.0
"""Other programs, and signals to this one."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


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


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or with the CUDA that torch finds."""
    from torch.utils.cpp_extension import CUDA_HOME

    beside = None if CUDA_HOME is None else shutil.which(name, path=str(Path(CUDA_HOME) / "bin"))
    return shutil.which(name) or beside


def module(name: str) -> tuple[str, ...]:
    """The command that runs a module of `benchmarks`, from the folder of the checkout."""
    return (sys.executable, "-m", f"benchmarks.{name}")
