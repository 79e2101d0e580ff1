# SPDX-License-Identifier: Apache-2.0
"""Which part of a file is the backbone, and what its keys are called here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .architecture import State, depth_of

# Modules that torch.compile, FSDP, activation checkpointing and Fabric put around others.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Large models were saved in chunks of blocks, by DINOv2.
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.(?=norm|attn|mlp|ls)")
# A name for weights averaged over training steps.
_AVERAGED = re.compile(r"(^|_)(ema|averaged?)(_|$)")
# mmcv keeps averages, or what they were swapped with, beside the weights: ema_backbone_up_bias.
_FLAT_AVERAGED = "ema_"
# Names on the way to the model that is meant, where a file has several of the same keys.
_USUAL = {
    *("state_dict", "model", "model_state_dict", "module", "backbone", "encoder", "base_encoder"),
    *("teacher", "net", "network", "weights"),
}


class Place(NamedTuple):
    """Where in a file a model is.

    Attributes:
        path: keys of the mappings around it.
        front: what is before all its keys.
    """

    path: tuple[str, ...]
    front: str

    def __str__(self) -> str:
        return " / ".join((*self.path, self.front) if self.front else self.path)

    @property
    def segments(self) -> list[str]:
        """All names on the way."""
        return [segment for segment in (*self.path, *self.front.split(".")) if segment]

    @property
    def is_averaged(self) -> bool:
        """Whether the names tell that the weights are averages."""
        return any(map(_AVERAGED.search, self.segments))


@dataclass(frozen=True)
class Part:
    """A model within a file.

    Attributes:
        kind: which of the models that were looked for.
        front: what was before all its keys.
        state: its tensors, by their keys without that.
        outside: the other tensors of the same mapping, by their whole keys.
    """

    kind: str
    front: str
    state: State
    outside: State


def without_wrappers(key: str) -> str:
    """The key as it is in a model that is not compiled, sharded or otherwise wrapped."""
    return _WRAPPERS.sub("", key)


def without_chunks(key: str) -> str:
    """The key as it is where all blocks are in one list."""
    return _CHUNK.sub(r"blocks.\1.", key)


def tables_of(
    contents: Mapping[Any, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], State]]:
    """Every mapping that has tensors, without wrappers in its keys, and where it is."""
    table = {
        without_wrappers(key): value
        for key, value in contents.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if any("encoderblock_0/" in key for key in table):
        table = _from_jax(table)
    if table:
        yield path, table
    for key, value in contents.items():
        if isinstance(value, Mapping):
            yield from tables_of(value, (*path, str(key)))


def find(
    tables: Mapping[tuple[str, ...], State],
    models: Mapping[str, tuple[Collection[str], Callable[[str], str]]],
    *,
    ema: bool,
) -> Part | None:
    """Finds a model by its keys, whatever is before them in the file, and around them.

    Args:
        tables: see `tables_of`.
        models: for each kind of model its keys, and what makes one of these of a file's name.
        ema: look for averaged weights; they are passed over otherwise.

    Returns:
        The part with most of the keys of a model; None where there are none.

    Raises:
        ValueError: there are no averaged weights, or only those; or more than one part has the
            same keys.
    """
    counts = {kind: Counter[Place]() for kind in models}
    for path, table in tables.items():
        for key in table:
            for start in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
                for kind, (names, rename) in models.items():
                    if rename(key[start:]) in names:
                        counts[kind][Place(path, key[:start])] += 1
    found = {(kind, place): n for kind, of in counts.items() for place, n in of.items()}
    if not found:
        return None
    averaged = max((n for (_, place), n in found.items() if place.is_averaged), default=0)
    last = max((n for (_, place), n in found.items() if not place.is_averaged), default=0)
    flat = any(key.startswith(_FLAT_AVERAGED) for table in tables.values() for key in table)
    if ema and 2 * averaged < last and not flat:
        raise ValueError("ema: expected a file with averaged weights, got one without")
    if not ema and 2 * last < averaged:
        raise ValueError(
            "checkpoint: expected weights of the last training step, got averaged ones only; take "
            "them by ema=True"
        )
    wanted = {
        key: n for key, n in found.items() if key[1].is_averaged == (ema and 2 * averaged >= last)
    }
    kind, place = _best(wanted, tables, {kind: len(names) for kind, (names, _) in models.items()})
    table = tables[place.path]
    state = {
        key.removeprefix(place.front): value
        for key, value in table.items()
        if key.startswith(place.front)
    }
    if ema and not place.is_averaged:
        state |= _flat_averages(table, place.front, state)
    outside = {key: value for key, value in table.items() if not key.startswith(place.front)}
    for key in [key for key in state if key.startswith(_FLAT_AVERAGED)]:
        outside[place.front + key] = state.pop(key)
    return Part(kind, place.front, state, outside)


def _best(
    found: Mapping[tuple[str, Place], int],
    tables: Mapping[tuple[str, ...], State],
    sizes: Mapping[str, int],
) -> tuple[str, Place]:
    """The kind and place with most keys; of equals the one with fewest names that are not usual."""

    def rank(candidate: tuple[str, Place]) -> tuple[int, int]:
        return -found[candidate], sum(name not in _USUAL for name in candidate[1].segments)

    best, *others = sorted(found, key=rank)
    kind, place = best
    if 4 * found[best] < sizes[kind]:
        return best  # not this architecture, which is said later
    for other in others:
        if rank(other) != rank(best):
            break
        if other[0] == kind and not _are_same(tables, place, other[1]):
            raise ValueError(
                f"checkpoint: expected one model, got two with the same keys, under {place} and "
                f"under {other[1]}; give the mapping in which the wanted one is: "
                f"load_checkpoint(model, contents[...])"
            )
    return best


def _are_same(tables: Mapping[tuple[str, ...], State], one: Place, other: Place) -> bool:
    """Whether two parts have the same values."""
    first, second = (
        {
            key.removeprefix(place.front): value
            for key, value in tables[place.path].items()
            if key.startswith(place.front)
        }
        for place in (one, other)
    )
    return first.keys() == second.keys() and all(
        value.shape == second[key].shape and torch.equal(value, second[key])
        for key, value in first.items()
    )


def _flat_averages(table: State, front: str, state: State) -> State:
    """The averages that lie beside the weights, their dots replaced."""
    averages = {
        key: table[flat]
        for key in state
        if (flat := _FLAT_AVERAGED + (front + key).replace(".", "_")) in table
    }
    if not averages:
        raise ValueError("ema: expected a file with averaged weights, got one without")
    return averages


def published_name(key: str) -> str:
    """The name in the released models for what other projects name otherwise."""
    key = without_chunks(key)
    key = re.sub(r"\.ls([12])\.gamma$", r".gamma\1", key)
    # Uni-Perceiver.
    key = key.replace("in_proj_", "in_proj.").replace("video_embed.", "visual_embed.")
    key = re.sub(
        r"^visual_embed\.embeddings\.(weight|bias)", r"visual_embed.patch_embed.proj.\1", key
    )
    return key.replace("visual_embed.embeddings_st_pos.", "visual_embed.patch_embed.")


def published_names(state: State) -> State:
    """A state_dict with these names, and one bias table for each block where all share one."""
    state = {published_name(key): value for key, value in state.items()}
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        for index in range(depth_of(state, "blocks")):
            state[f"blocks.{index}.attn.relative_position_bias_table"] = shared
    return state


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
    # Class token, final norm and heads, whose kernels nothing here has a use for.
    others = {
        "cls": "cls_token",
        "Transformer/encoder_norm/scale": "norm.weight",
        "Transformer/encoder_norm/bias": "norm.bias",
    }
    for key in state.keys() - used:
        result[others.get(key) or key.replace("/", ".")] = state[key]
    return result
