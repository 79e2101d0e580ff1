# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as operators, `<name>_triton`, with the contracts of `_ops.py`.

Registering them does not import the kernels; the first call does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch.library import custom_op

from .. import _ops


def _kernel(function: str) -> Callable[..., Any]:
    """A function of launch.py, which is imported when it is first called."""

    loaded: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not loaded:
            loaded.append(getattr(importlib.import_module(f"{__package__}.launch"), function))
        return loaded[0](*arguments)

    return call


def _register(contract: _ops.Contract, forward: str, backward: str) -> None:
    name = f"{contract.name}_triton"
    qualified = f"vitadapter_ops::{name}"
    ops = [
        custom_op(f"{qualified}{suffix}", _kernel(function), mutates_args=(), schema=schema)
        for suffix, function, schema in zip(
            ("", "_backward"), (forward, backward), contract.schema, strict=True
        )
    ]
    for op, fake in zip(ops, contract.fakes, strict=True):
        op.register_fake(fake)
    ops[0].register_autograd(contract.differentiate(name), setup_context=contract.setup_context)
    ops[1].register_autograd(_ops.no_double_backward)


_register(_ops.MS_DEFORM_ATTN, "forward", "backward")
_register(_ops.MS_DEFORM_ATTN_FROM_OFFSETS, "forward_from_offsets", "backward_from_offsets")
