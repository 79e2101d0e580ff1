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

from . import _build

_PACKAGE = Path(__file__).parent
_lock = threading.RLock()
_libraries: dict[str, Library] = {}


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
    prebuilt = _load_prebuilt(device)
    if prebuilt is None:
        return _load_jit(device)
    if prebuilt.origin is not None:
        return prebuilt
    compiled = _load_jit(device)
    error = prebuilt.error if compiled.error is None else f"{prebuilt.error}; {compiled.error}"
    return Library(compiled.origin, compiled.path, error)


def load_prebuilt() -> None:
    """Loads the libraries that were built at installation; called at import, compiles nothing."""
    with _lock:
        for device in _build.SOURCES:
            library = _load_prebuilt(device)
            if library is not None and library.origin is not None:
                _libraries[device] = library


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
            try:
                torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
            except OSError as error:
                return Library(None, path, f"{path.name} does not load: {error}")
            return Library("prebuilt", path)
    return None


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
    files = sorted(path for path in source.rglob("*") if path.is_file())
    flags = " ".join([*_build.CXX_FLAGS, *_build.NVCC_FLAGS]).encode()
    contents = b"".join(path.read_bytes() for path in files)
    digest = hashlib.sha256(contents + flags).hexdigest()[:12]
    # One build folder per content and flags, so that two installations never rebuild each other's
    # library, and one built for a sanitizer is never taken for another.
    name = f"vitadapter_ops_{device}_{digest}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    first = not any(folder.glob(f"{name}*.so"))
    if first:
        print(
            f"vitadapter_ops: compiling the {device} kernels for this machine, once "
            f"(seconds for cpu, a minute for cuda; kept in {folder})",
            file=sys.stderr,
        )
    start = time.perf_counter()
    try:
        path = cpp_extension.load(
            name,
            [str(source / file) for file in _build.SOURCES[device]],
            extra_cflags=_build.CXX_FLAGS,
            extra_cuda_cflags=_build.NVCC_FLAGS,
            extra_ldflags=_link_flags(device),
            with_cuda=device == "cuda",
            is_python_module=False,
        )
    except IndexError:  # what some releases of torch raise then
        return Library(None, error="there is no GPU to compile for; TORCH_CUDA_ARCH_LIST names one")
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return Library(None, error=f"compiling failed: {error}")
    if first:
        print(f"vitadapter_ops: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return Library("JIT", Path(path) if path else folder / f"{name}.so")


def _link_flags(device: str) -> list[str]:
    from torch.utils.cpp_extension import CUDA_HOME

    if device != "cuda" or CUDA_HOME is None:
        return []
    return [f"-L{folder}" for folder in _build.cuda_library_dirs(CUDA_HOME)]


def cpu_instruction_set() -> str | None:
    """Which instruction set's kernels the loaded CPU library runs, or None without the library."""
    library = _libraries.get("cpu")
    if library is None or library.origin is None:
        return None
    function = ctypes.CDLL(str(library.path)).vitadapter_ops_cpu_isa
    function.restype = ctypes.c_char_p
    return str(function().decode())
