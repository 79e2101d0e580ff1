# SPDX-License-Identifier: Apache-2.0
"""The detectors and segmentors of the published tables, for counting only.

Layer for layer what MMDetection 2.22 and MMSegmentation 0.20 build around a backbone with four maps
of `embed_dim` channels, up to the raw outputs: no box decoding, no suppression, no losses. Where
those packages call a function instead of a module, so do these, because the published convention
counts modules only. Maps have strides 4, 8, 16, 32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_ops import MSDeformAttn

COCO_CLASSES = 80
ADE20K_CLASSES = 150
BOX_ROIS = 1000
MASK_ROIS = 100
_WIDTH = 256


def _conv_norm_relu(
    inputs: int, outputs: int, kernel: int = 3, norm: str = "batch"
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(32, outputs),
        nn.ReLU(),
    )


class FPN(nn.Module):
    """Feature pyramid network; extra levels by 3x3 stride-2 convolutions or by subsampling."""

    def __init__(self, embed_dim: int, levels: int, extra_convs: int, subsample: bool) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(embed_dim, _WIDTH, 1) for _ in range(levels))
        self.output = nn.ModuleList(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1) for _ in range(levels))
        self.extra = nn.ModuleList(
            nn.Conv2d(_WIDTH, _WIDTH, 3, stride=2, padding=1) for _ in range(extra_convs)
        )
        self.subsample = subsample

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps the last `levels` of `maps` to as many plus the extra levels, finest first."""
        used = maps[len(maps) - len(self.lateral) :]
        laterals = [conv(level) for conv, level in zip(self.lateral, used, strict=True)]
        for index in range(len(laterals) - 1, 0, -1):
            finer = laterals[index - 1]
            size = (finer.shape[2], finer.shape[3])
            laterals[index - 1] = finer + F.interpolate(laterals[index], size=size)
        outputs = [conv(level) for conv, level in zip(self.output, laterals, strict=True)]
        for conv in self.extra:
            outputs.append(conv(outputs[-1]))
        if self.subsample:
            outputs.append(outputs[-1][:, :, ::2, ::2])
        return outputs


class RPNHead(nn.Module):
    """Region proposals, three anchors per position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1)
        self.score = nn.Conv2d(_WIDTH, 3, 1)
        self.box = nn.Conv2d(_WIDTH, 12, 1)

    def forward(self, levels: Sequence[Tensor]) -> None:
        """Runs on every level."""
        for level in levels:
            x = F.relu(self.conv(level))
            self.score(x)
            self.box(x)


def roi_align(level: Tensor, rois: int, size: int) -> Tensor:
    """RoIAlign with 2x2 samples per bin: bilinear samples, then their mean: [rois, C, size, size].

    Which level a box reads does not change the cost, so all read one.
    """
    grid = level.new_empty((rois, 2 * size, 2 * size, 2))
    samples = F.grid_sample(level.expand(rois, -1, -1, -1), grid, align_corners=False)
    return F.avg_pool2d(samples, 2)


class BoxHead(nn.Module):
    """Two fully connected layers, or four convolutions and one; then classes and boxes."""

    def __init__(self, convs: int, fcs: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(_conv_norm_relu(_WIDTH, _WIDTH) for _ in range(convs)))
        widths = [_WIDTH * 7 * 7] + [1024] * fcs
        self.fcs = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())
                for inputs, outputs in itertools.pairwise(widths)
            )
        )
        self.score = nn.Linear(1024, COCO_CLASSES + 1)
        self.box = nn.Linear(1024, 4 * COCO_CLASSES)

    def forward(self, level: Tensor) -> None:
        """Runs on `BOX_ROIS` boxes."""
        x = self.fcs(self.convs(roi_align(level, BOX_ROIS, 7)).flatten(1))
        self.score(x)
        self.box(x)


class MaskHead(nn.Module):
    """Four convolutions, an upsampling and one mask per class."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1), nn.ReLU()) for _ in range(4))
        )
        self.up = nn.ConvTranspose2d(_WIDTH, _WIDTH, 2, stride=2)
        self.relu = nn.ReLU()
        self.mask = nn.Conv2d(_WIDTH, COCO_CLASSES, 1)

    def forward(self, level: Tensor) -> None:
        """Runs on `MASK_ROIS` boxes."""
        self.mask(self.relu(self.up(self.convs(roi_align(level, MASK_ROIS, 14)))))


