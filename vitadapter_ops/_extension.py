# SPDX-License-Identifier: Apache-2.0
"""The native libraries: prebuilt, or compiled at first use, or a remembered reason why not."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _build, _build_cache

_PACKAGE = Path(__file__).parent
_lock = threading.RLock()
_prebuilt: dict[str, Library | None] = {}  # found at import
_libraries: dict[str, Library] = {}  # that calls asked for


@dataclass(frozen=True)
class Library:
    """What became of one device's library.

    Attributes:
        origin: "prebuilt" or "JIT" when it is loaded, otherwise None.
        path: the loaded file.
        error: why it is not loaded, or why a prebuilt one had to be replaced by JIT.
    """

    origin: str | None
    path: Path | None = None
    error: str | None = None


def _renew_lock() -> None:
    """In a forked child: another thread, which is not there, may have held the parent's lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


def source_dir() -> Path:
    """The folder of the kernels' source: inside a wheel's package, beside it in a checkout."""
    packaged = _PACKAGE / "csrc"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "csrc"


def load(device: str) -> Library:
    """Loads the library for "cpu" or "cuda", compiling it if needed. Tried once per process."""
    with _lock:
        if device not in _libraries:
            _libraries[device] = _load(device)
        return _libraries[device]


def _load(device: str) -> Library:
    prebuilt = _prebuilt[device] if device in _prebuilt else _load_prebuilt(device)
    if prebuilt is None:
        return _load_jit(device)
    prebuilt = _refused_without_code(device, prebuilt)
    if prebuilt.origin is not None:
        return prebuilt
    compiled = _load_jit(device)
    error = prebuilt.error if compiled.error is None else f"{prebuilt.error}; {compiled.error}"
    return Library(compiled.origin, compiled.path, error)


def load_prebuilt() -> None:
    """Loads the libraries that were built at installation; called at import, compiles nothing."""
    with _lock:
        for device in _build.SOURCES:
            _prebuilt[device] = _load_prebuilt(device)


def why_no_jit(device: str) -> str | None:
    """None when the library can be compiled here, or else what is missing."""
    if device == "cuda":
        from torch.utils.cpp_extension import CUDA_HOME

        reason = _build.why_no_cuda_build(torch.version.cuda, CUDA_HOME)
        if reason is not None:
            return reason
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) was found; install one or set CXX"
    try:
        from torch.utils.cpp_extension import verify_ninja_availability

        verify_ninja_availability()
    except RuntimeError:
        return "ninja was not found; pip install ninja"
    if not source_dir().is_dir():
        return f"the kernels' source is not at {source_dir()}"
    return None


def _load_prebuilt(device: str) -> Library | None:
    if device == "cuda" and torch.version.cuda is None:
        return None
    for path in sorted(_PACKAGE.glob(f"_{device}.*")):
        if path.suffix in (".so", ".pyd", ".dylib"):
            if not _build_cache.is_complete(path):
                return Library(None, path, f"{path.name} does not load: the file is truncated")
            try:
                _load_library(path)
            except OSError as error:
                return Library(None, path, f"{path.name} does not load: {error}")
            return Library("prebuilt", path)
    return None


def _load_library(path: Path) -> None:
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]


def _visible_gpus() -> dict[str, tuple[int, int]]:
    """Compute capability of each kind of GPU that this process sees, by name."""
    try:
        return {
            torch.cuda.get_device_name(i): torch.cuda.get_device_capability(i)
            for i in range(torch.cuda.device_count())
        }
    except (RuntimeError, AssertionError):  # calls will say better what is wrong with the GPU
        return {}


def _refused_without_code(device: str, library: Library) -> Library:
    """The library, or the reason why no GPU here can run what is in it.

    Not asked at import: that starts CUDA, after which a process cannot fork.
    """
    if device != "cuda" or library.origin is None or library.path is None:
        return library
    try:
        function = ctypes.CDLL(str(library.path)).vitadapter_ops_cuda_archs
    except AttributeError:  # built by other means than ours
        return library
    function.restype = ctypes.c_char_p
    reason = _build.why_no_code(function().decode().split(","), _visible_gpus())
    if reason is None:
        return library
    return Library(None, library.path, f"{library.path.name} is for other GPUs: {reason}")


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """pip's ninja lies beside the interpreter, on PATH only in an activated environment."""
    before = os.environ.get("PATH", "")
    try:
        import ninja
    except ImportError:
        yield
        return
    os.environ["PATH"] = before + os.pathsep + ninja.BIN_DIR
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _load_jit(device: str) -> Library:
    with _ninja_on_path():
        reason = why_no_jit(device)
        if reason is not None:
            return Library(None, error=reason)
        return _compile(device)


