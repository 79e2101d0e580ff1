# SPDX-License-Identifier: Apache-2.0
"""Keys and shapes are those of the released backbones, so that their files load."""

from __future__ import annotations

import pytest
import torch

import vitadapter


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _layer_norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _batch_norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    running = {f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,)}
    return {**_layer_norm(name, dim), **running, f"{name}.num_batches_tracked": ()}


def _deformable(name: str, dim: int, heads: int, levels: int, value: int):
    samples = heads * levels * 4
    return {
        **_linear(f"{name}.sampling_offsets", dim, 2 * samples),
        **_linear(f"{name}.attention_weights", dim, samples),
        **_linear(f"{name}.value_proj", dim, value),
        **_linear(f"{name}.output_proj", value, dim),
    }


def _extractor(name: str, dim: int, heads: int, value: int, hidden: int):
    return {
        **_layer_norm(f"{name}.query_norm", dim),
        **_layer_norm(f"{name}.feat_norm", dim),
        **_deformable(f"{name}.attn", dim, heads, 1, value),
        **_linear(f"{name}.ffn.fc1", dim, hidden),
        f"{name}.ffn.dwconv.dwconv.weight": (hidden, 1, 3, 3),
        f"{name}.ffn.dwconv.dwconv.bias": (hidden,),
        **_linear(f"{name}.ffn.fc2", hidden, dim),
        **_layer_norm(f"{name}.ffn_norm", dim),
    }


def _released(dim: int, depth: int, heads: int, value: int, grid: int):
    """Keys and shapes of a released backbone without the prefix `backbone.`."""
    hidden, w = dim // 4, 64
    keys: dict[str, tuple[int, ...]] = {
        "level_embed": (3, dim),
        "pos_embed": (1, grid**2 + 1, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "up.weight": (dim, dim, 2, 2),
        "up.bias": (dim,),
    }
    for conv, norm, inputs in ((0, 1, 3), (3, 4, w), (6, 7, w)):
        keys[f"spm.stem.{conv}.weight"] = (w, inputs, 3, 3)
        keys |= _batch_norm(f"spm.stem.{norm}", w)
    for stage, inputs, outputs in ((2, w, 2 * w), (3, 2 * w, 4 * w), (4, 4 * w, 4 * w)):
        keys[f"spm.conv{stage}.0.weight"] = (outputs, inputs, 3, 3)
        keys |= _batch_norm(f"spm.conv{stage}.1", outputs)
    for level, inputs in ((1, w), (2, 2 * w), (3, 4 * w), (4, 4 * w)):
        keys[f"spm.fc{level}.weight"] = (dim, inputs, 1, 1)
        keys[f"spm.fc{level}.bias"] = (dim,)
        keys |= _batch_norm(f"norm{level}", dim)
    for j in range(depth):
        keys |= _layer_norm(f"blocks.{j}.norm1", dim) | _layer_norm(f"blocks.{j}.norm2", dim)
        keys |= _linear(f"blocks.{j}.attn.qkv", dim, 3 * dim)
        keys |= _linear(f"blocks.{j}.attn.proj", dim, dim)
        keys |= _linear(f"blocks.{j}.mlp.fc1", dim, 4 * dim)
        keys |= _linear(f"blocks.{j}.mlp.fc2", 4 * dim, dim)
        keys |= {f"blocks.{j}.gamma1": (dim,), f"blocks.{j}.gamma2": (dim,)}
    for i in range(4):
        injector = f"interactions.{i}.injector"
        keys |= _layer_norm(f"{injector}.query_norm", dim)
        keys |= _layer_norm(f"{injector}.feat_norm", dim)
        keys |= _deformable(f"{injector}.attn", dim, heads, 3, value) | {
            f"{injector}.gamma": (dim,)
        }
        keys |= _extractor(f"interactions.{i}.extractor", dim, heads, value, hidden)
    for extra in range(2):
        name = f"interactions.3.extra_extractors.{extra}"
        keys |= _extractor(name, dim, heads, value, hidden)
    return keys


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize(
    ("name", "released"),
    [
        ("vit_adapter_tiny", _released(192, 12, 6, 192, 14)),
        ("vit_adapter_small", _released(384, 12, 6, 384, 14)),
        ("vit_adapter_base", _released(768, 12, 12, 384, 14)),
        ("vit_adapter_large", _released(1024, 24, 16, 512, 24)),
    ],
    ids=["tiny", "small", "base", "large"],
)
def test_keys_and_shapes_equal_the_released_ones(name, released, task):
    with torch.device("meta"):
        model = vitadapter.create_model(name, task=task)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == released
