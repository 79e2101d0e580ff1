# SPDX-License-Identifier: Apache-2.0
"""Parameters and operations of a model, counted without computing anything."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .full_count import full_count
from .paper_count import paper_count


@dataclass(frozen=True)
class Cost:
    """What one forward pass costs, for one image.

    Attributes:
        params: trainable parameters.
        paper: multiply-adds by the published convention, see `paper_count`.
        full: all operations, in the same unit, see `full_count`: also what the convention leaves
            out, such as the sampling of deformable attention, softmax and batch norms.
    """

    params: int
    paper: int
    full: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.paper + other.paper, self.full + other.full)


def count(model: nn.Module, image_size: tuple[int, int]) -> Cost:
    """Counts a backbone on one image [1, in_chans, H, W], in inference.

    Nothing is computed and no weight is copied: the pass runs on the meta device.

    Args:
        model: any module that takes a batch of images, of 3 channels where it has no config.
        image_size: (H, W) in pixels.

    Raises:
        NotImplementedError: the model runs an operator whose cost is not known.
    """
    in_chans = getattr(getattr(model, "config", None), "in_chans", 3)
    return count_on(model, torch.empty(1, in_chans, *image_size, device="meta"))


def count_on(module: nn.Module, inputs: Any) -> Cost:
    """`count` of any module, on inputs on the meta device."""
    params = sum(p.numel() for p in module.parameters() if p.requires_grad)
    module = _on_meta(module).eval()
    # The hooks of `paper_count` also keep layers apart: norms are counted where they stand.
    with torch.no_grad(), paper_count(module) as paper, full_count() as full:
        module(inputs)
    return Cost(params, paper.total, full.total)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes but no data."""
    memo: dict[int, Tensor] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


if __name__ == "__main__":
    raise SystemExit(
        "the published figures are compared by python -m benchmarks.paper, in a checkout"
    )
