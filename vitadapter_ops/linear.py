# SPDX-License-Identifier: Apache-2.0
"""Linear layers by oneDNN where it is faster than torch's default."""

from __future__ import annotations

import functools
import platform
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _ops


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, without a gradient by oneDNN for fp32 and bf16 on a CPU, also under autocast.

    There torch writes the bias into the result and lets the product be added. oneDNN needs one
    pass. For fp32 it is as fast as MKL on Intel's processors and faster on AMD's (22.5 instead of
    25.7 ms for 1024 tokens, 768 to 3072 channels, on two cores); for bf16, with the conversion of
    the weights that autocast makes, it takes two thirds to all of the time.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.

    Returns:
        [..., N], in the dtype that F.linear gives.

    Raises:
        RuntimeError: F.linear's, for shapes, dtypes or devices that disagree.
    """
    dtype = _onednn_dtype(x, weight, bias)
    if dtype is None:
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.to(dtype)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.to(dtype), weight.to(dtype), bias, "none", [], ""
    )
    return product


def _onednn_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """In what dtype oneDNN computes the product; None: torch's default is to do it."""
    # Those who look at what is called know F.linear: compilers, tracers, transforms, counters of
    # FLOPs, modes, forward mode, which no_grad does not switch off, and whoever put another
    # function in its place.
    if (
        torch.is_grad_enabled()
        or not _ops.is_plain()
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._is_torch_function_mode_enabled()
        or F.linear is not torch._C._nn.linear
        or not torch._C._get_mkldnn_enabled()
    ):
        return None
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        convertible = {torch.float32, dtype}
    else:
        dtype = x.dtype
        convertible = {dtype}
    if dtype not in _onednn_dtypes():
        return None
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if (
            not is_plain_tensor(tensor)
            or tensor.device.type != "cpu"
            or tensor.layout is not torch.strided
            or tensor.dtype not in convertible
        ):
            return None
    # oneDNN ignores the strides of a bias, refuses weights whose rows overlap and sums of no terms,
    # and its errors name no argument.
    if (
        weight.dim() != 2
        or x.shape[-1:] != weight.shape[1:]
        or x.numel() == 0
        or weight.numel() == 0
        or not weight.is_contiguous()
        or (bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()))
    ):
        return None
    return dtype


@functools.cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN multiplies here; torch may be built without it."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bf16 else (torch.float32,)


def warn_if_slow_autocast(x: Tensor) -> None:
    """Warns, once per process and dtype, where autocast makes training slower instead of faster.

    torch's products of 16-bit matrices need the processor's own: without AMX a step in bf16 takes
    1.1 to 10 times as long as in fp32, and without AVX512-FP16 a step in fp16 6 to 27 times
    (docs/cpu.md).

    For a module that trains to call from its forward; costs a fraction of a microsecond, nothing in
    a compiled graph. Without gradients, on other devices than CPUs and outside autocast it does
    nothing.

    Args:
        x: the module's input or output; only its device matters.
    """
    if (
        torch.is_autocast_enabled("cpu")
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
    ):
        _warn_if_slow(torch.get_autocast_dtype("cpu"))


@functools.cache
def _warn_if_slow(dtype: torch.dtype) -> None:
    # Arm's processors were not measured.
    if platform.machine() not in ("x86_64", "AMD64"):
        return
    if dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported():
        lacking, times = "AMX", "1.1 to 10"
    elif dtype == torch.float16 and not _multiplies_fp16():
        lacking, times = "AVX512-FP16", "6 to 27"
    else:
        return
    name = str(dtype).removeprefix("torch.")
    warnings.warn(
        f'training under torch.autocast("cpu", {dtype}) is slower than in float32 on this '
        f"processor, which has no {lacking}: torch's {name} products take {times} times as long",
        stacklevel=3,
    )


def _multiplies_fp16() -> bool:
    """Whether oneDNN multiplies fp16 here; torch may be built without it."""
    mkldnn = torch.ops.mkldnn
    return hasattr(mkldnn, "_is_mkldnn_fp16_supported") and mkldnn._is_mkldnn_fp16_supported()


def is_untouched(layer: nn.Module) -> bool:
    """Whether calling the layer and all below it does what their classes say and nothing else.

    accelerate puts another forward into a layer to fetch offloaded weights, compile() puts one
    before it, hooks want to be called, those of all modules (torch.nn.modules.module) included,
    and tracers and profilers put functions of their own into classes.
    """
    return not _has_global_hooks() and all(map(_is_untouched, layer.modules()))


def _has_global_hooks() -> bool:
    """Whether there are hooks that are called with every module."""
    hooks = torch.nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def _is_untouched(layer: nn.Module) -> bool:
    """is_untouched without what is below the layer and without the hooks of all modules."""
    own, kind = vars(layer), type(layer)
    return not (
        "forward" in own
        or "_call_impl" in own
        or layer._compiled_call_impl is not None
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or module_of(kind, "forward") != kind.__module__
        or module_of(kind, "__call__") != nn.Module.__module__
        or module_of(kind, "_call_impl") != nn.Module.__module__
    )


def module_of(kind: type, name: str) -> str | None:
    """The module whose text defines a class's function, which functools.wraps does not change."""
    # TorchScript's classes have no functions.
    return getattr(getattr(kind, name, None), "__globals__", {}).get("__name__")


def is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer is a matrix product plus a bias and nothing else.

    Adapters, quantisers and parametrizations put a module of another type in its place, or leave
    the layer and give it a weight of another type.
    """
    return (
        type(layer) is nn.Linear
        and is_plain_tensor(layer.weight)
        and is_plain_tensor(layer.bias)
        and not _has_global_hooks()
        and _is_untouched(layer)
    )


def is_plain_tensor(x: object) -> bool:
    """Whether x is a tensor, or a parameter, of no class of its own.

    Quantised, sharded and other tensors of their own classes decide what a product is: they know
    F.linear, and not always torch.cat.
    """
    return type(x) in (Tensor, nn.Parameter)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), by `linear` where the layer is a plain one.

    In training the result of a plain layer is no view, as that of F.linear is: modules return it,
    and FSDP2 warns of modules that return views.
    """
    if not is_plain(layer):
        result: Tensor = layer(x)
        return result
    plain: Any = layer
    if (
        torch.is_grad_enabled()
        and _ops.is_plain()
        and is_plain_tensor(x)
        and x.dim() > 2
        and x.is_contiguous()
    ):
        rows = linear(x.flatten(0, -2), plain.weight, plain.bias)
        joined: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[1]])
        return joined
    return linear(x, plain.weight, plain.bias)