class MaskRCNN(nn.Module):
    """Mask R-CNN; with three stages of 4-convolution box heads, Cascade Mask R-CNN."""

    def __init__(self, embed_dim: int, cascade: bool = False) -> None:
        super().__init__()
        self.fpn = FPN(embed_dim, levels=4, extra_convs=0, subsample=True)
        self.rpn = RPNHead()
        stages = 3 if cascade else 1
        convs, fcs = (4, 1) if cascade else (0, 2)
        self.boxes = nn.ModuleList(BoxHead(convs, fcs) for _ in range(stages))
        self.masks = nn.ModuleList(MaskHead() for _ in range(stages))

    def forward(self, maps: Sequence[Tensor]) -> None:
        """Runs everything once."""
        levels = self.fpn(maps)
        self.rpn(levels)
        for head in (*self.boxes, *self.masks):
            head(levels[0])


class DenseDetector(nn.Module):
    """ATSS or GFL: two towers of four GN convolutions, shared by five levels.

    Args:
        embed_dim: channels of the backbone's maps.
        box_outputs: channels of the box prediction.
        centerness: predict centerness too.
    """

    def __init__(self, embed_dim: int, box_outputs: int, centerness: bool) -> None:
        super().__init__()
        self.fpn = FPN(embed_dim, levels=3, extra_convs=2, subsample=False)
        self.score_tower = nn.Sequential(*(_tower_layer() for _ in range(4)))
        self.box_tower = nn.Sequential(*(_tower_layer() for _ in range(4)))
        self.score = nn.Conv2d(_WIDTH, COCO_CLASSES, 3, padding=1)
        self.box = nn.Conv2d(_WIDTH, box_outputs, 3, padding=1)
        self.centerness = nn.Conv2d(_WIDTH, 1, 3, padding=1) if centerness else None
        self.scales = nn.ParameterList(torch.ones(()) for _ in range(5))

    def forward(self, maps: Sequence[Tensor]) -> None:
        """Runs everything once."""
        for level, scale in zip(self.fpn(maps), self.scales, strict=True):
            self.score(self.score_tower(level))
            x = self.box_tower(level)
            _ = self.box(x) * scale
            if self.centerness is not None:
                self.centerness(x)


def _tower_layer() -> nn.Sequential:
    return _conv_norm_relu(_WIDTH, _WIDTH, norm="group")


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _resize(x, (2 * x.shape[2], 2 * x.shape[3]))


class SemanticFPN(nn.Module):
    """Semantic FPN: every level convolved and upsampled to stride 4, summed, classified."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fpn = FPN(embed_dim, levels=4, extra_convs=0, subsample=False)
        self.branches = nn.ModuleList(
            nn.Sequential(
                *(
                    nn.Sequential(
                        _conv_norm_relu(_WIDTH if index == 0 else 128, 128),
                        nn.Identity() if stride == 4 else _Double(),
                    )
                    for index in range(count)
                )
            )
            for stride, count in ((4, 1), (8, 1), (16, 2), (32, 3))
        )
        self.classify = nn.Conv2d(128, ADE20K_CLASSES, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps the backbone's maps to logits of the image's size."""
        first, *others = (
            branch(level) for branch, level in zip(self.branches, self.fpn(maps), strict=True)
        )
        for other in others:
            first = first + other
        logits = self.classify(first)
        return _resize(logits, (4 * logits.shape[2], 4 * logits.shape[3]))


