# SPDX-License-Identifier: Apache-2.0
"""Everything that defines one model, checked once."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from .layers.attention import ATTENTIONS
from .registry import builder_of, families

# Of images in [0, 1]: ImageNet's, and AugReg's of both.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
PATCH_SIZE = 16
COARSEST_STRIDE = 32
NUM_MAPS = 4
# Of the group norm in the plain baselines' necks.
NECK_GROUPS = 32
TASKS = ("detection", "segmentation")
# spm: the spatial prior is added to the plain ViT's maps; spm+injector: and injected into the ViT;
# spm+extractor: the adapter without injectors; full: the adapter.
COMPONENTS = ("full", "spm+extractor", "spm+injector", "spm")
FEATURE_RULES = ("new", "old")
_TYPES: dict[str, Any] = {
    "int": Integral,
    "float": Real,
    "bool": bool,
    "str": str,
    "None": type(None),
}
_POSITIVE = (
    *("embed_dim", "depth", "num_heads", "adapter_heads", "pretrain_size", "patch_size"),
    *("n_points", "window_size", "conv_inplane", "deform_ratio", "mlp_ratio", "cffn_ratio"),
    *("norm_eps", "in_chans"),
)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter for any backbone (paper sec. 3; names as in the published configurations).

    Attributes:
        task: "detection" or "segmentation"; chooses the feature rule here, and windows in the
            published backbones.
        embed_dim: token width D of the ViT, and channels of the four output maps.
        depth: number of ViT blocks.
        adapter_heads: heads of the attention inside injectors and extractors.
        drop_path_rate: stochastic depth: rises linearly to this value over the ViT blocks, and
            applies in full to the ConvFFN of every extractor.
        patch_size: side of the ViT's patches in pixels.
        in_chans: channels of the images.
        attention: the adapter's attention: "deformable", "dense", "cswin" or "pale".
        components: "full", or a part of it: "spm+extractor" has no injectors; "spm+injector" and
            "spm" (paper table 6) have no extractors, see `ViTBaseline`.
        num_interactions: shares into which the ViT blocks are divided, see `shares`; 0: a plain
            ViT.
        interaction_indexes: first and last block of each interaction, where shares are others.
        n_points: sampling points per head and level (deformable attention only).
        deform_ratio: value width relative to embed_dim (deformable attention only).
        naive_attention: form the whole attention matrix explicitly (dense attention only).
        conv_inplane: width of the spatial prior module's stem.
        with_cffn: give each extractor a ConvFFN.
        cffn_ratio: hidden width of the ConvFFN relative to embed_dim.
        injector_init: initial value of the injectors' gamma; 0 makes them identities.
        use_extra_extractor: two more extractors after the last interaction.
        add_vit_feature: add the ViT's tokens to the four maps.
        feature_rule: which tokens: "new", all four maps get those of the last block; "old", map i
            gets those after interaction i, of which there must be four. None: "new" for detection,
            "old" for segmentation.
        norm_taps: what extractors and maps get of the ViT's tokens first goes through the ViT's own
            final norm.
        norm_eps: of the adapter's layer norms.
        freeze_backbone: the ViT and the injectors run without gradients, the ViT in inference mode.
        with_cp: recompute activations in the backward pass (activation checkpointing).

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of range or contradicts another; the message names both.
    """

    task: str
    embed_dim: int
    depth: int
    adapter_heads: int
    drop_path_rate: float
    patch_size: int = PATCH_SIZE
    in_chans: int = 3
    attention: str = "deformable"
    components: str = "full"
    num_interactions: int = NUM_MAPS
    interaction_indexes: Sequence[Sequence[int]] | None = None
    n_points: int = 4
    deform_ratio: float = 1.0
    naive_attention: bool = False
    conv_inplane: int = 64
    with_cffn: bool = True
    cffn_ratio: float = 0.25
    injector_init: float = 0.0
    use_extra_extractor: bool = True
    add_vit_feature: bool = True
    feature_rule: str | None = None
    norm_taps: bool = False
    norm_eps: float = 1e-6
    freeze_backbone: bool = False
    with_cp: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        one_of("task", self.task, TASKS)
        one_of("attention", self.attention, tuple(ATTENTIONS))
        one_of("components", self.components, COMPONENTS)
        if self.feature_rule is not None:
            one_of("feature_rule", self.feature_rule, FEATURE_RULES)
        for name in _POSITIVE:
            if not 0 < getattr(self, name, 1) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not math.isfinite(self.injector_init):
            raise ValueError(f"injector_init: expected a finite number, got {self.injector_init}")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate: expected 0 <= rate < 1, got {self.drop_path_rate}")
        for name, part in (("cffn_ratio", self.with_cffn), ("mlp_ratio", True)):
            ratio = getattr(self, name, 1)
            if part and int(self.embed_dim * ratio) < 1:
                raise ValueError(
                    f"{name}: expected a hidden width of at least 1, got {ratio} of embed_dim = "
                    f"{self.embed_dim}"
                )
        if self.naive_attention and self.attention != "dense":
            raise ValueError(
                'naive_attention: expected attention="dense" beside it, '
                f'got attention="{self.attention}"'
            )
        self._check_interactions()
        if self.ranges and self.components != "spm":  # there are injectors or extractors
            self._check_heads()

    def _check_types(self) -> None:
        for field in fields(self):
            value, names = getattr(self, field.name), str(field.type).split(" | ")
            if not set(names) <= _TYPES.keys() or (value is None and "None" in names):
                continue
            # A bool is an int, but no number of anything.
            is_bool = isinstance(value, bool)
            if is_bool != ("bool" in names) or not isinstance(value, _TYPES[names[0]]):
                raise TypeError(f"{field.name}: expected {field.type}, got {value!r}")

    def _check_heads(self) -> None:
        heads, widths = self.adapter_heads, f"embed_dim = {self.embed_dim}"
        value_width = self.embed_dim
        if self.attention == "deformable":
            value_width = int(self.deform_ratio * self.embed_dim)
            widths += f" and of int(deform_ratio * embed_dim) = {value_width}"
        if self.embed_dim % heads or value_width % heads or not value_width:
            raise ValueError(f"adapter_heads: expected a divisor of {widths}, got {heads}")

    def _check_interactions(self) -> None:
        if self.interaction_indexes is not None:
            self._check_indexes(self.interaction_indexes)
        elif not 0 <= self.num_interactions <= self.depth:
            raise ValueError(
                f"num_interactions: expected at most one for each of the {self.depth} blocks "
                f"(depth), got {self.num_interactions}"
            )
        if self.is_adapter and self.add_vit_feature and self.takes_each_interaction:
            number = len(self.ranges)
            if number != NUM_MAPS:
                raise ValueError(
                    f"num_interactions: expected {NUM_MAPS} for segmentation (feature_rule "
                    f'"old"), where map i receives the ViT\'s tokens after interaction i, got '
                    f'{number}; use feature_rule="new" or add_vit_feature=False'
                )

    def _check_indexes(self, indexes: Sequence[Sequence[int]]) -> None:
        expected = 0
        try:
            for first, last in indexes:
                integers = isinstance(first, Integral) and isinstance(last, Integral)
                if not integers or first != expected or last < first:
                    break
                expected = last + 1
            else:
                if expected == self.depth:
                    return
        except (TypeError, ValueError):
            pass  # no pairs
        raise ValueError(
            "interaction_indexes: expected pairs (first, last) that cover the blocks "
            f"0 to {self.depth - 1} one after the other, got {indexes!r}"
        )

    @property
    def is_adapter(self) -> bool:
        """Whether there are extractors; without them the model is a `ViTBaseline`."""
        return self.components in ("full", "spm+extractor") and bool(self.ranges)

    @property
    def ranges(self) -> list[range]:
        """The ViT blocks of each interaction."""
        if self.interaction_indexes is not None:
            return [range(first, last + 1) for first, last in self.interaction_indexes]
        return shares(self.depth, self.num_interactions)

    @property
    def takes_each_interaction(self) -> bool:
        """Whether map i gets the ViT's tokens after interaction i, and not all the last ones."""
        rule = self.feature_rule or ("new" if self.task == "detection" else "old")
        return rule == "old"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(AdapterConfig):
    """An adapter and one of the published backbones (paper appendix A).

    Attributes:
        family: "plain_vit", "beit" or "uniperceiver".
        num_heads: heads of the ViT's self-attention.
        pretrain_size: side of the square pre-training image in pixels; sets the position grid.
        mlp_ratio: hidden width of the ViT's MLP relative to embed_dim.
        layer_scale: scale each ViT branch by a learned vector (plain_vit only: the others have it).
        window_size: side of the detection windows in tokens.
        img_size: side of the images in pixels, for BEiT segmentation, which serves one size; None
            for all others, which take any size.
        residual_blocks: a convolutional residual block after every (depth / 4)-th block (ViTDet).
        mean: of the images in [0, 1] that the ViT was pre-trained with, for each channel.
        std: their standard deviation. Nothing is computed with the two: see `default_cfg`.

    Raises:
        ValueError: a value is out of range or contradicts another; the message names both.
    """

    family: str
    num_heads: int
    pretrain_size: int
    mlp_ratio: float = 4.0
    layer_scale: bool = True
    window_size: int = 14
    img_size: int | None = None
    residual_blocks: bool = False
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        one_of("family", self.family, families())
        super().__post_init__()
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim = {self.embed_dim}, "
                f"got {self.num_heads}"
            )
        if not self.is_adapter and self.family == "plain_vit" and self.embed_dim % NECK_GROUPS:
            raise ValueError(
                f"embed_dim: expected a multiple of {NECK_GROUPS} for a plain ViT, whose necks "
                f"normalise that many groups of channels, got {self.embed_dim}"
            )
        if self.pretrain_size % self.patch_size:
            raise ValueError(
                f"pretrain_size: expected a multiple of the patch size {self.patch_size}, "
                f"got {self.pretrain_size}"
            )
        if self.patch_size != PATCH_SIZE:
            raise ValueError(
                f"patch_size: expected {PATCH_SIZE} for the published backbones, got "
                f"{self.patch_size}; ViTAdapter.from_timm takes others"
            )
        if builder_of(self.family, adapter=self.is_adapter) is None:
            raise ValueError(
                "components, num_interactions: expected an adapter with extractors around "
                f"{self.family}, got {self.components!r}, {self.num_interactions}"
            )
        if self.norm_taps:
            raise ValueError(
                f"norm_taps: expected False for {self.family}, which has no final norm, got True"
            )
        if self.residual_blocks and self.freeze_backbone:
            raise ValueError(
                "freeze_backbone: expected False with residual_blocks=True, which lie between the "
                "ViT's blocks and could not learn, got True"
            )
        if not self.layer_scale and self.family != "plain_vit":
            raise ValueError(f"layer_scale: expected True for {self.family}, got False")
        if self.depth % NUM_MAPS and (self.task == "detection" or not self.is_adapter):
            raise ValueError(
                f"depth: expected a multiple of {NUM_MAPS} for detection and for a plain ViT, "
                f"where every (depth / {NUM_MAPS})-th block is special, got {self.depth}"
            )
        if self.serves_one_size:
            if self.image_side < COARSEST_STRIDE or self.image_side % COARSEST_STRIDE:
                raise ValueError(
                    f"img_size: expected a multiple of {COARSEST_STRIDE} (published: 480, 512, "
                    f"640, 896; for a patch of 16, the position biases serve one square of "
                    f"tokens), got {self.img_size}"
                )
        elif self.img_size is not None:
            raise ValueError(
                f"img_size: expected None, this model takes images of any size (only BEiT for "
                f"segmentation serves a single one), got {self.img_size}"
            )

    def _check_types(self) -> None:
        super()._check_types()
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not _are_numbers(values):
                raise TypeError(f"{name}: expected a number for each channel, got {values!r}")
            # Those of three channels are this module's own, and unused with others.
            if len(values) not in (self.in_chans, 3):
                raise ValueError(f"{name}: expected {self.in_chans} values, got {values!r}")

    def _check_interactions(self) -> None:
        equal = self.interaction_indexes is None and self.num_interactions > 0
        if equal and self.depth % self.num_interactions:
            raise ValueError(
                f"num_interactions: expected 0 or a divisor of depth = {self.depth}, "
                f"got {self.num_interactions}"
            )
        super()._check_interactions()

    @property
    def default_cfg(self) -> dict[str, Any]:
        """What the ViT was pre-trained with, see `FeaturePyramid`."""
        sizes = (self.in_chans, self.pretrain_size, self.pretrain_size)
        # Of another number of channels nothing is known.
        known = {
            name: tuple(map(float, values)) if len(values) == self.in_chans else None
            for name, values in (("mean", self.mean), ("std", self.std))
        }
        return {"input_size": sizes, **known}

    @property
    def serves_one_size(self) -> bool:
        """Whether the model takes images of img_size only."""
        return self.family == "beit" and self.task == "segmentation"

    @property
    def image_side(self) -> int:
        """img_size, or 512, the crop of most published segmentation models."""
        return 512 if self.img_size is None else self.img_size

    @property
    def last_blocks(self) -> list[int]:
        """Last ViT block of each quarter."""
        share = self.depth // NUM_MAPS
        return list(range(share - 1, self.depth, share))

    @property
    def global_blocks(self) -> frozenset[int]:
        """Indices of the ViT blocks that attend globally."""
        return frozenset(range(self.depth) if self.task == "segmentation" else self.last_blocks)

    @property
    def beit_windows(self) -> list[int] | None:
        """Side of the windows of BEiT's blocks; None: global attention.

        For detection no block is global: its biases would need a fixed image size. Windows of four
        times the side approximate it (appendix A.1).
        """
        if self.task == "segmentation":
            return None
        return [
            4 * self.window_size if index in self.global_blocks else self.window_size
            for index in range(self.depth)
        ]


