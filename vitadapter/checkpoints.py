# SPDX-License-Identifier: Apache-2.0
"""Published weights in: released models, pre-trained backbones, files of timm and jax."""

from __future__ import annotations

import argparse
import io
import logging
import operator
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import resize

State = dict[str, Tensor]

_logger = logging.getLogger("vitadapter")

# Where files keep their weights, and where those averaged over training steps.
_CONTAINERS = ("state_dict", "model", "module", "teacher")
_EMA_CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
# In the order in which they are taken off, again and again.
_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "visual.trunk.")
# mmcv keeps averages, or what they were swapped with, beside the weights: ema_backbone_up_bias.
_FLAT_EMA = "ema_"
# Parts of pre-trained files that no dense model has a use for.
_UNUSED = re.compile(
    r"(fc_norm|norm|head|head_dist|lm_head|pre_logits|decoder|dino_head|ibot_head|attn_pool)[._]"
    r"|(mask_token|dist_token|cls_token|register_tokens|reg_token|storage_tokens|decoder_\w+)$"
    r"|(cls_pt_layers|loss_prepare|token_embed)\b"
    r"|.*relative_position_index$"
)
# [1, N, D]: tokens beside the class token.
_REGISTERS = ("register_tokens", "reg_token", "storage_tokens")
_SAFE: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
]


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
    state, ignored = _backbone_state(_weights(contents, ema), model, ema)
    _check_values("checkpoint", state, "load it onto another device")
    target = model.state_dict()
    vit = dict(model.named_modules()).get("backbone.model")
    if vit is not None:
        state = _for_timm(state, target)
        _check_grid_of_timm(vit, state, grid)
    else:
        state = _published_names(state)
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


def read(path: str | Path) -> Mapping[str, Any]:
    """Reads a file by its contents' format; runs none of its code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds Python objects, or is no checkpoint.
        ModuleNotFoundError: it is a .safetensors file and safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    source: Path | io.BytesIO = path
    if zipfile.is_zipfile(path):  # as torch.save writes them; released files are packed once more
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith((".pth", ".pth.tar"))]
            if len(names) == 1:
                source = io.BytesIO(archive.read(names[0]))
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        found = re.search(r"Unsupported \w+: .*? (\S+) was not", str(error))
        reason = f"it holds {found[1]}" if found else str(error).partition("\n")[0]
        raise ValueError(
            f"checkpoint: expected a file of tensors and plain values, got {path}: {reason}"
        ) from error


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


def _weights(contents: Mapping[str, Any], ema: bool) -> State:
    """The state_dict inside whatever surrounds it."""
    for container in (*(_EMA_CONTAINERS if ema else ()), *_CONTAINERS):
        inner = contents.get(container)
        if isinstance(inner, Mapping):
            return _weights(inner, ema)
    state = {key: value for key, value in contents.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(
            "checkpoint: expected a state_dict, or one under "
            f"{', '.join((*_CONTAINERS, *_EMA_CONTAINERS))}, got {', '.join(contents) or 'nothing'}"
        )
    return state


def _check_values(name: str, state: Mapping[str, Tensor], remedy: str) -> None:
    """Raises ValueError where tensors are on the meta device: copies from and to it do nothing."""
    without = [key for key, value in state.items() if value.is_meta]
    if without:
        raise ValueError(
            f"{name}: expected tensors that have values, got {len(without)} of {len(state)} on the "
            f"meta device ({', '.join(without[:3])}); {remedy} first"
        )


def _backbone_state(state: State, model: nn.Module, ema: bool) -> tuple[State, list[str]]:
    """The backbone's part without its prefixes, and the keys of all other parts."""
    if ema:
        averages = {
            f"{prefix}{key}": state[f"{_FLAT_EMA}{prefix}{key}".replace(".", "_")]
            for prefix in ("backbone.", "")
            for key in model.state_dict()
            if f"{_FLAT_EMA}{prefix}{key}".replace(".", "_") in state
        }
        state = {**state, **averages}
    ignored = [key for key in state if key.startswith(_FLAT_EMA)]
    state = {key: value for key, value in state.items() if key not in ignored}
    target = model.state_dict()
    while not state.keys() & target.keys():
        for prefix in _PREFIXES:
            if any(key.startswith(prefix) for key in state):
                break
        else:
            break
        ignored += [key for key in state if not key.startswith(prefix)]
        state = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
    return state, ignored


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


def _published_names(state: State) -> State:
    """Names of the released models for what other projects name otherwise."""
    if any("encoderblock_0/" in key for key in state):
        state = _from_jax(state)
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.(?=norm|attn|mlp|ls)", r"blocks.\1.", key)  # chunks
        key = re.sub(r"\.ls([12])\.gamma$", r".gamma\1", key)
        # Uni-Perceiver.
        key = key.removeprefix("fused_encoder.").replace("in_proj_", "in_proj.")
        key = key.replace("video_embed.", "visual_embed.")
        key = re.sub(
            r"^visual_embed\.embeddings\.(weight|bias)", r"visual_embed.patch_embed.proj.\1", key
        )
        key = key.replace("visual_embed.embeddings_st_pos.", "visual_embed.patch_embed.")
        renamed[key] = value
    shared = renamed.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        for index in range(_depth(renamed, "blocks")):
            renamed[f"blocks.{index}.attn.relative_position_bias_table"] = shared
    return renamed


