# SPDX-License-Identifier: Apache-2.0
"""Replaces attributes of other projects, and puts the very same objects back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

_MISSING = object()


class Replacement(NamedTuple):
    """`replacement` for attribute `name` of a module or class, or for a key of a dict."""

    owner: Any
    name: str
    replacement: object


@dataclass
class _Active:
    original: object  # _MISSING: the owner had none of its own
    replacement: object
    holders: int = 1


# Handles share a replacement: the original comes back when the last of them is restored, in
# whatever order that happens. Keyed by identity; the owner is kept alive by the handles.
_active: dict[tuple[int, str], _Active] = {}


class Patch:
    """Replacements that are in force from construction until `restore`, or the end of a `with`.

    Args:
        replacements: what to replace. An attribute that another Patch replaces already keeps that
            replacement, for as long as one of the two is in force.
    """

    def __init__(self, replacements: Sequence[Replacement]) -> None:
        self._replacements = list(replacements)
        self._held = list(replacements)
        for owner, name, replacement in self._replacements:
            active = _active.get((id(owner), name))
            if active is not None:
                active.holders += 1
                continue
            _active[id(owner), name] = _Active(_get(owner, name), replacement)
            _set(owner, name, replacement)

    @property
    def replaced(self) -> list[str]:
        """The dotted names of what is replaced."""
        return [f"{_dotted(owner)}.{name}" for owner, name, _ in self._replacements]

    def restore(self) -> None:
        """Puts the originals back; a second call does nothing.

        Raises:
            RuntimeError: someone else has replaced an attribute since; it is left as it is.
        """
        changed = []
        while self._held:
            owner, name, _ = self._held.pop()
            active = _active[id(owner), name]
            active.holders -= 1
            if active.holders:
                continue
            del _active[id(owner), name]
            if _get(owner, name) is not active.replacement:
                changed.append(f"{_dotted(owner)}.{name}")
            else:
                _set(owner, name, active.original)
        if changed:
            raise RuntimeError(
                f"{', '.join(changed)}: replaced by someone else after this patch; not restored"
            )

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = "in force" if self._held else "restored"
        return f"<Patch of {len(self._replacements)} attributes, {state}>"


def _get(owner: Any, name: str) -> object:
    return (owner if isinstance(owner, dict) else vars(owner)).get(name, _MISSING)


def _set(owner: Any, name: str, value: object) -> None:
    if isinstance(owner, dict):
        if value is _MISSING:
            del owner[name]
        else:
            owner[name] = value
    elif value is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _dotted(owner: Any) -> str:
    if owner is sys.modules:
        return "sys.modules"
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}"
    return str(getattr(owner, "__name__", owner))
