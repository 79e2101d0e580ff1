# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as operators, `<name>_triton`, with the contracts of `_ops.py`.

Registering them does not import the kernels; the first call does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from .. import _ops


def _kernel(function: str) -> Callable[..., Any]:
    """A function of launch.py, which is imported when it is first called."""

    loaded: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not loaded:
            loaded.append(getattr(importlib.import_module(f"{__package__}.launch"), function))
        return loaded[0](*arguments)

    return call


for contract, functions in (
    (_ops.MS_DEFORM_ATTN, ("forward", "backward")),
    (_ops.MS_DEFORM_ATTN_FROM_OFFSETS, ("forward_from_offsets", "backward_from_offsets")),
):
    forward, backward = map(_kernel, functions)
    _ops.register(f"{contract.name}_triton", contract, (forward, backward))
