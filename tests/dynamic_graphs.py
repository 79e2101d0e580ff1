# SPDX-License-Identifier: Apache-2.0
"""Compiles a model once and refuses to compile it again."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import torch
from torch import nn


def one_dynamic_graph_serves_all(model: nn.Module, sizes: Sequence[tuple[int, int]]) -> None:
    """Fails unless the graph of the first image size gives the maps of every other one.

    Through AOTAutograd, as Inductor's graphs are: it looks at strides too, and adds guards of its
    own. Without torch's second attempt for floats like a norm's epsilon, which doubles the time.
    """
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad(), mock.patch("torch._dynamo.config.specialize_float", True):
        compiled(torch.randn(2, 3, *sizes[0]))
        with torch.compiler.set_stance("fail_on_recompile"):
            for size in sizes:
                images = torch.randn(2, 3, *size)
                for got, expected in zip(compiled(images), model(images), strict=True):
                    torch.testing.assert_close(got, expected)
