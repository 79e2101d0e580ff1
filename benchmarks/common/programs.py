# SPDX-License-Identifier: Apache-2.0
"""Other programs, and signals to this one."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
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

    with _handled_by(leave, numbers):
        yield


@contextmanager
def noted(*numbers: signal.Signals) -> Iterator[list[int]]:
    """Lists which of these signals came, and lets nothing be interrupted by them meanwhile.

    An exception amid the start of a process would leave one that nobody knows and ends.
    """
    came: list[int] = []
    with _handled_by(lambda number, frame: came.append(number), numbers):
        yield came


@contextmanager
def _handled_by(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]
) -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in numbers}
    before = {n: each for n, each in handlers.items() if each not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, each)


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or with the CUDA that torch finds."""
    from torch.utils.cpp_extension import CUDA_HOME

    beside = None if CUDA_HOME is None else shutil.which(name, path=str(Path(CUDA_HOME) / "bin"))
    return shutil.which(name) or beside


def module(name: str) -> tuple[str, ...]:
    """The command that runs a module of `benchmarks`, from the folder of the checkout."""
    return (sys.executable, "-m", f"benchmarks.{name}")
