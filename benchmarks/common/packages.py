# SPDX-License-Identifier: Apache-2.0
"""What a command says where a package that it imports was never installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

NEEDED = ("matplotlib", "PIL", "rich", "torch", "vitadapter", "vitadapter_ops")


@contextmanager
def named_if_missing(install: str) -> Iterator[None]:
    """Around imports: ends the program with the package's name and how to `install` it."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if missing.name not in NEEDED:
            raise  # not something that was never installed, but something broken
        raise SystemExit(f"{missing.name} is not installed. {install}") from missing
