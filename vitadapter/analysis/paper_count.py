# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds as published papers of this family count them.

The counter that MMDetection and MMSegmentation offered hooks some module classes and ignores all
else; the authors added the terms of self-attention by hand. Per module and image:

    Conv2d, ConvTranspose2d      multiply-adds, and one per output element for a bias
    Linear                       multiply-adds; a bias is free
    LayerNorm, GroupNorm         2 per element
    ReLU                         1 per output element
    MaxPool2d, AdaptiveAvgPool2d 1 per input element
    ViT self-attention           2 N^2 D globally, 2 N window^2 D in windows; padding is free
    dense adapter attention      2 Nq Nk D; in stripes or pales, the pairs that meet
    deformable attention         its four linear layers; sampling and weighted sum are free
    all else                     0: batch norm, GELU, softmax, resizing, functional calls
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..backbones.windows import SelfAttention
from ..layers.attention import CSwinAttention, DeformableAttention, DenseAttention
from ..layers.attention.cswin import group_counts

Rule = Callable[[Any, tuple[Any, ...], Tensor], int]


def _convolution(module: nn.Conv2d, args: tuple[Any, ...], out: Tensor) -> int:
    bias = out.numel() if module.bias is not None else 0
    return out.numel() * module.weight[0].numel() + bias


def _transposed(module: nn.ConvTranspose2d, args: tuple[Any, ...], out: Tensor) -> int:
    bias = out.numel() if module.bias is not None else 0
    return args[0].numel() * module.weight[0].numel() + bias


def _linear(module: nn.Linear, args: tuple[Any, ...], out: Tensor) -> int:
    return args[0].numel() * module.out_features


def _norm(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> int:
    return 2 * args[0].numel()


def _activation(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> int:
    return out.numel()


def _pooling(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> int:
    return args[0].numel()


def _self_attention(module: SelfAttention, args: tuple[Any, ...], out: Tensor) -> int:
    batch, tokens, dim = out.shape
    keys = tokens if module.window_size is None else module.window_size**2
    return 2 * batch * tokens * keys * dim


def _pairs(args: tuple[Any, ...]) -> int:
    """Query-key pairs times channels, for the two matrix products: 2 B Nq Nk D."""
    query, feat = args[0], args[2]
    batch, queries, dim = query.shape
    return 2 * batch * queries * feat.shape[1] * dim


def _dense(module: DenseAttention, args: tuple[Any, ...], out: Tensor) -> int:
    return _pairs(args)


def _grouped(module: CSwinAttention, args: tuple[Any, ...], out: Tensor) -> int:
    rows, columns = group_counts(args[1], args[3])
    half = _pairs(args) // 2  # of the heads
    return half // rows + half // columns


def _deformable(module: DeformableAttention, args: tuple[Any, ...], out: Tensor) -> int:
    query, feat = args[0], args[2]
    per_query = (module.sampling_offsets, module.attention_weights, module.output_proj)
    weights = sum(linear.weight.numel() for linear in per_query)
    keys = feat.shape[0] * feat.shape[1]
    return query.shape[0] * query.shape[1] * weights + keys * module.value_proj.weight.numel()


_RULES: dict[type[nn.Module], Rule] = {
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _transposed,
    nn.Linear: _linear,
    nn.LayerNorm: _norm,
    nn.GroupNorm: _norm,
    nn.ReLU: _activation,
    nn.MaxPool2d: _pooling,
    nn.AdaptiveAvgPool2d: _pooling,
    SelfAttention: _self_attention,
    DenseAttention: _dense,
    CSwinAttention: _grouped,
    DeformableAttention: _deformable,
}
# Counted as a whole: whether its linear layers run as modules is its own business.
_OPAQUE = DeformableAttention


class PaperCount:
    """Running total in multiply-adds."""

    def __init__(self) -> None:
        self.total = 0


@contextmanager
def paper_count(model: nn.Module) -> Iterator[PaperCount]:
    """Counts what `model` computes inside the `with` block."""
    count = PaperCount()

    def hook_for(rule: Rule) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            count.total += rule(module, args, out)

        return hook

    handles = []
    for module in _visible_modules(model):
        rule = next((_RULES[base] for base in type(module).__mro__ if base in _RULES), None)
        if rule is not None:
            handles.append(module.register_forward_hook(hook_for(rule)))
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def _visible_modules(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    if not isinstance(module, _OPAQUE):
        for child in module.children():
            yield from _visible_modules(child)
