# SPDX-License-Identifier: Apache-2.0
"""What the child processes of test_builds.py do."""

import errno
import os
import sys
from pathlib import Path

from vitadapter_ops import _build, _extension


def build(source: str, errors: str, result: str, locks: bool, environment: dict[str, str]) -> None:
    """Builds and loads the library of one file in place of the CPU kernels; writes its path."""
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    if not locks:
        _refuse_locks()
    _build.SOURCES["cpu"] = [Path(source).name]
    _extension.source_dir = lambda: Path(source).parent
    _extension._prebuilt["cpu"] = None
    library = _extension.load("cpu")
    if library.origin != "JIT":
        sys.exit(str(library.error))
    Path(result).write_text(str(library.path))


def _refuse_locks() -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.lockf = refuse
