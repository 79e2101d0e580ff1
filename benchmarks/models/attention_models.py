# SPDX-License-Identifier: Apache-2.0
"""What attention.py compares: ViT-Adapter-S with each kind of attention, and a training step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import vitadapter
from benchmarks.models.common import autocast
from benchmarks.paper.costs import SIZES, Size

MODEL = "vit_adapter_small"

PAPER_SIZE = SIZES["detection"]
# About two minutes on two cores, and large enough for the attention to matter. Multiples of 64,
# so that no kind of attention has to pad its windows or stripes.
CPU_SIZE: Size = (384, 576)

BASE = "deformable"  # what ratios are taken to


@dataclass(frozen=True)
class Row:
    """One model of the comparison. `name` is its key in the results and in TABLE_7."""

    name: str
    label: str
    attention: str
    overrides: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("deformable", "deformable", "deformable"),
    Row("dense", "dense", "dense"),
    Row("cswin", "CSwin", "cswin"),
    Row("pale", "Pale", "pale"),
)
# How global attention was written in 2022: the whole attention matrix in memory.
NAIVE = Row("dense-2022", "dense 2022", "dense", {"naive_attention": True})
LABELS = {row.name: row.label for row in (*ROWS, NAIVE)}

KINDS = ("forward", "forward_backward")


@dataclass(frozen=True)
class Settings:
    """One run, as asked for on the command line and filled up with defaults."""

    device: str
    size: Size
    batch: int
    warmup: int
    rounds: int
    threads: int
    dtypes: tuple[str, ...]
    rows: tuple[Row, ...]
    memory_limit: int | None = None

    def as_json(self) -> dict[str, Any]:
        record = asdict(self)
        record["rows"] = [row.name for row in self.rows]
        return {"model": MODEL, "task": "detection", **record}


def build(row: Row) -> vitadapter.ViTAdapter:
    """The row's model, freshly initialised from the same seed, in fp32 on the CPU."""
    torch.manual_seed(0)
    return vitadapter.create_model(
        MODEL, task="detection", attention=row.attention, drop_path_rate=0.0, **row.overrides
    )


@torch.no_grad()
def wake_up(model: nn.Module) -> nn.Module:
    """Give weights that start at zero small random values.

    In a fresh model every injector is multiplied by zero and every query samples the same star,
    so half of the backward pass would carry zeros, and sampling would be kinder to the caches
    than it is in a trained model.
    """
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and not parameter.any():
            parameter.normal_(std=0.02)
    return model


def photograph(size: Size, batch: int) -> Tensor:
    """[batch, 3, H, W]: a portrait that matplotlib ships, cropped to size's shape, normalised."""
    file = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    with PIL.Image.open(file) as picture:
        pixels = np.array(picture.convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    height, width = image.shape[1:]
    scale = min(height / size[0], width / size[1])
    crop = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    image = image[None, :, top : top + crop[0], left : left + crop[1]]
    image = interpolate(image, size, mode="bilinear", antialias=True)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    image = (image - mean) / std
    return torch.cat([image if i % 2 == 0 else image.flip(-1) for i in range(batch)])


def forward(model: nn.Module, images: Tensor, dtype: str) -> list[Tensor]:
    with autocast(images.device, dtype):
        return list(model(images))


def forward_backward(model: nn.Module, images: Tensor, dtype: str) -> list[Tensor]:
    """One training step without a head; gradients for all parameters."""
    maps = forward(model, images, dtype)
    torch.autograd.backward(maps, [_ramp(each) for each in maps])
    return maps


def _ramp(feature: Tensor) -> Tensor:
    """A gradient for one map that costs nothing to make.

    It must vary over the map: the batch norm that ends the model removes a constant gradient,
    the mean's for one, and zeros would run through the whole backward pass.
    """
    height, width = feature.shape[-2:]
    ramp = torch.linspace(-1, 1, height * width, dtype=feature.dtype, device=feature.device)
    return ramp.view(1, 1, height, width).expand_as(feature)
