# SPDX-License-Identifier: Apache-2.0
"""What a state_dict's keys and shapes tell of its model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

State = dict[str, Tensor]

_ROTARY = "DINOv3, or another ViT without a position embedding"
# Families that an adapter of this package is built into; "#" stands for a block's number.
_KNOWN = (
    ("Uni-Perceiver", "layers.#.self_attn.in_proj.weight"),
    ("BEiT", "blocks.#.attn.relative_position_bias_table"),
    ("a plain ViT", "blocks.#.attn.qkv.weight"),
)
_FOREIGN = (
    ("a Swin Transformer", r"layers\.\d+\.blocks\.\d+\."),
    ("a ConvNeXt", r"(downsample_layers|stages\.\d+\.(blocks\.)?\d+\.(dwconv|conv_dw))"),
    ("a ResNet", r"layer1\.0\.conv1"),
    ("CLIP", r"transformer\.resblocks\."),
    ("a transformers model", r"layer\.\d+\.(attention\.(attention|self)|norm1)\."),
    ("EVA-02", r"blocks\.\d+\.attn\.q_proj\."),
)
_TIMM = "; timm has the same weights in its own names, for ViTAdapter.from_timm"
_REMEDIES = {_ROTARY: _TIMM, "CLIP": _TIMM, "a transformers model": _TIMM, "EVA-02": _TIMM}


@dataclass(frozen=True)
class Architecture:
    """What a state_dict's keys and shapes tell.

    Attributes:
        family: a name.
        width: of the tokens; 0: unknown.
        depth: number of blocks; 0: unknown.
        interactions: of the adapter; 0: none.
    """

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

    @property
    def remedy(self) -> str:
        """What to do with a file of it, after a semicolon."""
        return _REMEDIES.get(self.family, "")

    @staticmethod
    def of(state: State, others: Iterable[str] = ()) -> Architecture:
        """Of a state_dict in our names.

        Args:
            state: a backbone, with an adapter or without.
            others: further keys of the file, in which other architectures are looked for.
        """
        for family, pattern in _FOREIGN:
            if any(re.search(rf"(^|\.){pattern}", key) for key in (*state, *others)):
                return Architecture(family)
        for family, name in _KNOWN:
            pattern = re.escape(name).replace(r"\#", r"\d+")
            key = next((key for key in state if re.fullmatch(pattern, key)), None)
            if key is None:
                continue
            stem = name.partition(".")[0]
            qkv = state.get(key.replace("relative_position_bias_table", "qkv.weight"))
            width = 0 if qkv is None else qkv.shape[-1]
            if family == "a plain ViT" and "norm_pre.weight" in state:
                family = "a ViT with a norm before its blocks, such as CLIP's"
            elif family == "a plain ViT" and "pos_embed" not in state:
                family = _ROTARY
            depth = depth_of(state, stem)
            return Architecture(family, width, depth, depth_of(state, "interactions"))
        keys = ", ".join([*state, *others][:3])
        return Architecture(f"no vision transformer that is known here, with keys {keys}")


def depth_of(state: Iterable[str], stem: str) -> int:
    """Number of modules in the list `stem`."""
    pattern = re.compile(rf"{stem}\.(\d+)\.")
    found = [int(match[1]) for match in map(pattern.match, state) if match]
    return max(found, default=-1) + 1


def differing_parts(state: Iterable[str], target: Iterable[str]) -> tuple[set[str], set[str]]:
    """How the blocks of two models differ in their parts, and so their interactions.

    Returns:
        What all of the target have and none of the state_dict's, and the converse, of lists of
        which both have some; as keys with "*" for the index.
    """
    lacking, surplus = set(), set()
    given, expected = _parts(state), _parts(target)
    for stem in given.keys() & expected.keys():
        own, theirs = given[stem].values(), expected[stem].values()
        lacking |= {f"{stem}.*.{part}" for part in set.intersection(*theirs).difference(*own)}
        surplus |= {f"{stem}.*.{part}" for part in set.intersection(*own).difference(*theirs)}
    return lacking, surplus


def _parts(keys: Iterable[str]) -> dict[str, dict[str, set[str]]]:
    """For each of the lists, and each of its modules, the names in it."""
    parts: dict[str, dict[str, set[str]]] = {}
    for key in keys:
        if match := re.match(r"(blocks|layers|interactions)\.(\d+)\.(.*)", key):
            parts.setdefault(match[1], {}).setdefault(match[2], set()).add(match[3])
    return parts
