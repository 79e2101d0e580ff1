# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the operators, for torch.utils.flop_counter.FlopCounterMode.

In torch's convention, where a multiply-add is two FLOPs and attention counts its two products only:
each channel of a sampling point is a sum over four corners, whose weights carry the attention
weight. Softmax, locations and corner weights, computed per point and not per channel, are free.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from . import _dispatch, _ops
from .triton import operators as operators  # registers them

CORNERS = 4


def _formula(operator: Any) -> Callable[..., int]:
    """From the operator's arguments, shapes in the place of tensors, to its FLOPs."""
    names = [argument.name for argument in operator.default._schema.arguments]
    points = "attention_logits" if "attention_logits" in names else "attention_weights"
    needs = [name for name in names if name.startswith("need_") and name != "need_value"]

    def flops(*arguments: Any, out_shape: Any = None) -> int:
        given = dict(zip(names, arguments, strict=True))
        sums = 2 * CORNERS * math.prod(given[points]) * int(given["value"][3])
        if "grad_output" not in given:
            return sums
        # The corners' gradients, and the products of corners and the output's gradient, of which
        # all gradients of points are made.
        return sums * (given["need_value"] + any(given[need] for need in needs))

    return flops


def _register() -> None:
    log = logging.getLogger("torch.utils.flop_counter")
    disabled, log.disabled = log.disabled, True  # it warns where triton is missing
    from torch.utils.flop_counter import register_flop_formula

    log.disabled = disabled
    for contract in (_ops.MS_DEFORM_ATTN, _ops.MS_DEFORM_ATTN_FROM_OFFSETS):
        suffixes = {backend.suffix for backend in _dispatch.BACKENDS}
        backwards = {f"{suffix}_backward" for suffix in (*suffixes, "_deterministic")}
        for suffix in suffixes | backwards:
            operator = getattr(torch.ops.vitadapter_ops, contract.name + suffix)
            register_flop_formula(operator)(_formula(operator))


_register()