class UPerNet(nn.Module):
    """UPerNet with its auxiliary head, which has parameters but does not run in inference."""

    def __init__(self, embed_dim: int, width: int = 512) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), _conv_norm_relu(embed_dim, width, kernel=1))
            for size in (1, 2, 3, 6)
        )
        self.bottleneck = _conv_norm_relu(embed_dim + 4 * width, width)
        self.lateral = nn.ModuleList(_conv_norm_relu(embed_dim, width, kernel=1) for _ in range(3))
        self.output = nn.ModuleList(_conv_norm_relu(width, width) for _ in range(3))
        self.fuse = _conv_norm_relu(4 * width, width)
        self.classify = nn.Conv2d(width, ADE20K_CLASSES, 1)
        self.auxiliary = nn.Sequential(
            _conv_norm_relu(embed_dim, 256), nn.Conv2d(256, ADE20K_CLASSES, 1)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps the backbone's maps to logits of the image's size."""
        coarsest = maps[-1]
        size = (coarsest.shape[2], coarsest.shape[3])
        pooled = [_resize(pool(coarsest), size) for pool in self.pools]
        levels = [conv(level) for conv, level in zip(self.lateral, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for index in range(3, 0, -1):
            finer = levels[index - 1]
            levels[index - 1] = finer + _resize(levels[index], (finer.shape[2], finer.shape[3]))
        outputs = [conv(level) for conv, level in zip(self.output, levels[:-1], strict=True)]
        outputs.append(levels[-1])
        finest = (outputs[0].shape[2], outputs[0].shape[3])
        resized = [outputs[0], *(_resize(level, finest) for level in outputs[1:])]
        logits = self.classify(self.fuse(torch.cat(resized, dim=1)))
        return _resize(logits, (4 * finest[0], 4 * finest[1]))


class SETRPUP(nn.Module):
    """SETR's progressive upsampling of the stride-16 map: four convolutions, four doublings."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.ups = nn.Sequential(
            *(
                nn.Sequential(_conv_norm_relu(_WIDTH if index else embed_dim, _WIDTH), _Double())
                for index in range(4)
            )
        )
        self.classify = nn.Conv2d(_WIDTH, ADE20K_CLASSES, 1)
        # Three more with a single convolution each, which do not run in inference.
        self.auxiliary = nn.ModuleList(
            nn.ModuleList(
                (
                    nn.LayerNorm(embed_dim),
                    _conv_norm_relu(embed_dim, _WIDTH),
                    nn.Conv2d(_WIDTH, ADE20K_CLASSES, 1),
                )
            )
            for _ in range(3)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps the backbone's maps to logits of the image's size."""
        x = self.norm(maps[2].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classify(self.ups(x))


class Mask2Former(nn.Module):
    """The parameters of Mask2Former's head; no published figure needs its operations.

    Args:
        embed_dim: channels of the backbone's maps.
        width: channels of the head.
        heads: of its attentions.
        hidden: of its feed-forward networks.
        queries: number of masks.
    """

    def __init__(
        self,
        embed_dim: int,
        width: int = 1024,
        heads: int = 32,
        hidden: int = 4096,
        queries: int = 100,
    ) -> None:
        super().__init__()
        levels = 3
        self.inputs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(embed_dim, width, 1), nn.GroupNorm(32, width))
            for _ in range(levels)
        )
        self.encoder = nn.ModuleList(
            nn.ModuleList(
                (
                    MSDeformAttn(width, levels, heads, 4),
                    _feed_forward(width, hidden),
                    *(nn.LayerNorm(width) for _ in range(2)),
                )
            )
            for _ in range(6)
        )
        self.lateral = nn.Sequential(
            nn.Conv2d(embed_dim, width, 1, bias=False), nn.GroupNorm(32, width)
        )
        self.output = _conv_norm_relu(width, width, norm="group")
        self.mask_feature = nn.Conv2d(width, width, 1)
        self.decoder = nn.ModuleList(
            nn.ModuleList(
                (
                    *(nn.MultiheadAttention(width, heads) for _ in range(2)),
                    _feed_forward(width, hidden),
                    *(nn.LayerNorm(width) for _ in range(3)),
                )
            )
            for _ in range(9)
        )
        self.decoder_norm = nn.LayerNorm(width)
        self.embeddings = nn.ModuleList(
            nn.Embedding(number, width) for number in (queries, queries, levels, levels)
        )
        self.score = nn.Linear(width, ADE20K_CLASSES + 1)
        self.mask = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width),
        )  # fmt: skip


def _feed_forward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
