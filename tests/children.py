# SPDX-License-Identifier: Apache-2.0
"""Child processes: an instruction set and a sanitizer are chosen once per process."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch.multiprocessing

ROOT = Path(__file__).parents[1]
# Whether this process runs the Triton kernels in Triton's interpreter, and only them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ISAS = ("baseline", "avx2", "avx512")

# What runs the CPU kernels, all of it with small tensors.
CPU_TESTS = (
    str(ROOT / "tests" / "ops" / "test_backends.py"),
    str(ROOT / "tests" / "ops" / "test_cpu_kernels.py"),
    str(ROOT / "tests" / "ops" / "test_from_offsets.py"),
    str(ROOT / "tests" / "ops" / "test_infinities.py"),
)
CPU_TESTS_ONLY = "(cpu-on-cpu or test_cpu_kernels) and not vit_adapter and not gradcheck"


def python(
    arguments: list[str], cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter with changes to the environment; sys.path begins with `cwd`."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd), **environment},
        capture_output=True,
        text=True,
    )


def pytest_on_cpu_kernels(
    only: str = CPU_TESTS_ONLY, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the tests of the CPU kernels with the package that lies in `cwd`."""
    options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "-k", only]
    # No capturing: what a sanitizer writes as it ends the process would be lost.
    options += ["-s", "--tb=short", f"--rootdir={ROOT}", "-o", f"pythonpath={ROOT / 'tests'}"]
    return python(["-m", "pytest", *options, *CPU_TESTS], cwd, **environment)


def spawn(function: Callable[..., None], processes: int, *arguments: object) -> None:
    """Runs function(rank, *arguments) in so many processes of torch.distributed."""
    torch.multiprocessing.spawn(_run_and_leave, (function, arguments), nprocs=processes)


def _run_and_leave(rank: int, function: Callable[..., None], arguments: Sequence[object]) -> None:
    function(rank, *arguments)
    # Without the interpreter's end: where gloo's threads run until then, it aborts now and then.
    os._exit(0)


@functools.cache
def error_of_unknown_isa() -> str:
    code = (
        "import torch, vitadapter_ops as v\n"
        "points = torch.full((1, 1, 1, 1, 1, 2), 0.5)\n"
        "try:\n"
        "    v.ms_deform_attn(torch.ones(1, 1, 1, 1), [(1, 1)], points, points[..., 0])\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = python(["-c", code], VITADAPTER_CPU_ISA="mmx")
    assert done.returncode == 0, done.stderr
    return done.stdout


def require_isa(isa: str) -> None:
    """Skips where the processor lacks the instruction set."""
    match = re.search(r"expected one of (.*) on this processor", error_of_unknown_isa())
    assert match, error_of_unknown_isa()
    if isa not in match[1].split(", "):
        pytest.skip(f"this processor has no {isa}")
