# SPDX-License-Identifier: Apache-2.0
"""Child processes: an instruction set and a sanitizer are chosen once per process."""

from __future__ import annotations

import faulthandler
import functools
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
import torch.multiprocessing

ROOT = Path(__file__).parents[2]
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
    """Runs this interpreter with changes to the environment; sys.path begins with `cwd`.

    What pytest and pytest-xdist say there is for this process: a child has a session of its own.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(cwd), **environment},
        capture_output=True,
        text=True,
    )


def pytest_on_cpu_kernels(
    only: str = CPU_TESTS_ONLY, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the tests of the CPU kernels with the package that lies in `cwd`."""
    options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "-k", only]
    # No capturing: what a sanitizer writes as it ends the process would be lost.
    options += [
        "-s",
        "--tb=short",
        f"--rootdir={ROOT}",
        "-o",
        f"pythonpath={ROOT / 'tests' / 'helpers'}",
    ]
    return python(["-m", "pytest", *options, *CPU_TESTS], cwd, **environment)


GROUP_ERRORS = (
    torch.multiprocessing.ProcessRaisedException,
    torch.multiprocessing.ProcessExitedException,
    TimeoutError,
)
# Of groups that need some ten. Gloo itself waits for half an hour.
HANG_S = 120


def spawn(
    function: Callable[..., None], processes: int, *arguments: object, limit: float = HANG_S
) -> None:
    """Runs function(rank, *arguments) in so many processes of one group of torch.distributed.

    Sockets fail now and then for reasons that are none of ours. So a group that hangs is ended,
    with its stacks in the output, and begun once more; and where groups of torch's own modules
    fail too, the test is skipped.
    """
    for last in (False, True):
        try:
            _start(_run_in_group, processes, limit, limit, function, arguments)
            return
        except GROUP_ERRORS as error:
            if not _has_working_groups():
                pytest.skip(f"torch's own modules cannot train in a group either: {error}")
            if last or not isinstance(error, TimeoutError):
                raise
            warnings.warn(f"{function.__name__} is begun once more: {error}", stacklevel=2)


def _start(target: Callable[..., None], processes: int, limit: float, *arguments: object) -> None:
    """Runs target(rank, processes, folder, *arguments) and leaves no process behind.

    Raises:
        TimeoutError: it takes longer than the limit in seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(
            target, (processes, Path(folder), *arguments), nprocs=processes, join=False
        )
        deadline = time.monotonic() + limit
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{processes} processes took over {limit} s")
        finally:
            for process in context.processes:
                process.kill()
                process.join()


def _has_working_groups() -> bool:
    try:
        _start(_train_torchs_own, 2, HANG_S)
    except GROUP_ERRORS as error:
        print(f"torch's own modules: {error}", file=sys.stderr)
        return False
    return True


def _train_torchs_own(rank: int, processes: int, folder: Path) -> None:
    """Nothing of ours, nor of this file: what is wrong here is to be no reason to skip a test."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(512, 512))
    for _ in range(10):
        model(torch.ones(2, 512)).sum().backward()
    os._exit(0)


def _run_in_group(
    rank: int,
    processes: int,
    folder: Path,
    limit: float,
    function: Callable[..., None],
    arguments: Sequence[object],
) -> None:
    faulthandler.dump_traceback_later(0.9 * limit)
    torch.set_num_threads(1)
    _join(folder, rank, processes)
    function(rank, *arguments)
    # Not after an error: it is to be told before the others', who lose their connection.
    dist.destroy_process_group()
    # Without the interpreter's end: where gloo's threads run until then, it aborts now and then.
    os._exit(0)


def _join(folder: Path, rank: int, processes: int) -> None:
    """Over gloo, without need for a network or a name for this host."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    store = dist.FileStore(str(folder / "store"), processes)
    with mock.patch.dict(os.environ, GLOO_SOCKET_IFNAME=loopback):
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """A group of this process alone."""
    _join(folder, rank=0, processes=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def patch_triton_once_a_launch() -> None:
    """Makes Triton's interpreter take 0.6 of its time.

    It replaces the functions of triton.language in each launch, and looks through all of them again
    at each call of a function inside, where there is nothing left to replace.
    """
    from triton.runtime import interpreter

    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            return patch(function)

    def launch(self, *arguments, **keywords):
        patched.clear()
        execute(self, *arguments, **keywords)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch


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
