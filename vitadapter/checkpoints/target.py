# SPDX-License-Identifier: Apache-2.0
"""The model that is loaded into: its keys, and what files become for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import resize
from ..pyramid import FeaturePyramid
from .architecture import Architecture, State, depth_of, differing_parts
from .names import (
    Part,
    beneath,
    places_of,
    published_name,
    published_names,
    without_chunks,
    without_wrappers,
)

# Parts of pre-trained files that no dense model has a use for.
_UNUSED = re.compile(
    r"(fc_norm|norm)\."
    r"|(head|head_dist|lm_head|pre_logits|decoder|dino_head|ibot_head|attn_pool)[._]"
    r"|(mask_token|decoder_\w+)$"
    r"|(cls_pt_layers|loss_prepare|token_embed|rope_embed)\b"
    r"|.*(relative_position_index|attn\.qkv\.bias_mask)$"
)
_TOKENS = re.compile(r"(dist_token|cls_token|register_tokens|reg_token|storage_tokens)$")
# [1, N, D]: tokens beside the class token.
_REGISTERS = ("register_tokens", "reg_token", "storage_tokens")


class Target:
    """A model of this package, by the keys that it has without compilation and wrappers.

    Args:
        model: as `load_checkpoint` takes it.

    Attributes:
        state: its state_dict.
        vit: what is before the ViT's own keys, where it is a submodule.

    Raises:
        TypeError: it is no model of this package.
        ValueError: it is on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = _unwrapped(model)
        state = self._model.state_dict()
        check_values("model", state, "call model.to_empty(device=...) and initialise it")
        self._keys = {without_wrappers(key): key for key in state}
        self.state = {key: state[own] for key, own in self._keys.items()}
        backbone = getattr(self._model, "backbone", None)
        # Of timm's models.
        self._convert: Callable[[State], State] | None = getattr(backbone, "convert", None)
        self.vit = ""
        if backbone is not None:
            self.vit = "backbone.model." if self._convert else "backbone."

    @property
    def models(self) -> dict[str, tuple[Collection[str], Callable[[str], str]]]:
        """What to look for in a file, see `find`."""
        if not self.vit:
            return {"whole": (self.state.keys(), published_name)}
        return {"whole": (self.state.keys(), self._under_vit), "vit": self._halves["ViT"]}

    @property
    def least(self) -> int:
        """With fewer keys it is no such model."""
        return len(self._halves["ViT"][0]) // 2

    @property
    def _halves(self) -> dict[str, tuple[Collection[str], Callable[[str], str]]]:
        """Keys of the ViT and of what is around it, and what makes one of these of a file's."""
        rename = without_chunks if self.vit else published_name
        around = {key for key in self.state if self.is_around_vit(key)}
        vit = {self.bare(key) for key in self.state.keys() - around}
        return {"ViT": (vit, rename), "adapter": (around, rename)}

    def _under_vit(self, key: str) -> str:
        """The key of an adapter, some of which have the ViT's under backbone. alone."""
        if key.startswith(self.vit) or not key.startswith("backbone."):
            return key
        return self.vit + without_chunks(key.removeprefix("backbone."))

    def bare(self, key: str) -> str:
        """A key without what is before the ViT's."""
        return key.removeprefix(self.vit)

    def is_around_vit(self, key: str) -> bool:
        """Whether it is a key of the adapter, or of a baseline's necks."""
        return key.partition(".")[0] in self._model.own_parts

    def converted(self, part: Part, grid: tuple[int, int] | None) -> tuple[State, list[str]]:
        """A file's part by this model's keys and in its sizes, and what was resized for it.

        Raises:
            ValueError: it is of another architecture, or grid is wrong.
        """
        return (self._around if self.vit else self._published)(part, grid)

    def _published(self, part: Part, grid: tuple[int, int] | None) -> tuple[State, list[str]]:
        state = published_names(part.state)
        # An adapter whose ViT is a submodule: one of the two is what was found.
        front = part.place.front
        around = re.sub(r"backbone\.(model\.)?$", "", front)
        is_vit = around != front and any(
            key.startswith(around + "interactions.") for key in part.outside
        )
        stems = {key.partition(".")[0] for key in state}
        if is_vit or {"interactions", "backbone"} <= stems:
            raise ValueError(
                "checkpoint: expected a model of create_model or a ViT, got an adapter around "
                "another ViT, under backbone.; build the model by ViTAdapter.from_timm or around"
            )
        if "blocks.0.gamma1" in self.state:  # gamma_1 in DeiT III
            state = {re.sub(r"\.gamma_([12])$", r".gamma\1", key): v for key, v in state.items()}
        expected, got = Architecture.of(self.state), Architecture.of(state)
        if got not in (expected, replace(expected, interactions=0)):
            raise self.refusal(state, [*(front + key for key in part.state), *part.outside])
        fronts, has_tokens = _fronts(state)
        return state, _resize(state, self.state, grid, fronts, has_tokens)

    def _around(self, part: Part, grid: tuple[int, int] | None) -> tuple[State, list[str]]:
        if grid is not None:
            raise ValueError(
                "grid: expected None for a model around another ViT (timm's own loading resizes), "
                f"got {grid}"
            )
        vit, state = part.state, State()
        if part.kind == "whole":
            # Some adapters have the ViT's keys under backbone. alone.
            front = self.vit if any(key.startswith(self.vit) for key in vit) else "backbone."
            state = {key: v for key, v in vit.items() if not key.startswith(front)}
            vit = beneath(vit, front)
        stems = {key.partition(".")[0] for key in part.state}
        if {"interactions", "blocks"} <= stems:
            raise ValueError(
                "checkpoint: expected a ViT, or an adapter around one with its keys under "
                "backbone., got a model of create_model, whose ViT has no class token; build the "
                "model by create_model"
            )
        vit, resized = {without_chunks(key): value for key, value in vit.items()}, []
        if self._convert is not None:
            self._check_grid(vit)
            converted = self._convert(vit)
            resized = [
                self.vit + key
                for key, value in converted.items()
                if key in vit and vit[key].shape != value.shape
            ]
            vit = converted
        return state | {self.vit + key: value for key, value in vit.items()}, resized

    def _check_grid(self, vit: State) -> None:
        """Raises ValueError where positions for timm, which takes a square, lie in no such grid."""
        own, given = self.state.get(self.vit + "pos_embed"), vit.get("pos_embed")
        if own is None or given is None:
            return
        embed: Any = self._model.get_submodule(self.vit + "patch_embed")
        rows, columns = embed.grid_size
        front = own.shape[1] - rows * columns
        # timm adds DINOv2's entry of the class token to that token, where there are registers.
        front += "register_tokens" in vit
        resize.check_grid("pos_embed", given, (rows, columns), front)

    def fill_layer_scales(self, state: State) -> list[str]:
        """Makes layer scales of 1, by which nothing is scaled, for a file without; the keys."""
        keys = [key for key in self.state if re.fullmatch(r"blocks\.\d+\.gamma[12]", key)]
        if not any(key.startswith("blocks.") for key in state) or state.keys() & set(keys):
            return []
        state.update({key: torch.ones_like(self.state[key]) for key in keys})
        return keys

    def check_halves(
        self, state: State, tables: Mapping[tuple[str, ...], State], part: Part
    ) -> None:
        """Raises ValueError where a file has the other half of a state_dict in another place."""
        own = {self.is_around_vit(key) for key in state.keys() & self.state.keys()}
        for (name, half), is_around in zip(self._halves.items(), (False, True), strict=True):
            if is_around in own:
                continue
            counts = places_of(tables, *half)
            places = [place for place in counts if place.is_averaged == part.place.is_averaged]
            best = max(places, key=counts.__getitem__, default=None)
            if best is not None and 2 * counts[best] >= len(half[0]):
                raise ValueError(
                    "checkpoint: expected ViT and adapter in one mapping, by the model's own keys, "
                    f"got the {name} under {best} and the rest under {part.place}"
                )

    def is_unused(self, key: str) -> bool:
        """Whether it is a key of parts that no dense model has a use for."""
        if key in self.state:
            return False
        # timm's models run with tokens, of which each counts.
        return bool(_UNUSED.match(self.bare(key)) or (not self.vit and _TOKENS.match(key)))

    def compare(self, state: State) -> tuple[list[str], list[str]]:
        """Keys that the model has and a state_dict has not, and the converse.

        Raises:
            ValueError: shapes or kinds of numbers differ, or all blocks do.
        """
        bare = {self.bare(key) for key in state}
        own = {self.bare(key) for key in self.state}
        for stem in ("blocks", "layers", "interactions"):
            number, expected = depth_of(bare, stem), depth_of(own, stem)
            if number and expected and number != expected:
                raise ValueError(
                    f"checkpoint: expected {self._expected}, of {expected} {stem}, got {number}"
                )
        lacking, surplus = differing_parts(bare, own)
        surplus -= {"blocks.*.attn.qkv.bias"}  # DINOv3's, see `TimmViT.convert`
        if lacking or surplus:
            parts = (("without", lacking), ("with", surplus))
            text = " and ".join(f"{word} {', '.join(sorted(s))}" for word, s in parts if s)
            raise ValueError(f"checkpoint: expected {self._expected}, got one {text}")
        common = state.keys() & self.state.keys()
        wrong = [
            f"{key}: expected {list(self.state[key].shape)}, got {list(state[key].shape)}"
            for key in self.state
            if key in common and self.state[key].shape != state[key].shape
        ]
        if wrong:
            raise ValueError(
                f"checkpoint: expected {self._expected}, got one of which {len(wrong)} shapes "
                f"differ ({', '.join(wrong[:3])})"
            )
        kinds = [
            f"{key}: {state[key].dtype}"
            for key in self.state
            if key in common
            and self.state[key].is_floating_point() > state[key].is_floating_point()
        ]
        if kinds:
            raise ValueError(
                f"checkpoint: expected floating-point weights, got {len(kinds)} others "
                f"({', '.join(kinds[:3])})"
            )
        # Counters of batches are missing in old files, and count nothing here.
        missing = [
            key
            for key in self.state
            if key not in state and not key.endswith("num_batches_tracked")
        ]
        return missing, [key for key in state if key not in self.state]

    def load(self, state: State) -> None:
        """Loads what the model has."""
        own = {self._keys[key]: value for key, value in state.items() if key in self._keys}
        self._model.load_state_dict(own, strict=False)

    def refusal(self, state: State, others: Iterable[str]) -> ValueError:
        """An error that says what a file looks like."""
        got = Architecture.of(state, others)
        remedy = got.remedy
        if remedy and self.vit:
            remedy = "; take the file that timm publishes, in its names, or pretrained=True"
        return ValueError(
            f"checkpoint: expected {self._expected}, got one that looks like {got}{remedy}"
        )

    @property
    def _expected(self) -> str:
        if not self.vit:
            return str(Architecture.of(self.state))
        vit = self._model.get_submodule(self.vit[:-1])
        return f"weights of its ViT, {type(vit).__name__}, with an adapter or without"


