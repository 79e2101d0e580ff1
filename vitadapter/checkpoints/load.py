# SPDX-License-Identifier: Apache-2.0
"""Weights of a file into a model, with a report."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import IO, Any, Literal

from torch import nn

from .files import read
from .names import find, tables_of
from .target import Target, check_values

_logger = logging.getLogger("vitadapter")


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint did to a model.

    Attributes:
        missing: keys of the model that the file should have and does not; they keep their values.
        unexpected: keys of the file that the model does not have.
        fresh: keys of parts of which such a file has nothing: those around a pre-trained ViT, which
            keep their values, and layer scales, which become 1.
        ignored: keys of other parts, such as heads, and of pre-training.
        resized: keys whose values were resized to the model's shapes.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    fresh: tuple[str, ...]
    ignored: tuple[str, ...]
    resized: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for field in fields(self):
            keys = getattr(self, field.name)
            if keys and field.name in ("fresh", "ignored"):
                parts = sorted({key.partition(".")[0] for key in keys})
                lines.append(f"{field.name} ({len(keys)}): in {', '.join(parts)}")
            elif keys:
                lines.append(f"{field.name} ({len(keys)}): {', '.join(keys)}")
        return "\n".join(lines) or "every key was loaded"


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | IO[bytes] | Mapping[str, Any],
    *,
    ema: bool = False,
    strict: bool | Literal["vit"] = False,
    grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Loads published weights into a model of this package.

    Takes the released detectors and segmentors (their backbone is used), pre-trained DeiT, AugReg,
    MAE, DINOv2, BEiT, BEiTv2 and Uni-Perceiver backbones, timm's names for the same, AugReg's .npz,
    .safetensors, a .zip that holds one file, and checkpoints of this package. Position embeddings
    are resized bicubically, BEiT's bias tables as BEiT does, patch projections bilinearly. Nothing
    in a file is executed.

    The model is found in the file by its keys: in whatever mapping, and with whatever before them.
    Of several with the same keys the teacher beside students is taken, or that of which all names
    are usual (state_dict, model, module, backbone). Files for models around timm's go through
    timm's own conversion.

    Args:
        model: from `create_model`, `ViTAdapter.from_timm` or `ViTAdapter.around`; or one in
            torch.compile, DataParallel or DistributedDataParallel.
        checkpoint: a file's path, a file opened for reading bytes, or what was loaded from one.
        ema: take the weights averaged over training steps that some files hold beside the others.
            Averages that a hook has put into state_dict (mmengine, Lightning) are taken anyway.
        strict: True: raise where a key is missing, unexpected or fresh. "vit": where a key of the
            ViT is missing, or one is unexpected.
        grid: (rows, columns) of the file's position embedding, where it was trained on images that
            are not square. None: a square. A number of entries or values that tell of another grid
            are refused. For timm's models: timm resizes.

    Returns:
        Every key that was not loaded as it is, and why; also logged, as a warning when keys are
        missing or unexpected.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: model is no model of this package, or grid no pair of integers.
        ValueError: the file holds no weights, has the weights of another architecture (the message
            says which), several models or, with ema, no averages; strict was given and keys differ;
            or tensors of the model or the file are on the meta device, where there are no values.
    """
    if strict not in (True, False, "vit"):
        raise ValueError(f'strict: expected True, False or "vit", got {strict!r}')
    if grid is not None:
        grid = _checked_grid(grid)
    target = Target(model)
    contents = checkpoint if isinstance(checkpoint, Mapping) else read(checkpoint)
    tables = dict(tables_of(contents))
    if not tables:
        raise ValueError(
            "checkpoint: expected a state_dict, or mappings with one, got "
            f"{', '.join(map(str, [*contents][:5])) or 'nothing'}"
        )
    part = find(tables, target.models, least=target.least, ema=ema)
    if part is None:
        raise target.refusal({}, [key for table in tables.values() for key in table])
    check_values("checkpoint", part.state, "load it onto another device")
    state, resized = target.converted(part, grid)
    target.check_halves(state, tables, part)
    fresh = target.fill_layer_scales(state)
    unused = [key for key in state if target.is_unused(key)]
    ignored = [*part.outside, *unused]
    state = {key: value for key, value in state.items() if key not in unused}
    missing, unexpected = target.compare(state)
    if not any(map(target.is_around_vit, state)):
        fresh += filter(target.is_around_vit, missing)
        missing = [key for key in missing if not target.is_around_vit(key)]
    report = LoadReport(*map(tuple, (missing, unexpected, sorted(fresh), sorted(ignored), resized)))
    differing = [*report.missing, *report.unexpected]
    if strict == "vit":
        differing = [key for key in differing if not target.is_around_vit(key)]
    elif strict:
        differing += report.fresh
    if strict and differing:
        whose = "ViT" if strict == "vit" else "model"
        raise ValueError(f"checkpoint: expected exactly the {whose}'s keys, got\n{report}")
    target.load(state)
    level = logging.WARNING if report.missing or report.unexpected else logging.INFO
    _logger.log(level, "load_checkpoint: %s", report)
    return report


def _checked_grid(grid: Any) -> tuple[int, int]:
    """Raises TypeError or ValueError unless grid is a pair of integers."""
    if isinstance(grid, str) or not isinstance(grid, Sequence):
        raise TypeError(f"grid: expected (rows, columns), got {grid!r}")
    if len(grid) != 2:
        raise ValueError(f"grid: expected (rows, columns), got {grid!r}")
    try:
        rows, columns = map(operator.index, grid)
    except TypeError as error:
        raise TypeError(f"grid: expected integers (rows, columns), got {grid!r}") from error
    return rows, columns
