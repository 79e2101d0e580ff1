# SPDX-License-Identifier: Apache-2.0
"""What a state_dict's keys and shapes tell of its model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
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
    def of(state: State) -> Architecture:
        """Of a state_dict in our names."""
        interactions = depth_of(state, "interactions")
        for family, stem, key in (
            ("Uni-Perceiver", "layers", "layers.0.self_attn.in_proj.weight"),
            ("BEiT", "blocks", "blocks.0.attn.relative_position_bias_table"),
            ("a plain ViT", "blocks", "blocks.0.attn.qkv.weight"),
        ):
            if key not in state:
                continue
            width = state["blocks.0.norm1.weight"] if stem == "blocks" else state[key].t()
            return Architecture(family, width.shape[0], depth_of(state, stem), interactions)
        for family, pattern in (
            ("a Swin Transformer", r"layers\.0\.blocks\.0\."),
            ("a ConvNeXt", r"(downsample_layers|stages\.\d+\.(blocks\.)?\d+\.(dwconv|conv_dw))"),
            ("a ResNet", r"layer1\.0\.conv1"),
            ("CLIP", r"(visual\.)?transformer\.resblocks\."),
            ("a transformers model", r"(.*\.)?encoder\.layer\.0\."),
        ):
            if any(re.match(pattern, key) for key in state):
                return Architecture(family)
        keys = ", ".join(list(state)[:3])
        return Architecture(f"no vision transformer that is known here, with keys {keys}")


def depth_of(state: State, stem: str) -> int:
    """Number of modules in the list `stem`."""
    pattern = re.compile(rf"{stem}\.(\d+)\.")
    found = [int(match[1]) for match in map(pattern.match, state) if match]
    return max(found, default=-1) + 1
