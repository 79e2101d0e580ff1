# SPDX-License-Identifier: Apache-2.0
"""Costs of backbones and of the heads around them, by the papers' convention and in full."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper import cost_heads
from vitadapter import ViTAdapter
from vitadapter.analysis.counting import Cost, count, count_on
from vitadapter.backbones.plain_vit import PlainViT
from vitadapter.config import backbone_arguments
from vitadapter.models import create_model

Size = tuple[int, int]  # height, width
Options = tuple[tuple[str, Any], ...]  # arguments of create_model

SIZES: dict[str, Size] = {"detection": (800, 1280), "segmentation": (512, 512)}


@dataclass(frozen=True)
class Head:
    """A detector or segmentor but for its backbone.

    Attributes:
        task: as `create_model` has it.
        build: from the channels of the backbone's maps to the module.
        runs: whether it has operations; else only its parameters count.
    """

    task: str
    build: Callable[[int], nn.Module]
    runs: bool = True


_Dense = cost_heads.DenseDetector
HEADS = {
    "Mask R-CNN": Head("detection", cost_heads.MaskRCNN),
    "Cascade Mask R-CNN": Head("detection", functools.partial(cost_heads.MaskRCNN, cascade=True)),
    "ATSS": Head("detection", functools.partial(_Dense, box_outputs=4, centerness=True)),
    # Each side of a box is a distribution over 17 values.
    "GFL": Head("detection", functools.partial(_Dense, box_outputs=4 * 17, centerness=False)),
    "Semantic FPN": Head("segmentation", cost_heads.SemanticFPN),
    "UPerNet": Head("segmentation", cost_heads.UPerNet),
    "UPerNet-1024": Head("segmentation", functools.partial(cost_heads.UPerNet, width=1024)),
    "SETR-PUP": Head("segmentation", cost_heads.SETRPUP),
    "Mask2Former": Head("segmentation", cost_heads.Mask2Former, runs=False),
    "Mask2Former-200": Head(
        "segmentation", functools.partial(cost_heads.Mask2Former, queries=200), runs=False
    ),
}


@functools.cache  # many rows share a head
def head_cost(name: str, embed_dim: int, image_size: Size) -> Cost:
    """A head of `HEADS` around a backbone with `embed_dim` channels."""
    head = HEADS[name]
    with torch.device("meta"):
        module = head.build(embed_dim)
        if not head.runs:
            return Cost(sum(p.numel() for p in module.parameters()), 0, 0)
        sizes = [[-(-side // stride) for side in image_size] for stride in ViTAdapter.strides]
        return count_on(module, [torch.empty(1, embed_dim, *size) for size in sizes])


class _OnlyViT(PlainViT):
    """The ViT of a published model, without necks."""

    def forward(self, images: Tensor) -> Tensor:
        """Maps images to tokens."""
        x, _, steps = self.start(images)
        for step in steps:
            x = step(x)
        return x


@functools.cache
def backbone_cost(
    name: str, task: str, options: Options, only_vit: bool, image_size: Size
) -> tuple[int, Cost]:
    """embed_dim and cost of a named model, or of its ViT alone."""
    with torch.device("meta"):
        model = create_model(name, task=task, **dict(options))
        counted = _OnlyViT(**backbone_arguments(model.config, PlainViT)) if only_vit else model
    return model.embed_dim, count(counted, image_size)
