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
from ..backbones.plain_vit import PlainViT
from ..config import ModelConfig, backbone_arguments
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
    """Counts a backbone on one image [1, in_chans, H, W], in inference.

    Nothing is computed and no weight is copied: the pass runs on the meta device.

    Args:
        model: any module that takes a batch of images, of 3 channels where it has no config.
        image_size: (H, W) in pixels.

    Raises:
        NotImplementedError: the model runs an operator whose cost is not known.
    """
    in_chans = getattr(getattr(model, "config", None), "in_chans", 3)
    return _count(model, torch.empty(1, in_chans, *image_size, device="meta"))


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


def upernet(
    embed_dim: int, image_size: tuple[int, int] = SEGMENTATION_SIZE, width: int = 512
) -> Cost:
    """UPerNet with 150 classes; its auxiliary head adds parameters only."""
    return _head(functools.partial(heads.UPerNet, embed_dim, width), embed_dim, image_size)


def setr_pup(embed_dim: int, image_size: tuple[int, int] = SEGMENTATION_SIZE) -> Cost:
    """SETR-PUP, 150 classes; its auxiliary heads add parameters only."""
    return _head(functools.partial(heads.SETRPUP, embed_dim), embed_dim, image_size)


def mask2former(
    embed_dim: int, image_size: tuple[int, int] = SEGMENTATION_SIZE, queries: int = 100
) -> Cost:
    """Mask2Former with 1024 channels, 150 classes: parameters only, its operations count as 0."""
    with torch.device("meta"):
        head = heads.Mask2Former(embed_dim, queries=queries)
    return Cost(sum(p.numel() for p in head.parameters()), 0, 0)


HeadCost = Callable[[int, tuple[int, int]], Cost]
HEADS: dict[str, tuple[str, HeadCost]] = {
    "Mask R-CNN": ("detection", mask_rcnn),
    "Cascade Mask R-CNN": ("detection", cascade_mask_rcnn),
    "ATSS": ("detection", atss),
    "GFL": ("detection", gfl),
    "Semantic FPN": ("segmentation", semantic_fpn),
    "UPerNet": ("segmentation", upernet),
    "UPerNet-1024": ("segmentation", functools.partial(upernet, width=1024)),
    "SETR-PUP": ("segmentation", setr_pup),
    "Mask2Former": ("segmentation", mask2former),
    "Mask2Former-200": ("segmentation", functools.partial(mask2former, queries=200)),
}


@dataclass(frozen=True)
class Published:
    """One row of a published table.

    Attributes:
        source: the table.
        model: a name for `create_model`.
        head: a key of `HEADS`; None: the backbone alone.
        params: millions of parameters as printed; None: not printed.
        flops: billions of multiply-adds as printed; None: not printed.
        options: arguments for `create_model`.
        part: what is counted: "all"; "vit", the ViT alone; "adapter", what table 10 calls so.
        reason: why the counted figure differs, where it does.
    """

    source: str
    model: str
    head: str | None
    params: str | None = None
    flops: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    part: str = "all"
    reason: str = ""

    def cost(self) -> Cost:
        """Counts what the row describes."""
        task = HEADS[self.head][0] if self.head else "detection"
        image_size = DETECTION_SIZE if task == "detection" else SEGMENTATION_SIZE
        side = dict(self.options).get("img_size")
        if side is not None:
            image_size = (side, side)
        embed_dim, cost = _backbone(self.model, task, self.options, self.part, image_size)
        if self.head is None:
            return cost
        return cost + HEADS[self.head][1](embed_dim, image_size)

    def title(self) -> str:
        """Model, options and head."""
        parts = [f"{key}={value}" for key, value in self.options]
        parts += [] if self.part == "all" else [self.part]
        name = f"{self.model} ({', '.join(parts)})" if parts else self.model
        return f"{name}, {self.head}" if self.head else name


