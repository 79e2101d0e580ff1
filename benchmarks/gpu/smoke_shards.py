# SPDX-License-Identifier: Apache-2.0
"""Processes that run checks: the child prints a line of JSON for each, and the parent reads them.

A check that ends its process costs itself alone: another process goes on with the next.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from benchmarks.common import report
from benchmarks.common.graphs import answers
from benchmarks.common.memory import first_line
from benchmarks.gpu.smoke_checks import Check
from vitadapter_ops.testing.tolerances import Inaccurate

NEAR = 4  # times the bound: rounding that was not lucky, not a mistake
BROKEN = 9  # exit status of a child after whose check the device answers nothing any more
MOST_RESTARTS = 4


# --- in a child ---------------------------------------------------------------------------------


def run_checks(checks: Iterable[Check], device: str, start: int = 0, end: int | None = None) -> int:
    """Runs those from number `start` to before `end`; the exit status of the process."""
    on_gpu = device != "cpu"
    for number, (name, check) in islice(enumerate(checks), start, end):
        print(json.dumps({"begins": number, "name": name}), flush=True)
        begin = time.perf_counter()
        error, beyond = None, 0.0
        try:
            if on_gpu:
                _poison(device)
            check()
            if on_gpu:
                torch.cuda.synchronize()
        except Exception as reason:
            error = report.without_paths(first_line(reason))[:300]
            beyond = reason.times if isinstance(reason, Inaccurate) else float("inf")
        found = {"ends": number, "error": error, "s": round(time.perf_counter() - begin, 2)}
        found["near"] = error is not None and beyond <= NEAR
        print(json.dumps(found), flush=True)
        if error is not None and on_gpu and not answers(device):
            return BROKEN
    return 0


def _poison(device: str) -> None:
    """Fills memory that the allocator gives out next, large blocks and small: unwritten is NaN."""
    nan = float("nan")
    several = [torch.full((2**24,), nan, device=device)]
    several += [
        torch.full((size,), nan, device=device) for size in (2**17, 2**13) for _ in range(64)
    ]
    del several


# --- in the parent ------------------------------------------------------------------------------


@dataclass
class Failure:
    """`near`: beyond the bound, but at most NEAR times it."""

    check: str
    error: str
    near: bool = False


@dataclass
class Shard:
    """A process with some of the checks, and those that replace it when it dies."""

    name: str
    command: tuple[str, ...]
    folder: Path
    done: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False
    cut: bool = False  # out of time
    _next: int = 0
    _starts: int = 0
    _seen: int = 0  # lines of the log
    _begun: tuple[int, str] | None = None  # the check that runs
    _process: subprocess.Popen[bytes] | None = None

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.name}-{self._starts}".replace(" ", "-")

    def start(self) -> None:
        self._starts += 1
        self._seen, self._begun = 0, None
        with self._log.open("wb") as log:
            command = (*self.command, "--shard", self.name, "--start", str(self._next))
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def poll(self) -> bool:
        """Takes note of what the process says; True if there is news."""
        assert self._process is not None
        if self.finished:
            return False
        code = self._process.poll()  # before reading: what it said last is there then
        news = self._read()
        if code is None:
            return news
        said = [line for line in self._lines() if not line.startswith("{")][-3:]
        text = report.without_paths(" | ".join(said))[-400:]
        if code == 0:
            self.finished = True
            return True
        if self._begun is not None:  # it died within a check
            number, name = self._begun
            self.failures.append(Failure(name, f"its process ended with {code}: {text}"))
            self._next = number + 1
        elif code != BROKEN:
            self.failures.append(Failure(self.name, f"its process ended with {code}: {text}"))
            self.finished = True
            return True
        if self._starts > MOST_RESTARTS:
            self.failures.append(Failure(self.name, f"given up after {self._starts} processes"))
            self.finished = True
        else:
            self.start()
        return True

    def end(self) -> None:
        """Ends what still runs."""
        if self.finished:
            return
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._read()
        where = self.name if self._begun is None else self._begun[1]
        self.failures.append(Failure(where, "out of time here"))
        self.finished = self.cut = True

    def _lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()

    def _read(self) -> bool:
        """Adds what the process found since it was read last; True if it found something."""
        lines = self._lines()
        fresh, self._seen = lines[self._seen :], len(lines)
        before = self.done
        for number, line in enumerate(fresh):
            try:
                each = json.loads(line)
            except ValueError:
                if line.startswith("{") and number == len(fresh) - 1:
                    self._seen -= 1  # not all of it is there yet
                continue
            if not isinstance(each, dict):
                continue
            if "begins" in each:
                self._begun = each["begins"], each["name"]
            elif "ends" in each and self._begun is not None:
                self.done += 1
                self.seconds += each["s"]
                self._next = each["ends"] + 1
                if each["error"]:
                    self.failures.append(Failure(self._begun[1], each["error"], each["near"]))
                self._begun = None
        return self.done > before
