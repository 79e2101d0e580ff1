# SPDX-License-Identifier: Apache-2.0
"""No time of wrong results: what a benchmark does whose results are not correct.

What correct means is in vitadapter_ops.testing.gate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from benchmarks.common.memory import first_line


class RedGateError(RuntimeError):
    """Results are wrong, so they are not timed; the text says which."""


@contextmanager
def held(what: str) -> Iterator[None]:
    """Turns a check that fails inside into RedGateError, which names `what`."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        raise RedGateError(f"{what}: {first_line(error)}") from error


def show_red(console: Console, error: RedGateError) -> None:
    console.print(
        f"Not timed, because the results are wrong: {error}", style="bold red", markup=False
    )