@functools.cache  # many rows share a backbone
def _backbone(
    name: str,
    task: str,
    options: tuple[tuple[str, Any], ...],
    part: str,
    image_size: tuple[int, int],
) -> tuple[int, Cost]:
    """embed_dim and cost of a named model."""
    with torch.device("meta"):
        model = create_model(name, task=task, **dict(options))
        if part == "vit":
            assert isinstance(model.config, ModelConfig)
            only = _OnlyViT(**backbone_arguments(model.config, PlainViT))
    cost = count(only if part == "vit" else model, image_size)
    if part == "adapter":  # printed is the difference of the two other printed columns
        vit = _backbone(name, task, _BARE, "vit", image_size)[1]
        params = round(cost.params, -5) - round(vit.params, -5)
        cost = Cost(params, cost.paper - vit.paper, cost.full - vit.full)
    return model.embed_dim, cost


class _OnlyViT(PlainViT):
    """The ViT of a published model, without necks."""

    def forward(self, images: Tensor) -> Tensor:
        """Maps images to tokens."""
        x, _, steps = self.start(images)
        for step in steps:
            x = step(x)
        return x


_SIZES = ("tiny", "small", "base", "large")
# The base model's rows count a 384-pixel position grid except in detection: only so do the sums
# give the printed digits.
_384 = (("pretrain_size", 384),)
# Table 10 counts the ViT itself as DeiT has it.
_BARE = (("pretrain_size", 224), ("layer_scale", False))
_PALE = "our reading of an attention without published code; what adds 2 G is not known"
_SETR = "probably copied from the SETR paper"
_TWICE = "rounded twice: 43.747, 43.75, 43.8"
# At least 0.42 M would have to be missing. Not from what the BEiT rows share: the 571 of table 9
# leaves 0.24 M. UPerNet has no such part beside its 451 for 512 pixels, which leaves 0.55 M.
_CROP = (
    "451 are the bias tables of any crop from 416 to 576; no single other part has the missing size"
)
_M2F = "no configuration was published; counted with the head of the BEiT models"
_SLIDE = "limitations"


def _table(source: str, head: str | None, cells: str, **options: Any) -> list[Published]:
    """Rows with the same head: "model params[/flops] model params ..."."""
    words = cells.split()
    rows = []
    for model, figures in zip(words[::2], words[1::2], strict=True):
        name, *switches = model.split("+")
        params, _, flops = figures.partition("/")
        extra = _384 if "384" in switches else ()
        rows.append(
            Published(source, name, head, params, flops or None, (*options.items(), *extra))
        )
    return rows


