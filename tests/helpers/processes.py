# SPDX-License-Identifier: Apache-2.0
"""What became of other processes, by their number."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    """Returns as soon as `holds` does; fails when time is up."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "time is up"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process ends within seconds: the system takes care of an orphan in its own time."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def children_of(pid: int) -> list[int]:
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            after_name = stat.read_text().rpartition(")")[2].split()
            if int(after_name[1]) == pid:
                children.append(int(stat.parent.name))
    return children
