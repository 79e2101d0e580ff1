# SPDX-License-Identifier: Apache-2.0
"""What caches and memory deliver: a CPU's by a small C++ program, a GPU's by a copy kernel."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.memory import first_line
from benchmarks.common.report import without_paths
from benchmarks.common.timing import time_once

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
SOURCE = Path(__file__).with_suffix(".cpp")
KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Level:
    """A cache, or the memory behind all of them, which holds everything.

    Attributes:
        name: "L1", "L2", "L3" or "memory".
        bytes: what it holds; None for memory.
        gb_per_s: all threads together, in 1e9 bytes per second: loads of a CPU, loads and stores
            of a GPU.
    """

    name: str
    bytes: int | None
    gb_per_s: float


@dataclass(frozen=True)
class Machine:
    """Levels from the nearest to the farthest, and how many bytes one vector load takes."""

    levels: tuple[Level, ...]
    vector_bytes: int

    def fitting(self, footprint: int) -> int:
        """Index of the nearest level that holds `footprint` bytes."""
        return next(
            i
            for i, level in enumerate(self.levels)
            if level.bytes is None or footprint <= level.bytes
        )


class NotMeasured(RuntimeError):
    """Why there are no bandwidths."""


def cache_sizes(folder: Path = CACHES) -> list[int]:
    """Bytes of the first core's data caches, nearest first; empty where the system has no list."""
    sizes: dict[int, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for cache in folder.glob("index*"):
            if (cache / "type").read_text().strip() == "Instruction":
                continue
            text = (cache / "size").read_text().strip()
            unit = {"K": KIB, "M": MIB}[text[-1]]
            sizes[int((cache / "level").read_text())] = int(text[:-1]) * unit
    return [sizes[level] for level in sorted(sizes)]


def measure(threads: int) -> Machine:
    """Compiles and runs the program; a few seconds.

    Raises:
        NotMeasured: there is no compiler, or no list of caches.
    """
    caches = cache_sizes()
    if not caches:
        raise NotMeasured(f"this system has no {CACHES}")
    # Half a cache, as code and stack want their share; caches from the third on are shared by the
    # threads, and memory is what is far larger than them.
    buffers = [16 * KIB]
    buffers += [size // 2 for size in caches[1:2]]
    buffers += [min(size // 2, 16 * MIB) // threads for size in caches[2:]]
    buffers += [256 * MIB // threads]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "bandwidth")
        compiler = os.environ.get("CXX", "c++")
        flags = ["-O3", "-march=native", "-std=c++17", "-pthread"]
        _run(compiler, *flags, str(SOURCE), "-o", str(program))
        lines = _run(str(program), str(threads), *map(str, buffers)).split()
    names = [f"L{number}" for number in range(1, len(caches) + 1)] + ["memory"]
    levels = zip(names, [*caches, None], map(float, lines[1:]), strict=True)
    return Machine(tuple(Level(*level) for level in levels), int(lines[0]))


# Of L2, what a copy's source and target take together: each half of a GPU's L2 may keep its own.
L2_SHARE = 8
GPU_BUFFER = 2**30


def measure_gpu(device: torch.device) -> Machine:
    """L2 and memory of a GPU; a second.

    Raises:
        NotMeasured: there is no Triton, or it cannot compile here.
    """
    try:
        return _measure_gpu(device)
    except Exception as error:
        raise NotMeasured(without_paths(first_line(error))) from error


def _measure_gpu(device: torch.device) -> Machine:
    from benchmarks.op import copy_kernel

    properties = torch.cuda.get_device_properties(device)

    def gb_per_s(size: int, rounds: int) -> float:
        elements = size // 4 // copy_kernel.BLOCK * copy_kernel.BLOCK
        source = torch.rand(elements, device=device)
        target = torch.empty_like(source)

        def run() -> None:
            copy_kernel.copy(target, source, rounds, properties.multi_processor_count)

        seconds = [time_once(run, device) for _ in range(12)][2:]
        if not torch.equal(source, target):
            raise NotMeasured("the copy kernel does not copy")
        return 2 * source.nbytes * rounds / statistics.median(seconds) / 1e9

    cached = properties.L2_cache_size // L2_SHARE // 2
    levels = (
        Level("L2", properties.L2_cache_size, gb_per_s(cached, 400)),
        Level("memory", None, gb_per_s(GPU_BUFFER, 1)),
    )
    return Machine(levels, 16)


def _run(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True
        ).stdout
    except subprocess.CalledProcessError as error:
        # The last line: a compiler's first ones say where, not what.
        said = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise NotMeasured(without_paths(f"{command[0]}: {said}")) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise NotMeasured(without_paths(str(error))) from error