PUBLISHED = (
    *_table(
        "table 1", "Mask R-CNN",
        "vit_tiny 26.1 vitdet_tiny 26.6 vit_adapter_tiny 28.1 "
        "vitdet_small 45.7 vit_adapter_small 47.8 "
        "vit_base 113.6 vitdet_base 121.3 vit_adapter_base 120.2 "
        "vit_large 337.3 vitdet_large 350.9 vit_adapter_large 347.9",
    ),
    Published("table 1", "vit_small", "Mask R-CNN", "43.8", reason=_TWICE),
    *_table(
        "table 2", "Cascade Mask R-CNN",
        "vit_small 82 vit_adapter_small 86 vit_base 151 vit_adapter_base 158",
    ),
    *_table("table 2", "ATSS", "vit_small 32 vit_adapter_small 36"),
    *_table("table 2", "GFL", "vit_small 32 vit_adapter_small 36"),
    *_table(
        "table 3", "Semantic FPN",
        "vit_tiny 10.2 vit_adapter_tiny 12.2 vit_small 27.8 vit_adapter_small 31.9 "
        "vit_base+384 98.0 vit_adapter_base+384 104.6 vit_adapter_large 332.0",
    ),
    *_table(
        "table 3", "UPerNet",
        "vit_tiny 34.1 vit_adapter_tiny 36.1 vit_small 53.6 vit_adapter_small 57.6 "
        "vit_base+384 127.3 vit_adapter_base+384 133.9 vit_adapter_large 363.8",
    ),
    *_table("table 6", "Mask R-CNN", "vit_adapter_small 45.1", components="spm"),
    *_table("table 6", "Mask R-CNN", "vit_adapter_small 46.6", components="spm+injector"),
    Published(
        "table 6", "vit_adapter_small", "Mask R-CNN", "43.8",
        options=(("num_interactions", 0),), reason=_TWICE,
    ),
    *_table("table 6", "Mask R-CNN", "vit_adapter_small 45.5", num_interactions=1),
    *_table("table 6", "Mask R-CNN", "vit_adapter_small 46.2", num_interactions=2),
    *_table("table 6", "Mask R-CNN", "vit_adapter_small 47.8", num_interactions=4),
    *_table("table 6", "Mask R-CNN", "vit_adapter_small 49.4", num_interactions=6),
    *_table("table 7", "Mask R-CNN", "vit_adapter_small 50.3/1080", attention="dense"),
    *_table("table 7", "Mask R-CNN", "vit_adapter_small 50.3/456", attention="cswin"),
    Published(
        "table 7", "vit_adapter_small", "Mask R-CNN", "50.3", "458",
        (("attention", "pale"),), reason=_PALE,
    ),
    *_table("table 7", "Mask R-CNN", "vit_adapter_small 47.8/403"),
    *_table("table 9", "UPerNet-1024", "beit_large 441", img_size=640),
    Published(
        "table 9", "beit_adapter_large", "UPerNet-1024", "451",
        options=(("img_size", 640),), reason=_CROP,
    ),
    *_table("table 9", "UPerNet-1024", "beit_adapter_large 451", img_size=512),
    *_table("table 9", "Mask2Former", "beit_adapter_large 568", img_size=640),
    *_table("table 9", "Mask2Former-200", "beit_adapter_large 571", img_size=896),
    Published("table 9", "vit_adapter_large", "Mask2Former", "438", reason=_M2F),
    *(
        Published("table 10", f"vit_adapter_{size}", None, params, options=_BARE, part="vit")
        for size, params in zip(_SIZES, ("5.5", "21.7", "85.8", "303.3"), strict=True)
    ),
    *(
        Published(
            "table 10", f"vit_adapter_{size}", None, params,
            options=_384 if size == "base" else (), part="adapter",
        )
        for size, params in zip(_SIZES, ("2.5", "5.8", "14.0", "23.7"), strict=True)
    ),
    *_table(
        "table 10", None,
        "vit_adapter_tiny 8.0 vit_adapter_small 27.5 vit_adapter_base+384 99.8 "
        "vit_adapter_large 327.0",
    ),
    Published(
        _SLIDE, "vit_base", "SETR-PUP", "98", "170", options=_384, part="vit", reason=_SETR
    ),
    Published(_SLIDE, "vit_large", "SETR-PUP", "318", "425", part="vit", reason=_SETR),
    *_table(
        _SLIDE, "Semantic FPN",
        "vit_base+384 98/147 vit_adapter_base+384 105/183 vit_large 321/414 "
        "vit_adapter_large_light 324/445 vit_adapter_large 332/473",
    ),
)  # fmt: skip


def rounded(number: int, unit: float, printed: str) -> str:
    """`number` / `unit` with as many decimals as `printed` has."""
    decimals = len(printed.partition(".")[2])
    return f"{number / unit:.{decimals}f}"


def comparison() -> list[tuple[str, ...]]:
    """Rows of text: source, model, figure, published, counted, difference, full count, reason."""
    rows: list[tuple[str, ...]] = []
    for row in PUBLISHED:
        cost = row.cost()
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
            rows.append(
                (row.source, row.title(), figure, printed, counted, difference, full, reason)
            )
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
