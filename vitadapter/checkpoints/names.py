# SPDX-License-Identifier: Apache-2.0
"""Which part of a file is the backbone, and what its keys are called here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .architecture import State, depth_of

# Modules that torch.compile, FSDP, activation checkpointing and Fabric put around others.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Large models were saved in chunks of blocks, by DINOv2.
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.(?=norm|attn|mlp|ls|gamma)")
# A name for weights averaged over training steps.
_AVERAGED = re.compile(r"(?i:(^|_)(ema|swa|averaged?)(_|$))|EMA")
# mmcv keeps averages, or what they were swapped with, beside the weights: ema_backbone_up_bias.
_FLAT_AVERAGED = "ema_"
# Beside these, of mmengine and Lightning, state_dict holds the averages, and they the last step's.
_LAST_STEP = {"ema_state_dict", "current_model_state"}
# Names on the way to the model that is meant, where a file has several of the same keys.
_USUAL = {"state_dict", "model", "model_state_dict", "module", "backbone", "base_encoder"}


class Place(NamedTuple):
    """Where in a file a model is.

    Attributes:
        path: keys of the mappings around it.
        front: what is before all its keys.
    """

    path: tuple[str, ...]
    front: str

    def __str__(self) -> str:
        return " / ".join((*self.path, self.front) if self.front else self.path) or "no name"

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
        place: where it was.
        state: its tensors, by their keys without that.
        outside: the other tensors of the same mapping, by their whole keys.
    """

    kind: str
    place: Place
    state: State
    outside: State


def without_wrappers(key: str) -> str:
    """The key as it is in a model that is not compiled, sharded or otherwise wrapped."""
    return _WRAPPERS.sub("", key)


def without_chunks(key: str) -> str:
    """The key as it is where all blocks are in one list."""
    return _CHUNK.sub(r"blocks.\1.", key)


def beneath(state: State, front: str) -> State:
    """What is behind a beginning of keys, without it."""
    return {key.removeprefix(front): value for key, value in state.items() if key.startswith(front)}


def tables_of(
    contents: Mapping[Any, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], State]]:
    """Every mapping that has tensors, without wrappers in its keys, and where it is.

    Raises:
        ValueError: two keys differ in wrappers only.
    """
    table: State = {}
    for key, value in contents.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            value = torch.from_numpy(value)
        if isinstance(key, str) and isinstance(value, Tensor):
            name = without_wrappers(key)
            if name in table:
                raise ValueError(f"checkpoint: expected one {name}, got two, of which one is {key}")
            table[name] = value
    if any("encoderblock_0/" in key for key in table):
        table = _from_jax(table)
    if table:
        yield path, table
    for key, value in contents.items():
        if isinstance(value, Mapping):
            yield from tables_of(value, (*path, str(key)))


def places_of(
    tables: Mapping[tuple[str, ...], State], names: Collection[str], rename: Callable[[str], str]
) -> Counter[Place]:
    """Where keys with these names are in a file, and how many.

    Args:
        tables: see `tables_of`.
        names: of a model.
        rename: makes one of the names of a file's.
    """
    counts: Counter[Place] = Counter()
    for path, table in tables.items():
        for key in table:
            for start in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
                if rename(key[start:]) in names:
                    counts[Place(path, key[:start])] += 1
    return counts


def find(
    tables: Mapping[tuple[str, ...], State],
    models: Mapping[str, tuple[Collection[str], Callable[[str], str]]],
    *,
    least: int,
    ema: bool,
) -> Part | None:
    """Finds a model by its keys, whatever is before them in the file, and around them.

    Args:
        tables: see `tables_of`.
        models: for each kind of model its keys, and what makes one of these of a file's name.
        least: with fewer keys it is no such model, of which there may be several.
        ema: look for averaged weights; they are passed over otherwise.

    Returns:
        The part with most of the keys of a model; None where there are none.

    Raises:
        ValueError: there are no averaged weights, or only those; or more than one part has the
            same keys.
    """
    last_step = [path for path in tables if _is_last_step(path, tables)]
    if last_step:
        tables, ema = {path: tables[path] for path in tables if path not in last_step}, False
    found = {
        (kind, place): number
        for kind, (names, rename) in models.items()
        for place, number in places_of(tables, names, rename).items()
    }
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
    takes_averaged = ema and 2 * averaged >= last
    wanted = {key: n for key, n in found.items() if key[1].is_averaged == takes_averaged}
    most = max(wanted.values())
    kind = next(kind for kind in models if most in (n for (k, _), n in wanted.items() if k == kind))
    equal = [place for (k, place), number in wanted.items() if k == kind and number == most]
    place = _meant(equal, tables) if most >= least else equal[0]
    table = tables[place.path]
    state = beneath(table, place.front)
    if ema and not place.is_averaged:
        state |= _flat_averages(table, place.front, state)
    outside = {key: value for key, value in table.items() if not key.startswith(place.front)}
    for key in [key for key in state if key.startswith(_FLAT_AVERAGED)]:
        outside[place.front + key] = state.pop(key)
    return Part(kind, place, state, outside)


def _is_last_step(path: tuple[str, ...], paths: Collection[tuple[str, ...]]) -> bool:
    """Whether a mapping holds the last step's weights beside averages in state_dict."""
    return any(
        name in _LAST_STEP and any(p[: i + 1] == (*path[:i], "state_dict") for p in paths)
        for i, name in enumerate(path)
    )


def _meant(places: Sequence[Place], tables: Mapping[tuple[str, ...], State]) -> Place:
    """Of models with the same keys the one that is meant, by the names on the way to it.

    Raises:
        ValueError: the names do not tell, and the values differ.
    """
    students = [place for place in places if "student" in place.segments]
    if students and len(students) == len(places) - 1:
        return next(place for place in places if place not in students)
    usual = [place for place in places if _USUAL.issuperset(place.segments)]
    if len(usual) == 1:
        return usual[0]
    for other in places[1:]:
        if not _are_same(tables, places[0], other):
            raise ValueError(
                f"checkpoint: expected one model, got {len(places)} with the same keys, under "
                f"{' and under '.join(map(str, places))}; give the mapping in which the wanted one "
                "is alone, such as contents[...]"
            )
    return places[0]


def _are_same(tables: Mapping[tuple[str, ...], State], one: Place, other: Place) -> bool:
    """Whether two parts have the same values."""
    first, second = (beneath(tables[place.path], place.front) for place in (one, other))
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
    """Names and layouts of google-research/vision_transformer, in which a kernel is [in, out].

    Raises:
        ValueError: an array is missing.
    """
    try:
        return _of_jax(state)
    except KeyError as missing:
        raise ValueError(
            f"checkpoint: expected all arrays of AugReg's files, got none of {missing}"
        ) from None


def _of_jax(state: State) -> State:
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
