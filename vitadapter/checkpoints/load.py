# SPDX-License-Identifier: Apache-2.0
"""Weights of a file into a model, with a report."""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import resize
from .architecture import Architecture, State
from .files import read
from .names import backbone_state, published_names, weights_of

_logger = logging.getLogger("vitadapter")

# Parts of pre-trained files that no dense model has a use for.
_UNUSED = re.compile(
    r"(fc_norm|norm|head|head_dist|lm_head|pre_logits|decoder|dino_head|ibot_head|attn_pool)[._]"
    r"|(mask_token|dist_token|cls_token|register_tokens|reg_token|storage_tokens|decoder_\w+)$"
    r"|(cls_pt_layers|loss_prepare|token_embed)\b"
    r"|.*relative_position_index$"
)
# [1, N, D]: tokens beside the class token.
_REGISTERS = ("register_tokens", "reg_token", "storage_tokens")


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint did to a model.

    Attributes:
        missing: keys of the model that the file does not have; they keep their values.
        unexpected: keys of the file that the model does not have.
        ignored: keys of other parts, such as heads, and of pre-training.
        resized: keys whose values were resized to the model's shapes.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    resized: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{name} ({len(keys)}): {', '.join(keys)}" for name, keys in vars(self).items() if keys
        ]
        return "\n".join(lines) or "every key was loaded"


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    ema: bool = False,
    strict: bool = False,
    grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Loads published weights into a model of this package.

    Takes the released detectors and segmentors (their backbone is used), pre-trained DeiT, AugReg,
    MAE, DINOv2, BEiT, BEiTv2 and Uni-Perceiver backbones, timm's names for the same, AugReg's .npz,
    .safetensors, a .zip that holds one file, and checkpoints of this package. Position embeddings
    are resized bicubically, BEiT's bias tables as BEiT does, patch projections bilinearly. Nothing
    but tensors and plain values is unpickled.

    Args:
        model: from `create_model`, `ViTAdapter.from_timm` or `ViTAdapter.around`.
        checkpoint: a file, or what was loaded from one.
        ema: take the weights averaged over training steps that some files hold beside the others.
        strict: raise where a key is missing or unexpected.
        grid: (rows, columns) of the file's position embedding, where it was trained on images that
            are not square. None: a square. A number of entries or values that tell of another grid
            are refused. For timm's models: timm resizes.

    Returns:
        Every key that was missing, unexpected, ignored or resized; also logged, as a warning when
        keys are missing or unexpected.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: grid is no pair of integers.
        ValueError: the file holds no weights, has the weights of another architecture (the message
            says which), or strict was given and keys differ; or tensors of the model or the file
            are on the meta device, where there are no values.
    """
    if grid is not None:
        grid = _checked_grid(grid)
    _check_values("model", model.state_dict(), "call model.to_empty(device=...) and initialise it")
    contents = checkpoint if isinstance(checkpoint, Mapping) else read(checkpoint)
    state, ignored = backbone_state(weights_of(contents, ema), model, ema)
    _check_values("checkpoint", state, "load it onto another device")
    target = model.state_dict()
    vit = dict(model.named_modules()).get("backbone.model")
    if vit is not None:
        state = _for_timm(state, target)
        _check_grid_of_timm(vit, state, grid)
    else:
        state = published_names(state)
        _check_architecture(state, target)
    fronts, has_tokens = _fronts(state)
    ignored += [key for key in state if key not in target and _UNUSED.match(key)]
    state = {key: value for key, value in state.items() if key in target or key not in ignored}
    resized = _resize(state, target, grid if vit is None else None, fronts, has_tokens)

    wrong = [key for key in state if key in target and state[key].shape != target[key].shape]
    if wrong:
        shapes = ", ".join(
            f"{key}: expected {list(target[key].shape)}, got {list(state[key].shape)}"
            for key in wrong[:3]
        )
        raise ValueError(
            f"checkpoint: expected {_describe(target)}, got one of which {len(wrong)} shapes "
            f"differ ({shapes})"
        )
    result = model.load_state_dict(state, strict=False)
    report = LoadReport(
        tuple(result.missing_keys),
        tuple(result.unexpected_keys),
        tuple(sorted(ignored)),
        tuple(resized),
    )
    if strict and (report.missing or report.unexpected):
        raise ValueError(f"checkpoint: expected exactly the model's keys, got\n{report}")
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


def _check_values(name: str, state: Mapping[str, Tensor], remedy: str) -> None:
    """Raises ValueError where tensors are on the meta device: copies from and to it do nothing."""
    without = [key for key, value in state.items() if value.is_meta]
    if without:
        raise ValueError(
            f"{name}: expected tensors that have values, got {len(without)} of {len(state)} on the "
            f"meta device ({', '.join(without[:3])}); {remedy} first"
        )


def _for_timm(state: State, target: State) -> State:
    """Keys of a wrapped timm model: ours as they are, timm's under the submodule."""
    if any(key.startswith("interactions.") for key in state):
        return state
    prefix = "backbone.model."
    named = {prefix + key: value for key, value in state.items()}
    if not named.keys() & target.keys():
        raise ValueError(
            f"checkpoint: expected keys of this timm model, got {_describe(state)}, with "
            f"{', '.join(list(state)[:3])}"
        )
    return named