def _compile(device: str) -> Library:
    from torch.utils import cpp_extension

    source = source_dir()
    cflags, gencode = _build.CXX_FLAGS, []
    if device == "cuda":
        try:
            gencode = cpp_extension._get_cuda_arch_flags()
        except IndexError:
            error = (
                "expected a GPU in sight to compile for, or its architecture in "
                "TORCH_CUDA_ARCH_LIST, got neither"
            )
            return Library(None, error=error)
        except ValueError as invalid:
            return Library(None, error=f"TORCH_CUDA_ARCH_LIST: {invalid}")
        archs = _build.archs_of(gencode)
        reason = _build.why_no_code(archs, _visible_gpus())
        if reason is not None:
            return Library(None, error=f"TORCH_CUDA_ARCH_LIST is for other GPUs: {reason}")
        cflags = [*_build.CUDA_CXX_FLAGS, _build.archs_flag(archs)]
    name = f"vitadapter_ops_{device}_{_digest(source, [*cflags, *_build.NVCC_FLAGS, *gencode])}"
    try:
        folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    except OSError as failure:
        return Library(None, error=f"there is no folder to compile in: {failure}")

    def build(own_folder: Path) -> Path:
        print(
            f"vitadapter_ops: compiling the {device} kernels for this machine, once "
            f"(seconds for cpu, a minute of processor time for cuda; kept in {folder})",
            file=sys.stderr,
        )
        start = time.perf_counter()
        # Loads it too; the rename that follows leaves it the same file.
        cpp_extension.load(
            name,
            [str(source / file) for file in _build.SOURCES[device]],
            extra_cflags=cflags,
            extra_cuda_cflags=_build.NVCC_FLAGS,
            extra_ldflags=_link_flags(device),
            extra_include_paths=_include_paths(device),
            build_directory=str(own_folder),
            with_cuda=device == "cuda",
            is_python_module=False,
        )
        print(f"vitadapter_ops: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        return next(own_folder.glob("*.so"))

    library = folder / f"{name}.so"
    try:
        _build_cache.load_or_build(library, f"the {device} kernels", _load_library, build)
    except (RuntimeError, OSError, subprocess.SubprocessError) as failure:
        return Library(None, error=f"compiling failed: {failure}")
    return Library("JIT", library)


def _digest(source: Path, flags: list[str]) -> str:
    """Of all that a library depends on: its folder is never rebuilt, and never another's.

    So two installations share one library; one for a sanitizer, another GPU or another CUDA runtime
    has its own.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file())
    contents = b"".join(path.read_bytes() for path in files)
    settings = " ".join([*flags, os.environ.get("CXX", ""), str(torch.version.cuda)])
    return hashlib.sha256(contents + settings.encode()).hexdigest()[:12]


def _include_paths(device: str) -> list[str]:
    from torch.utils.cpp_extension import CUDA_HOME

    if device != "cuda" or CUDA_HOME is None:
        return []
    return _build.cuda_include_dirs(CUDA_HOME)


def _link_flags(device: str) -> list[str]:
    from torch.utils.cpp_extension import CUDA_HOME

    if device != "cuda" or CUDA_HOME is None:
        return []
    return [f"-L{folder}" for folder in _build.cuda_library_dirs(CUDA_HOME)]


def cpu_instruction_set() -> str | None:
    """Which instruction set's kernels the loaded CPU library runs, or None without the library."""
    library = _libraries.get("cpu") or _prebuilt.get("cpu")
    if library is None or library.origin is None:
        return None
    function = ctypes.CDLL(str(library.path)).vitadapter_ops_cpu_isa
    function.restype = ctypes.c_char_p
    return str(function().decode())
