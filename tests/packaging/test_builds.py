# SPDX-License-Identifier: Apache-2.0
"""A JIT build that dies blocks no later one, two at once make one library, and half of one is none.

The builds are real ones of a library of one line: torch's build helper, ninja and the compiler, run
by child processes, which are killed for real.
"""

import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import build_steps
from vitadapter_ops import _build, _build_cache, _extension, explain_backend

CXX = os.environ.get("CXX", "c++")
DEADLINE_S = 120
HOST = platform.node()
# Imports torch once, and forks a child in no time.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["build_steps", "torch.utils.cpp_extension"])

needs_compiler = pytest.mark.skipif(
    shutil.which(CXX) is None or not sys.platform.startswith("linux"),
    reason="needs Linux and a C++ compiler",
)

# A compiler that writes down each file that it compiles, and waits before it as long as a file is
# there.
COMPILER = """#!/bin/sh
case " $* " in
  *" -c "*)
    echo compiling >> "$COMPILED"
    while [ -e "$HOLD" ]; do sleep 0.05; done ;;
esac
exec {compiler} "$@"
"""


class Builds:
    """Child processes that build the same library; each has a compiler that can be held."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.source = folder / "source"
        self.source.mkdir()
        (self.source / "small.cpp").write_text("int vitadapter_ops_small() { return 1; }\n")
        self.compiler = folder / "compiler"
        self.compiler.write_text(COMPILER.format(compiler=shutil.which(CXX)))
        self.compiler.chmod(0o755)
        self.compiled = folder / "compiled"
        self.compiled.touch()
        self.started = []

    def start(self, hold: Path | None = None, locks: bool = True) -> multiprocessing.Process:
        number = len(self.started)
        environment = {
            "TORCH_EXTENSIONS_DIR": str(self.folder / "cache"),
            "CXX": str(self.compiler),
            "COMPILED": str(self.compiled),
            "HOLD": str(hold or self.folder / "nothing"),
        }
        files = (self.source / "small.cpp", self._errors(number), self._result(number))
        process = SERVER.Process(
            target=build_steps.build, args=(*map(str, files), locks, environment)
        )
        self.started.append(process)
        process.start()
        return process

    def _errors(self, number: int) -> Path:
        return self.folder / f"stderr-{number}"

    def _result(self, number: int) -> Path:
        return self.folder / f"result-{number}"

    def held(self) -> Path:
        path = self.folder / f"hold-{len(self.started)}"
        path.touch()
        return path

    def said(self, process: multiprocessing.Process) -> str:
        path = self._errors(self.started.index(process))
        return path.read_text() if path.exists() else ""

    def compilations(self) -> int:
        return len(self.compiled.read_text().splitlines())

    def end(self, process: multiprocessing.Process) -> int:
        """The exit status of a process."""
        process.join(DEADLINE_S)
        assert process.exitcode is not None
        return process.exitcode

    def result(self, process: multiprocessing.Process) -> Path:
        """The library that a process has loaded."""
        assert self.end(process) == 0, self.said(process)
        return Path(self._result(self.started.index(process)).read_text())

    def library(self) -> Path:
        """The only library; of the builds nothing else is left but the lock's file."""
        (path,) = self.folder.glob("cache/*/*.so")
        assert {file.name for file in path.parent.iterdir()} == {path.name, _build_cache._LOCK}
        return path

    def close(self) -> None:
        """Lets the compilers go that outlived their builds."""
        for path in self.folder.glob("hold-*"):
            path.unlink()
        for process in self.started:
            process.kill()
            process.join()


@pytest.fixture
def builds(tmp_path):
    made = Builds(tmp_path)
    yield made
    made.close()


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@needs_compiler
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL], ids=lambda sign: sign.name)
def test_killed_build_does_not_block_the_next_one(builds, sign):
    first = builds.start(builds.held())
    wait_for(lambda: builds.compilations() == 1)
    os.kill(first.pid, sign)
    assert builds.end(first) == -sign
    # The first one's compiler is still there and holds what it can hold.
    second = builds.start()
    assert builds.result(second) == builds.library()
    assert "waiting" not in builds.said(second)
    assert builds.compilations() == 2


@needs_compiler
def test_two_builds_at_once_make_one_library(builds):
    hold = builds.held()
    first = builds.start(hold)
    wait_for(lambda: builds.compilations() == 1)
    second = builds.start(hold)
    message = f"waiting for process {first.pid} on {HOST}, which compiles the cpu kernels"
    wait_for(lambda: message in builds.said(second))
    hold.unlink()
    assert builds.result(first) == builds.result(second) == builds.library()
    assert builds.compilations() == 1
    assert "compiled in" not in builds.said(second)


@needs_compiler
def test_who_waits_builds_when_the_builder_is_killed(builds):
    first = builds.start(builds.held())
    wait_for(lambda: builds.compilations() == 1)
    second = builds.start()
    wait_for(lambda: "waiting for process" in builds.said(second))
    first.kill()
    assert builds.result(second) == builds.library()
    assert builds.compilations() == 2