def _from_jax(state: State) -> State:
    """Names and layouts of google-research/vision_transformer, in which a kernel is [in, out]."""
    state = {key.removeprefix("opt/target/"): value for key, value in state.items()}
    result = {
        "patch_embed.proj.weight": state["embedding/kernel"].permute(3, 2, 0, 1),
        "patch_embed.proj.bias": state["embedding/bias"],
        "pos_embed": state["Transformer/posembed_input/pos_embedding"],
    }
    used = {"embedding/kernel", "embedding/bias", "Transformer/posembed_input/pos_embedding"}
    depth = len({key.split("/")[1] for key in state if "/encoderblock_" in key})
    for index in range(depth):
        block, name = f"Transformer/encoderblock_{index}", f"blocks.{index}"
        for theirs, ours in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            result[f"{name}.{ours}.weight"] = state[f"{block}/{theirs}/scale"]
            result[f"{name}.{ours}.bias"] = state[f"{block}/{theirs}/bias"]
        attention = f"{block}/MultiHeadDotProductAttention_1"
        parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
        kernels = [state[f"{part}/kernel"].flatten(1).t() for part in parts]
        result[f"{name}.attn.qkv.weight"] = torch.cat(kernels)
        result[f"{name}.attn.qkv.bias"] = torch.cat([state[f"{p}/bias"].flatten() for p in parts])
        result[f"{name}.attn.proj.weight"] = state[f"{attention}/out/kernel"].flatten(0, 1).t()
        result[f"{name}.attn.proj.bias"] = state[f"{attention}/out/bias"]
        for theirs, ours in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            dense = f"{block}/MlpBlock_3/{theirs}"
            result[f"{name}.mlp.{ours}.weight"] = state[f"{dense}/kernel"].t()
            result[f"{name}.mlp.{ours}.bias"] = state[f"{dense}/bias"]
        used |= {key for key in state if key.startswith(block + "/")}
    # Class token, final norm and head; the dots let `_UNUSED` know them.
    others = {"cls": "cls_token", "Transformer/encoder_norm": "norm"}
    for key, value in state.items():
        if key not in used:
            stem, _, leaf = key.rpartition("/")
            result[others.get(key) or f"{others.get(stem, stem)}.{leaf}"] = value
    return result


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
    expected, got = _Architecture.of(target), _Architecture.of(state)
    same = (expected.family, expected.width, expected.depth) == (got.family, got.width, got.depth)
    if got.interactions and expected.interactions != got.interactions:
        same = False
    if not same:
        raise ValueError(f"checkpoint: expected {expected}, got one that looks like {got}")


def _describe(state: State) -> str:
    return str(_Architecture.of(_published_names(state)))


@dataclass(frozen=True)
class _Architecture:
    """What a state_dict's keys and shapes tell."""

    family: str
    width: int = 0
    depth: int = 0
    interactions: int = 0

    def __str__(self) -> str:
        text = self.family
        if self.depth:
            text += f" of width {self.width} and depth {self.depth}"
        if self.interactions:
            text += f" with an adapter of {self.interactions} interactions"
        return text

    @staticmethod
    def of(state: State) -> _Architecture:
        interactions = _depth(state, "interactions")
        for family, stem, key in (
            ("Uni-Perceiver", "layers", "layers.0.self_attn.in_proj.weight"),
            ("BEiT", "blocks", "blocks.0.attn.relative_position_bias_table"),
            ("a plain ViT", "blocks", "blocks.0.attn.qkv.weight"),
        ):
            if key not in state:
                continue
            width = state["blocks.0.norm1.weight"] if stem == "blocks" else state[key].t()
            return _Architecture(family, width.shape[0], _depth(state, stem), interactions)
        for family, pattern in (
            ("a Swin Transformer", r"layers\.0\.blocks\.0\."),
            ("a ConvNeXt", r"(downsample_layers|stages\.\d+\.(blocks\.)?\d+\.(dwconv|conv_dw))"),
            ("a ResNet", r"layer1\.0\.conv1"),
            ("CLIP", r"(visual\.)?transformer\.resblocks\."),
            ("a transformers model", r"(.*\.)?encoder\.layer\.0\."),
        ):
            if any(re.match(pattern, key) for key in state):
                return _Architecture(family)
        keys = ", ".join(list(state)[:3])
        return _Architecture(f"no vision transformer that is known here, with keys {keys}")


def _depth(state: State, stem: str) -> int:
    pattern = re.compile(rf"{stem}\.(\d+)\.")
    found = [int(match[1]) for match in map(pattern.match, state) if match]
    return max(found, default=-1) + 1