def _are_numbers(values: object) -> bool:
    """Whether they are some, in an order; tensors and arrays may hold them."""
    if not isinstance(values, Sequence | np.ndarray | Tensor) or getattr(values, "ndim", 1) != 1:
        return False
    each = (v.item() if isinstance(v, Tensor) and not v.dim() else v for v in values)
    return all(isinstance(value, Real) and not isinstance(value, bool) for value in each)


def backbone_arguments(config: ModelConfig, backbone: type[nn.Module]) -> dict[str, Any]:
    """What the constructor of a published backbone takes: the configuration's values, by name."""
    derived = {"img_size": config.image_side, "window_sizes": config.beit_windows}
    return {
        name: derived[name] if name in derived else getattr(config, name)
        for name in inspect.signature(backbone).parameters
    }


def shares(depth: int, number: int) -> list[range]:
    """Divides `depth` blocks into `number` shares, one after the other.

    They are equal where the depth can be divided so. Else some have one block more than others,
    among them the last, as evenly spread as possible: 18 = 4 + 5 + 4 + 5, 27 = 6 + 7 + 7 + 7.
    """
    ends = [depth * index // number for index in range(1, number + 1)]
    return [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]


def one_of(name: str, value: str, valid: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `valid`."""
    if value not in valid:
        raise ValueError(f"{name}: expected one of {', '.join(valid)}, got {value!r}")


def field_names(kind: type[AdapterConfig]) -> list[str]:
    """Names of all values of a configuration."""
    return [field.name for field in fields(kind)]


def check_options(
    options: dict[str, Any],
    valid: Collection[str],
    advice: str = "",
    others: Collection[str] = (),
) -> None:
    """Raises ValueError, beginning with its name, for an option that is not among `valid`.

    Args:
        options: as given.
        valid: names.
        advice: for the message.
        others: names that may have been meant too.
    """
    for name in options:
        if name in valid:
            continue
        near = difflib.get_close_matches(name, [*valid, *others], n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        text = f"{name}: expected one of the options below, got {name}={options[name]!r}"
        names = f"options: {', '.join(sorted(valid))}"
        raise ValueError("; ".join(filter(None, (text, hint, advice, names))))