def _check_grid_of_timm(vit: Any, state: State, grid: tuple[int, int] | None) -> None:
    """Raises ValueError where positions of a timm model lie in another grid than the model's."""
    if grid is not None:
        raise ValueError(
            f"grid: expected None for a model of timm, whose own loading resizes, got {grid}"
        )
    own, given = getattr(vit, "pos_embed", None), state.get("backbone.model.pos_embed")
    if own is None or given is None or own.shape != given.shape:
        return
    rows, columns = vit.patch_embed.grid_size
    positions = given.flatten(0, -2)[-rows * columns :]
    resize.check_rows("pos_embed", positions, (rows, columns))


def _fronts(state: State) -> tuple[set[int], bool]:
    """What may be the number of entries before the grid, and whether there is a class token."""
    classes = sum(key in state for key in ("cls_token", "dist_token"))
    registers = sum(
        state[key].shape[1] for key in _REGISTERS if key in state and state[key].dim() == 3
    )
    # Released models have dropped the class token and kept its entry; others have it without one.
    fronts = {0, classes} if classes else set(resize.EXTRA_ENTRIES)
    # Register tokens may have entries too.
    return {front + more for front in fronts for more in (0, registers)}, classes > 0


def _resize(
    state: State,
    target: State,
    grid: tuple[int, int] | None,
    fronts: set[int],
    has_tokens: bool,
) -> list[str]:
    """Resizes, in place of what it was, whatever may differ in size; returns the keys."""
    resized, used = [], False
    for key, value in state.items():
        if key not in target:
            continue
        size = target[key].shape
        if value.dim() != len(size):
            raise ValueError(
                f"{key}: expected {len(size)} dimensions, as in {list(size)}, got shape "
                f"{list(value.shape)}"
            )
        if key == "pos_embed" and value.shape[2] == size[2]:
            new = resize.position_embedding(
                value, size[1], prefix=1, grid=grid, extra=fronts, has_tokens=has_tokens
            )
            used = True
        elif key.endswith("spatial_pos_embed.weight") and value.shape[1] == size[1]:
            new = resize.position_embedding(value[None], size[0], prefix=0, grid=grid, extra=(0,))
            new = new.squeeze(0)
            used = True
        elif value.shape == size:
            continue
        elif key.endswith("relative_position_bias_table") and value.shape[1] == size[1]:
            new = resize.bias_table(value, size[0])
        elif key.endswith("patch_embed.proj.weight") and value.shape[:2] == size[:2]:
            new = resize.patch_projection(value, size[-1])
        else:
            continue
        if new.shape != value.shape or not torch.equal(new, value):
            state[key] = new
            resized.append(key)
    if grid is not None and not used:
        raise ValueError(
            f"grid: expected a file with a position embedding, got {grid} for one without"
        )
    return resized


def _check_architecture(state: State, target: State) -> None:
    expected, got = Architecture.of(target), Architecture.of(state)
    same = (expected.family, expected.width, expected.depth) == (got.family, got.width, got.depth)
    if got.interactions and expected.interactions != got.interactions:
        same = False
    if not same:
        raise ValueError(f"checkpoint: expected {expected}, got one that looks like {got}")


def _describe(state: State) -> str:
    return str(Architecture.of(published_names(state)))