def _unwrapped(model: Any) -> FeaturePyramid:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = model.module
    if inner is not None:
        return _unwrapped(inner)
    if not isinstance(model, FeaturePyramid):
        parts = model.named_modules() if isinstance(model, nn.Module) else ()
        inside = [name for name, part in parts if isinstance(part, FeaturePyramid)]
        raise TypeError(
            "model: expected one of create_model, ViTAdapter.from_timm or ViTAdapter.around, got "
            f"{type(model).__name__}" + (f"; give its {inside[0]}" if inside else "")
        )
    return model


def check_values(name: str, state: Mapping[str, Tensor], remedy: str) -> None:
    """Raises ValueError where tensors have no values: on the meta device, or empty ones."""
    without = [key for key, value in state.items() if value.is_meta]
    if without:
        raise ValueError(
            f"{name}: expected tensors that have values, got {len(without)} of {len(state)} on the "
            f"meta device ({', '.join(without[:3])}); {remedy} first"
        )
    sparse = [key for key, value in state.items() if value.layout != torch.strided]
    if sparse:
        raise ValueError(
            f"{name}: expected dense tensors, got sparse ones: {', '.join(sparse[:3])}"
        )
    empty = [key for key, value in state.items() if not value.numel()]
    if empty:
        raise ValueError(
            f"{name}: expected tensors that have values, got {len(empty)} empty ones "
            f"({', '.join(empty[:3])}); DeepSpeed (ZeRO 3) keeps them apart, and its zero_to_fp32 "
            "collects them"
        )


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
