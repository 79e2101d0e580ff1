# SPDX-License-Identifier: Apache-2.0
"""Which class builds which published models: each is registered where it is defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Builder = TypeVar("Builder", bound=Callable[..., Any])

_BUILDERS: dict[tuple[str, bool], Callable[..., Any]] = {}


def builds(family: str, *, adapter: bool) -> Callable[[Builder], Builder]:
    """Registers a class that makes a model from a `ModelConfig`.

    Args:
        family: the ViT, as in `ModelConfig.family`.
        adapter: whether it makes models with the adapter, or those with necks alone.
    """

    def register(builder: Builder) -> Builder:
        if (family, adapter) in _BUILDERS:
            raise ValueError(f"family: expected one that nothing builds yet, got {family!r} again")
        _BUILDERS[family, adapter] = builder
        return builder

    return register


def builder_of(family: str, *, adapter: bool) -> Callable[..., Any] | None:
    """What was registered, or None where no such model was published."""
    return _BUILDERS.get((family, adapter))


def families() -> list[str]:
    """The ViTs that have an adapter, in the order in which they were registered."""
    return [family for family, adapter in _BUILDERS if adapter]
