# SPDX-License-Identifier: Apache-2.0
"""Which part of a file is the backbone, and what its keys are called here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import State, depth_of

# Where files keep their weights, and where those averaged over training steps.
_CONTAINERS = ("state_dict", "model", "module", "teacher")
_EMA_CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
# In the order in which they are taken off, again and again.
_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "visual.trunk.")
# mmcv keeps averages, or what they were swapped with, beside the weights: ema_backbone_up_bias.
_FLAT_EMA = "ema_"


def weights_of(contents: Mapping[str, Any], ema: bool) -> State:
    """The state_dict inside whatever surrounds it."""
    for container in (*(_EMA_CONTAINERS if ema else ()), *_CONTAINERS):
        inner = contents.get(container)
        if isinstance(inner, Mapping):
            return weights_of(inner, ema)
    state = {key: value for key, value in contents.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(
            "checkpoint: expected a state_dict, or one under "
            f"{', '.join((*_CONTAINERS, *_EMA_CONTAINERS))}, got {', '.join(contents) or 'nothing'}"
        )
    return state


def backbone_state(state: State, model: nn.Module, ema: bool) -> tuple[State, list[str]]:
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


def published_names(state: State) -> State:
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
        for index in range(depth_of(renamed, "blocks")):
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
