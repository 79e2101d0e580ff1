# SPDX-License-Identifier: Apache-2.0
"""Compiles a model once and refuses to compile it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor, nn


def one_dynamic_graph_serves_all(model: nn.Module, sizes: Sequence[tuple[int, int]]) -> None:
    """Fails unless the graph of the first image size gives the maps of every other one."""
    with torch.no_grad():
        batches = [torch.randn(2, 3, *size) for size in sizes]
        _one_graph_gives(lambda function, images: function(images), model, batches)


def one_dynamic_graph_trains_all(model: nn.Module, sizes: Sequence[tuple[int, int, int]]) -> None:
    """Fails unless the graphs of the first (batch, height, width) give every other one's gradients.

    Those of all parameters, in fp64.
    """
    model.double().train()

    def gradients(function: nn.Module, images: Tensor) -> Sequence[Tensor]:
        # A sum: gradients stand far above the tolerance.
        loss = sum(m.sin().sum() for m in function(images))
        return torch.autograd.grad(loss, list(model.parameters()))

    batches = [torch.randn(b, 3, h, w, dtype=torch.float64) for b, h, w in sizes]
    _one_graph_gives(gradients, model, batches)


def _one_graph_gives(
    results: Callable[[nn.Module, Tensor], Sequence[Tensor]],
    model: nn.Module,
    batches: Sequence[Tensor],
) -> None:
    """Compares what `results` says of the model with what it says of the model compiled.

    Through AOTAutograd, as Inductor's graphs are: it looks at strides too, and adds guards of its
    own. Without torch's second attempt for floats like a norm's epsilon, which doubles the time.
    """
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with mock.patch("torch._dynamo.config.specialize_float", True):
        results(compiled, batches[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            for images in batches:
                pairs = zip(results(compiled, images), results(model, images), strict=True)
                for got, expected in pairs:
                    torch.testing.assert_close(got, expected)
