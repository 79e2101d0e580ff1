# SPDX-License-Identifier: Apache-2.0
"""What was found out about a kind of call, for the next of the same kind."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

Found = TypeVar("Found")

# Then all is forgotten: image sizes may change without end.
MOST = 4096


class CallCache(dict[Hashable, Found]):
    """By kind of call; never longer than MOST."""

    def __setitem__(self, kind: Hashable, found: Found) -> None:
        if len(self) >= MOST:
            self.clear()
        super().__setitem__(kind, found)
