# SPDX-License-Identifier: Apache-2.0
"""One library in a cache folder, whoever builds it, and whatever became of earlier builds.

A library is built in a folder of its own and renamed when it is complete, so that its name never
stands for half of it. A file lock that dies with its process keeps others from building the same;
where there are none (some network file systems), both build and the last one's file stays.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

_LOCK = "building.lock"  # holds no lock of torch's, whose files outlive their processes
_POLL_S = 0.1
_ABANDONED_S = 24 * 3600


def load_or_build(
    library: Path, what: str, load: Callable[[Path], object], build: Callable[[Path], Path]
) -> None:
    """Loads a library, after building it if there is none that loads.

    Args:
        library: the file in the cache; its folder exists.
        what: is built, for messages.
        load: raises OSError for a file that does not load.
        build: makes the library somewhere in the empty folder that it is given.

    Raises:
        OSError: the new library does not load, or cannot be written.
    """
    if _loads(library, load):
        return
    folder = library.parent
    with _locked(folder / _LOCK, what) as alone:
        if _loads(library, load):  # from whoever built it while we waited
            return
        _remove_abandoned(folder, alone)
        own = Path(tempfile.mkdtemp(prefix=_prefix(), dir=folder))
        try:
            built = build(own)
            with built.open("rb") as file:
                os.fsync(file.fileno())  # the name must not reach the disk before the contents
            os.replace(built, library)
        finally:
            shutil.rmtree(own, ignore_errors=True)
    load(library)


def _loads(library: Path, load: Callable[[Path], object]) -> bool:
    if not is_complete(library):
        return False
    try:
        load(library)
    except OSError:
        return False
    return True


def is_complete(library: Path) -> bool:
    """Whether a file is there as long as it says itself.

    The loader maps a truncated library all the same, and the process dies where it reads beyond the
    file's end. Files of other kinds than 64-bit ELF are left to the loader.
    """
    try:
        with library.open("rb") as file:
            head = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if head[:5] != b"\x7fELF\x02":
        return True
    if len(head) < 64:
        return False
    order = "<" if head[5] == 1 else ">"
    (sections,) = struct.unpack_from(f"{order}Q", head, 0x28)
    length, number = struct.unpack_from(f"{order}HH", head, 0x3A)
    # Linkers write the table of sections last.
    return bool(sections + length * number <= size)


def _prefix() -> str:
    return f"build-{platform.node()}+"  # no host has a plus in its name


def _remove_abandoned(folder: Path, alone: bool) -> None:
    """Removes what killed builds left; compilers that outlived theirs fail then.

    Under the lock nobody on this machine builds. Others may, where locks do not reach from machine
    to machine: their folders go a day later.
    """
    for old in folder.glob("build-*"):
        with contextlib.suppress(OSError):
            ours = alone and old.name.startswith(_prefix())
            if ours or time.time() - old.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, what: str) -> Iterator[bool]:
    """Holds the lock on a file, or yields False where the file system has none.

    The file stays: removing it would give the next process another lock than those who wait have.
    """
    with path.open("a+") as file:
        alone = _acquire(file, what)
        if alone:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        else:
            print(
                f"vitadapter_ops: {path.parent} has no file locks; another process may compile "
                f"{what} too, which does no harm",
                file=sys.stderr,
            )
        yield alone  # closing the file releases the lock, as the end of the process does


def _acquire(file: TextIO, what: str) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return False
    waited, told = False, ""
    while True:
        try:
            # POSIX's own kind: a forked child does not keep it, and NFS passes it on to its server.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            pass
        except OSError:  # ENOLCK, ENOSYS, ENOTSUP
            return False
        if waited:  # who has just taken the lock has said so by now
            file.seek(0)
            owner = file.read() or "another process"
            if owner != told:
                print(
                    f"vitadapter_ops: waiting for {owner}, which compiles {what}", file=sys.stderr
                )
                told = owner
        waited = True
        time.sleep(_POLL_S)
