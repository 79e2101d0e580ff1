# SPDX-License-Identifier: Apache-2.0
"""Everything that defines one ViT-Adapter, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from .layers.attention import ATTENTIONS

PATCH_SIZE = 16
TASKS = ("detection", "segmentation")
NUM_MAPS = 4
_POSITIVE = (
    *("embed_dim", "depth", "num_heads", "adapter_heads", "pretrain_size", "num_interactions"),
    *("n_points", "window_size", "conv_inplane", "deform_ratio", "mlp_ratio", "cffn_ratio"),
)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """One ViT-Adapter (paper sec. 3 and appendix A; names as in the published configurations).

    Attributes:
        task: "detection" (14x14 windows in most ViT blocks, ViT features of the last block) or
            "segmentation" (global attention, ViT features after each of the four interactions).
        embed_dim: token width D of the ViT, and channels of the four output maps.
        depth: number of ViT blocks.
        num_heads: heads of the ViT's self-attention.
        adapter_heads: heads of the attention inside injectors and extractors.
        pretrain_size: side of the square pre-training image in pixels; sets the position grid.
        drop_path_rate: stochastic depth: rises linearly to this value over the ViT blocks, and
            applies in full to the ConvFFN of every extractor.
        attention: the adapter's attention: "deformable", "dense", "cswin" or "pale".
        num_interactions: equal shares into which the ViT blocks are divided.
        n_points: sampling points per head and level (deformable attention only).
        deform_ratio: value width relative to embed_dim (deformable attention only).
        naive_attention: form the whole attention matrix explicitly (dense attention only).
        mlp_ratio: hidden width of the ViT's MLP relative to embed_dim.
        layer_scale: scale each ViT branch by a learned vector that starts at 1.
        window_size: side of the detection windows in tokens.
        conv_inplane: width of the spatial prior module's stem.
        with_cffn: give each extractor a ConvFFN.
        cffn_ratio: hidden width of the ConvFFN relative to embed_dim.
        injector_init: initial value of the injectors' gamma; 0 makes them identities.
        use_extra_extractor: two more extractors after the last interaction.
        add_vit_feature: add the ViT's tokens to the four maps.
        with_cp: recompute activations in the backward pass (activation checkpointing).

    Raises:
        ValueError: a value is out of range or contradicts another; the message names both.
    """

    task: str
    embed_dim: int
    depth: int
    num_heads: int
    adapter_heads: int
    pretrain_size: int
    drop_path_rate: float
    attention: str = "deformable"
    num_interactions: int = NUM_MAPS
    n_points: int = 4
    deform_ratio: float = 1.0
    naive_attention: bool = False
    mlp_ratio: float = 4.0
    layer_scale: bool = True
    window_size: int = 14
    conv_inplane: int = 64
    with_cffn: bool = True
    cffn_ratio: float = 0.25
    injector_init: float = 0.0
    use_extra_extractor: bool = True
    add_vit_feature: bool = True
    with_cp: bool = False

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        _one_of("attention", self.attention, tuple(ATTENTIONS))
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate: expected 0 <= rate < 1, got {self.drop_path_rate}")
        for name in ("num_heads", "adapter_heads"):
            if self.embed_dim % getattr(self, name):
                raise ValueError(
                    f"{name}: expected a divisor of embed_dim = {self.embed_dim}, "
                    f"got {getattr(self, name)}"
                )
        if self.pretrain_size % PATCH_SIZE:
            raise ValueError(
                f"pretrain_size: expected a multiple of the patch size {PATCH_SIZE}, "
                f"got {self.pretrain_size}"
            )
        if self.naive_attention and self.attention != "dense":
            raise ValueError(
                'naive_attention: expected attention="dense" beside it, '
                f'got attention="{self.attention}"'
            )
        self._check_interactions()

    def _check_interactions(self) -> None:
        if self.depth % self.num_interactions:
            raise ValueError(
                f"num_interactions: expected a divisor of depth = {self.depth}, "
                f"got {self.num_interactions}"
            )
        if self.task == "detection":
            if self.depth % NUM_MAPS:
                raise ValueError(
                    f"depth: expected a multiple of {NUM_MAPS} for detection, where every "
                    f"(depth / {NUM_MAPS})-th block attends globally, got {self.depth}"
                )
        elif self.add_vit_feature and self.num_interactions != NUM_MAPS:
            raise ValueError(
                f"num_interactions: expected {NUM_MAPS} for segmentation, where map i receives the "
                f"ViT's tokens after interaction i, got {self.num_interactions}; "
                'use task="detection" or add_vit_feature=False'
            )

    @property
    def blocks_per_interaction(self) -> int:
        """ViT blocks between an injector and the extractor after it."""
        return self.depth // self.num_interactions

    @property
    def global_blocks(self) -> frozenset[int]:
        """Indices of the ViT blocks that attend globally."""
        if self.task == "segmentation":
            return frozenset(range(self.depth))
        share = self.depth // NUM_MAPS
        return frozenset(range(share - 1, self.depth, share))


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name}: expected one of {', '.join(valid)}, got {value!r}")
