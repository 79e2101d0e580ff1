# SPDX-License-Identifier: Apache-2.0
"""Every arithmetic operation of a forward pass.

One multiply-add is 1, as in published figures, and one elementwise operation is 1. Multiply-adds
are those of torch.utils.flop_counter, which counts nothing else; the tables below add the rest for
every operator that the models use. Moving data is free. An operator that is in no table raises, so
that nothing is left out silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vitadapter_ops.flops import CORNERS

# Largest element, subtract, exponential, sum, divide.
SOFTMAX = 5
# Bilinear sampling, per point: two coordinates to pixels (2), floor (2), fraction (2), complement
# (2), four corner weights (4).
BILINEAR_POINT = 12
# Deformable attention multiplies the attention weight into the four corner weights, once per point.
DEFORMABLE_POINT = BILINEAR_POINT + 4

# Operations per element of the (first) output, beside torch's multiply-adds.
_PER_OUTPUT = {
    "aten.mm": 0,
    "aten.bmm": 0,
    "aten.addmm": 1,  # the bias
    "aten.add": 1,
    "aten.add_": 1,
    "aten.sub": 1,
    "aten.mul": 1,
    "aten.div": 1,
    "aten.relu": 1,
    "aten.relu_": 1,
    "aten.clamp_min": 1,
    "aten.gelu": 5,  # x / sqrt(2), erf, + 1, * x, / 2
    "aten._softmax": SOFTMAX,
    # Mean, centre, variance as a multiply-add, scale, weight and bias as a multiply-add.
    "aten.native_layer_norm": 5,
    "aten.native_group_norm": 5,
    # In inference the statistics fold into one scale and shift: a multiply-add.
    "aten.native_batch_norm": 1,
    "aten._native_batch_norm_legit_no_training": 1,
    "aten.upsample_bilinear2d": 4,  # corners
    "aten.upsample_bicubic2d": 20,  # four rows of four taps, then one column of four
}

# Allocation, layout, copies, gathers without arithmetic.
_FREE = {
    f"aten.{name}" for name in (
        "_to_copy", "_unsafe_view", "alias", "arange", "as_strided", "cat", "clone",
        "constant_pad_nd", "copy_", "detach", "embedding", "empty", "expand", "fill_", "flip",
        "full", "new_empty", "new_full", "permute", "repeat", "select", "slice", "split",
        "split_with_sizes", "stack", "t", "transpose", "unbind", "unfold", "unsqueeze",
        "upsample_nearest2d", "view", "zeros_like",
    )
}  # fmt: skip

Rule = Callable[[Sequence[Any], Tensor], int]  # from the arguments and the first output


def _convolution_bias(args: Sequence[Any], out: Tensor) -> int:
    return 0 if args[2] is None else out.numel()


def _max_pool(args: Sequence[Any], out: Tensor) -> int:
    return out.numel() * math.prod(args[1])


def _per_input(args: Sequence[Any], out: Tensor) -> int:
    return args[0].numel()


def _grid_sample(args: Sequence[Any], out: Tensor) -> int:
    points = args[1].numel() // 2
    return points * BILINEAR_POINT + out.numel() * CORNERS


def _corner_weights(args: Sequence[Any], out: Tensor) -> int:
    return args[4].numel() * DEFORMABLE_POINT


def _points(args: Sequence[Any], out: Tensor) -> int:
    # Offset to a fraction and added to the reference, both for x and y; softmax of the logits.
    return args[6].numel() * (2 * 2 + SOFTMAX + DEFORMABLE_POINT)


_RULES: dict[str, Rule] = {
    "aten.convolution": _convolution_bias,
    "aten.max_pool2d_with_indices": _max_pool,
    "aten.avg_pool2d": _per_input,
    "aten._adaptive_avg_pool2d": _per_input,
    "aten.mean": _per_input,
    "aten.sum": _per_input,
    "aten.grid_sampler_2d": _grid_sample,
    "vitadapter_ops.ms_deform_attn": _corner_weights,
    "vitadapter_ops.ms_deform_attn_reference": _corner_weights,
    "vitadapter_ops.ms_deform_attn_from_offsets": _points,
    "vitadapter_ops.ms_deform_attn_from_offsets_reference": _points,
}


class FullCount:
    """Running total of operations."""

    def __init__(self) -> None:
        self.total = 0


@contextmanager
def full_count() -> Iterator[FullCount]:
    """Counts every operator that runs inside the `with` block; for meta tensors, in inference.

    Raises:
        NotImplementedError: an operator has no rule; the message names it.
    """
    count = FullCount()
    with _OperatorMode(count), _AttentionMode(count):
        yield count


class _OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, count: FullCount) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count = count

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(func.overloadpacket)
        first = out[0] if isinstance(out, tuple | list) else out
        if not isinstance(first, Tensor) or name in _FREE:
            return out
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            self._count.total += flops // 2
        if name in _RULES:
            self._count.total += _RULES[name](args, first)
        elif name in _PER_OUTPUT:
            self._count.total += _PER_OUTPUT[name] * first.numel()
        else:
            raise NotImplementedError(f"no cost is known for the operator {func}")
        return out


class _AttentionMode(TorchFunctionMode):
    """Counts scaled dot-product attention where it is called, before it decomposes.

    Which operators it becomes depends on device and release, so the call is counted as a whole and
    not run: scale the queries, two matrix products, softmax.
    """

    def __init__(self, count: FullCount) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        bias = kwargs.pop("attn_mask", None)
        if kwargs or len(args) != 3:
            raise NotImplementedError("no cost is known for causal, grouped or dropped attention")
        query, key, value = args
        pairs = query.shape[:-1].numel() * int(key.shape[-2])
        per_pair = int(query.shape[-1]) + SOFTMAX + int(value.shape[-1])
        if bias is not None:
            per_pair += 1
        self._count.total += query.numel() + pairs * per_pair
        return query.new_empty((*query.shape[:-1], value.shape[-1]))