@needs_compiler
def test_without_file_locks_both_build_and_both_load(builds):
    hold = builds.held()
    processes = [builds.start(hold, locks=False) for _ in range(2)]
    wait_for(lambda: builds.compilations() == 2)
    hold.unlink()
    paths = {builds.result(process) for process in processes}
    assert paths == {builds.library()}
    assert all("has no file locks" in builds.said(process) for process in processes)


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing"])
def test_half_of_a_build_is_built_again(builds, damage):
    library = builds.result(builds.start())
    contents = library.read_bytes()
    library.unlink()
    if damage == "truncated":
        library.write_bytes(contents[: len(contents) // 2])
    elif damage == "empty":
        library.touch()
    elif damage == "garbage":
        library.write_bytes(b"no library" * 1000)
    # Of a killed build, of torch's own lock, and of a build that runs on another machine.
    mine, other = library.parent / f"build-{HOST}+x", library.parent / f"build-{HOST}-2+x"
    for folder in (mine, other):
        folder.mkdir()
        (folder / "lock").touch()
        (folder / library.name).write_bytes(contents[:100])
    (library.parent / "lock").touch()
    again = builds.start()
    assert builds.result(again) == library
    assert "compiled in" in builds.said(again)
    assert library.read_bytes() == contents
    assert not mine.exists()
    assert other.exists()


@needs_compiler
def test_failed_build_says_what_the_compiler_said_and_leaves_nothing(builds):
    (builds.source / "small.cpp").write_text("this is no C++;\n")
    process = builds.start()
    assert builds.end(process) == 1
    assert "compiling failed" in builds.said(process)
    assert "small.cpp:1" in builds.said(process)
    (folder,) = builds.folder.glob("cache/*")
    assert [path.name for path in folder.iterdir()] == [_build_cache._LOCK]


@needs_compiler
def test_truncated_prebuilt_library_is_not_mapped(tmp_path, monkeypatch):
    source, whole = tmp_path / "small.c", tmp_path / "whole.so"
    source.write_text("int vitadapter_ops_small(void) { return 1; }\n")
    subprocess.run([CXX, "-xc", "-shared", "-fPIC", str(source), "-o", str(whole)], check=True)
    assert _build_cache.is_complete(whole)
    contents = whole.read_bytes()
    broken = tmp_path / "_cpu.abi3.so"
    for length in (10, 63, 64, len(contents) // 2, len(contents) - 1):
        broken.write_bytes(contents[:length])
        assert not _build_cache.is_complete(broken)
    monkeypatch.setattr(_extension, "_PACKAGE", tmp_path)
    library = _extension._load_prebuilt("cpu")
    assert library.origin is None
    assert library.error == "_cpu.abi3.so does not load: the file is truncated"


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90"], (10, 0), False),
        (["sm_80", "sm_90"], (7, 5), False),
        (["sm_90", "compute_90"], (11, 0), True),
        (["compute_90"], (8, 9), False),
        (["sm_90a"], (9, 0), True),
        (["sm_90a", "compute_90a"], (10, 0), False),
        (["sm_100f"], (10, 3), True),
        (["sm_120"], (12, 1), True),
        ([""], (7, 5), True),  # not known
    ],
    ids=str,
)
def test_code_runs_on_its_own_generation_and_ptx_on_newer_ones(archs, capability, runs):
    reason = _build.why_no_code(archs, {"NVIDIA X": capability})
    assert (reason is None) == runs


def test_refusal_names_the_architectures_of_the_library_and_of_the_gpu():
    assert _build.why_no_code(["sm_80", "sm_90", "compute_90"], {"NVIDIA T4": (7, 5)}) == (
        "it has code for compute capability 8.0, 9.0, PTX 9.0, the GPU here is 7.5 (NVIDIA T4)"
    )
    # One GPU that it serves is enough: a display's may be another one.
    assert _build.why_no_code(["sm_80"], {"NVIDIA T4": (7, 5), "NVIDIA A100": (8, 0)}) is None
    assert _build.why_no_code(["sm_80"], {}) is None


def test_prebuilt_library_serves_newer_gpus_by_ptx(monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", _build.default_arch_list((13, 0)))
    archs = _build.archs_of(cpp_extension._get_cuda_arch_flags())
    assert {"sm_80", "sm_90", "compute_90", "sm_120", "compute_120"} <= set(archs)
    for capability in ((8, 0), (8, 7), (9, 0), (10, 3), (11, 0), (12, 1), (13, 0)):
        assert _build.why_no_code(archs, {"GPU": capability}) is None
    assert _build.default_arch_list((12, 4)) == "8.0;8.6;8.9;9.0+PTX"


@needs_compiler
def test_prebuilt_library_for_other_gpus_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "archs.c"
    source.write_text('const char* vitadapter_ops_cuda_archs(void) { return "sm_80,sm_90"; }\n')
    library = tmp_path / "_cuda.abi3.so"
    subprocess.run([CXX, "-xc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(_extension, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_extension, "_prebuilt", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_extension, "why_no_jit", lambda device: "no nvcc here")

    monkeypatch.setattr(_extension, "_libraries", {})
    monkeypatch.setattr(_extension, "_visible_gpus", lambda: {"NVIDIA H200": (9, 0)})
    assert _extension.load("cuda") == _extension.Library("prebuilt", library)

    monkeypatch.setattr(_extension, "_libraries", {})
    monkeypatch.setattr(_extension, "_visible_gpus", lambda: {"NVIDIA T4": (7, 5)})
    text = explain_backend("cuda")
    assert (
        "cannot run: its library is not available: _cuda.abi3.so is for other GPUs: it has code "
        "for compute capability 8.0, 9.0, the GPU here is 7.5 (NVIDIA T4); no nvcc here"
    ) in text
