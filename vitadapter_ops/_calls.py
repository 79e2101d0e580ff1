# SPDX-License-Identifier: Apache-2.0
"""The one cache of calls: what checks and preparation found out, by kind of call."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

T = TypeVar("T")

_MOST = 4096  # of one kind of knowledge, then forgotten: image sizes may change without end
_all: list[Calls] = []  # type: ignore[type-arg]


class Calls(dict[Hashable, T]):
    """By kind of call what is known of it. A dict, because a look-up is all that most calls pay."""

    def __init__(self) -> None:
        super().__init__()
        _all.append(self)

    def remember(self, kind: Hashable, known: T) -> None:
        if len(self) >= _MOST:
            self.clear()
        self[kind] = known


def forget() -> None:
    """Everything, so that the next call of each kind is checked and prepared anew."""
    for calls in _all:
        calls.clear()
