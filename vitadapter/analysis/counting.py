# SPDX-License-Identifier: Apache-2.0
"""Parameters and operations of models and of the published detectors and segmentors.

`python -m vitadapter.analysis.counting` compares every published figure with the counted one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import ViTAdapter
from ..models import create_model
from . import heads
from .full_count import full_count
from .paper_count import paper_count

DETECTION_SIZE = (800, 1280)
SEGMENTATION_SIZE = (512, 512)


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
    """Counts a backbone on one image [1, 3, H, W], in inference.

    Nothing is computed and no weight is copied: the pass runs on the meta device.

    Args:
        model: any module that takes a batch of images.
        image_size: (H, W) in pixels.

    Raises:
        NotImplementedError: the model runs an operator whose cost is not known.
    """
    return _count(model, torch.empty(1, 3, *image_size, device="meta"))


def _count(module: nn.Module, inputs: Any) -> Cost:
    params = sum(p.numel() for p in module.parameters() if p.requires_grad)
    module = _on_meta(module).eval()
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


def _head(build: Callable[[], nn.Module], embed_dim: int, image_size: tuple[int, int]) -> Cost:
    height, width = image_size
    maps = [
        torch.empty(1, embed_dim, -(-height // stride), -(-width // stride), device="meta")
        for stride in ViTAdapter.strides
    ]
    with torch.device("meta"):
        head = build()
    return _count(head, maps)


def mask_rcnn(embed_dim: int, image_size: tuple[int, int] = DETECTION_SIZE) -> Cost:
    """Mask R-CNN around a backbone with `embed_dim` channels: 1000 boxes, 100 masks."""
    return _head(functools.partial(heads.MaskRCNN, embed_dim), embed_dim, image_size)


def cascade_mask_rcnn(embed_dim: int, image_size: tuple[int, int] = DETECTION_SIZE) -> Cost:
    """Cascade Mask R-CNN, three stages: 1000 boxes and 100 masks in each."""
    return _head(functools.partial(heads.MaskRCNN, embed_dim, cascade=True), embed_dim, image_size)


def atss(embed_dim: int, image_size: tuple[int, int] = DETECTION_SIZE) -> Cost:
    """ATSS."""
    build = functools.partial(heads.DenseDetector, embed_dim, box_outputs=4, centerness=True)
    return _head(build, embed_dim, image_size)


def gfl(embed_dim: int, image_size: tuple[int, int] = DETECTION_SIZE) -> Cost:
    """GFL: each side of a box is a distribution over 17 values."""
    build = functools.partial(heads.DenseDetector, embed_dim, box_outputs=4 * 17, centerness=False)
    return _head(build, embed_dim, image_size)


def semantic_fpn(embed_dim: int, image_size: tuple[int, int] = SEGMENTATION_SIZE) -> Cost:
    """Semantic FPN, 150 classes."""
    return _head(functools.partial(heads.SemanticFPN, embed_dim), embed_dim, image_size)


def upernet(embed_dim: int, image_size: tuple[int, int] = SEGMENTATION_SIZE) -> Cost:
    """UPerNet with 512 channels, 150 classes; its auxiliary head adds parameters only."""
    return _head(functools.partial(heads.UPerNet, embed_dim), embed_dim, image_size)


HEADS: dict[str, tuple[str, Callable[[int, tuple[int, int]], Cost]]] = {
    "Mask R-CNN": ("detection", mask_rcnn),
    "Cascade Mask R-CNN": ("detection", cascade_mask_rcnn),
    "ATSS": ("detection", atss),
    "GFL": ("detection", gfl),
    "Semantic FPN": ("segmentation", semantic_fpn),
    "UPerNet": ("segmentation", upernet),
}


@dataclass(frozen=True)
class Published:
    """One row of a published table.

    Attributes:
        source: the table.
        size: tiny, small, base or large.
        head: a key of `HEADS`; None: the backbone alone.
        params: millions of parameters as printed; None: not printed.
        flops: billions of multiply-adds as printed; None: not printed.
        attention: the adapter's attention.
        num_interactions: injector-extractor pairs.
        pretrain_size: pixels; sets the position grid, and with it the parameters.
        reason: why the counted figure differs, where it does.
    """

    source: str
    size: str
    head: str | None
    params: str | None = None
    flops: str | None = None
    attention: str = "deformable"
    num_interactions: int = 4
    pretrain_size: int | None = None
    reason: str = ""

    def cost(self) -> Cost:
        """Counts what the row describes."""
        task = HEADS[self.head][0] if self.head else "detection"
        image_size = DETECTION_SIZE if task == "detection" else SEGMENTATION_SIZE
        embed_dim, backbone = _backbone(
            self.size, task, self.attention, self.num_interactions, self.pretrain_size, image_size
        )
        if self.head is None:
            return backbone
        return backbone + HEADS[self.head][1](embed_dim, image_size)


@functools.cache  # many rows share a backbone
def _backbone(
    size: str,
    task: str,
    attention: str,
    num_interactions: int,
    pretrain_size: int | None,
    image_size: tuple[int, int],
) -> tuple[int, Cost]:
    """embed_dim and cost of a named model."""
    with torch.device("meta"):
        model = create_model(
            f"vit_adapter_{size}",
            task=task,
            attention=attention,
            num_interactions=num_interactions,
            pretrain_size=pretrain_size,
        )
    return model.embed_dim, count(model, image_size)


_PALE = "our reading of an attention without published code; what adds 2 G is not known"
_SLIDE = "slide, limitations"

# The base model's rows count a 384-pixel position grid except in detection: only so do the sums
# give the printed digits.
PUBLISHED = (
    Published("table 10", "tiny", None, params="8.0"),
    Published("table 10", "small", None, params="27.5"),
    Published("table 10", "base", None, params="99.8", pretrain_size=384),
    Published("table 10", "large", None, params="327.0"),
    Published("table 1", "tiny", "Mask R-CNN", params="28.1"),
    Published("table 1", "small", "Mask R-CNN", params="47.8"),
    Published("table 1", "base", "Mask R-CNN", params="120.2"),
    Published("table 1", "large", "Mask R-CNN", params="347.9"),
    Published("table 2", "small", "Cascade Mask R-CNN", params="86"),
    Published("table 2", "base", "Cascade Mask R-CNN", params="158"),
    Published("table 2", "small", "ATSS", params="36"),
    Published("table 2", "small", "GFL", params="36"),
    Published("table 3", "tiny", "Semantic FPN", params="12.2"),
    Published("table 3", "small", "Semantic FPN", params="31.9"),
    Published("table 3", "base", "Semantic FPN", params="104.6", pretrain_size=384),
    Published("table 3", "large", "Semantic FPN", params="332.0"),
    Published("table 3", "tiny", "UPerNet", params="36.1"),
    Published("table 3", "small", "UPerNet", params="57.6"),
    Published("table 3", "base", "UPerNet", params="133.9", pretrain_size=384),
    Published("table 3", "large", "UPerNet", params="363.8"),
    Published("table 6", "small", "Mask R-CNN", params="45.5", num_interactions=1),
    Published("table 6", "small", "Mask R-CNN", params="46.2", num_interactions=2),
    Published("table 6", "small", "Mask R-CNN", params="47.8", num_interactions=4),
    Published("table 6", "small", "Mask R-CNN", params="49.4", num_interactions=6),
    Published("table 7", "small", "Mask R-CNN", "50.3", "1080", attention="dense"),
    Published("table 7", "small", "Mask R-CNN", "50.3", "456", attention="cswin"),
    Published("table 7", "small", "Mask R-CNN", "50.3", "458", attention="pale", reason=_PALE),
    Published("table 7", "small", "Mask R-CNN", "47.8", "403"),
    Published(_SLIDE, "base", "Semantic FPN", "105", "183", pretrain_size=384),
    Published(_SLIDE, "large", "Semantic FPN", "332", "473"),
)


def rounded(number: int, unit: float, printed: str) -> str:
    """`number` / `unit` with as many decimals as `printed` has."""
    decimals = len(printed.partition(".")[2])
    return f"{number / unit:.{decimals}f}"


def comparison() -> list[tuple[str, ...]]:
    """Rows of text: source, model, figure, published, counted, difference, full count, reason."""
    rows: list[tuple[str, ...]] = []
    for row in PUBLISHED:
        cost = row.cost()
        model = f"ViT-Adapter-{row.size[0].upper()}"
        if row.attention != "deformable":
            model += f" ({row.attention})"
        if row.num_interactions != 4:
            model += f" N={row.num_interactions}"
        if row.head:
            model += f", {row.head}"
        figures = (
            ("params [M]", row.params, cost.params, 1e6, ""),
            ("FLOPs [G]", row.flops, cost.paper, 1e9, f"{cost.full / 1e9:.1f}"),
        )
        for figure, printed, number, unit, full in figures:
            if printed is None:
                continue
            exact = rounded(number, unit, printed) == printed
            difference = "0" if exact else f"{number / unit - float(printed):+.2f}"
            counted = f"{number / unit:.2f}"
            reason = "" if exact else row.reason or "unexplained"
            rows.append((row.source, model, figure, printed, counted, difference, full, reason))
    return rows


def main() -> None:
    """Prints the comparison."""
    header = ("source", "model", "figure", "published", "counted", "diff", "full", "reason")
    table = [header, *comparison()]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print()
    print(
        "counted: the published convention, where G means 1e9 multiply-adds; diff 0: equal to the"
    )
    print("printed digit. full: the same pass with nothing left out (sampling, softmax, norms,")
    print("resizing). Cells for which no configuration was published are not listed.")


if __name__ == "__main__":
    main()
