# SPDX-License-Identifier: Apache-2.0
"""Plain vision transformers of timm, unmodified; the only file that imports timm."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..images import of_traced_size
from .beit import with_class_token
from .protocol import Grid, Step, check_not_compiled

# What timm and torch raise for wrong arguments.
_WRONG_ARGUMENTS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError),
    ValueError,
)


class TimmViT(nn.Module):
    """A plain vision transformer of timm as a `Backbone`.

    The parts of the model's own `forward_features` are called in its order: patches, positions and
    prefix tokens, a norm where it has one, then block after block. Class and register tokens,
    relative and rotary positions are its own business.

    Args:
        model: name or model.
        pretrained: load timm's weights.
        img_size: for models of one image size; None: the size timm gives them.
        model_args: further arguments for timm.create_model.
        with_norm: the final norm is used.

    Attributes:
        model: timm's model.
        in_chans: channels of the images.

    Raises:
        ModuleNotFoundError: timm is not installed.
        TypeError: the model is neither a name nor a module, or is compiled.
        ValueError: the model is not a plain vision transformer, or drops patches; or it is made
            already, and there are arguments to make it with.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        pretrained: bool,
        img_size: int | tuple[int, int] | None,
        model_args: dict[str, Any],
        with_norm: bool,
    ) -> None:
        super().__init__()
        self.model = _create(model, pretrained, img_size, model_args)
        # What comes after the blocks does not run here; data-parallel training expects gradients of
        # all parameters that require them.
        for name in ("norm", "fc_norm", "head", "head_dist", "attn_pool"):
            part = getattr(self.model, name, None)
            if isinstance(part, nn.Module) and not (with_norm and name == "norm"):
                part.requires_grad_(False)
        self.embed_dim = self.model.embed_dim
        self.depth = len(self.model.blocks)
        self.patch_size = self.model.patch_embed.patch_size[0]
        self.in_chans = self.model.patch_embed.proj.weight.shape[1]
        self.num_prefix_tokens = self.model.num_prefix_tokens

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's, empty for a model that was not made by its name."""
        return dict(getattr(self.model, "pretrained_cfg", {}))

    @property
    def norm(self) -> Step | None:
        """The model's final norm; None where it has none."""
        return None if isinstance(self.model.norm, nn.Identity) else self.model.norm

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published file's weights by this model's names and in its sizes: timm's own conversion.

        Biases of DINOv3 that timm leaves out, for they are zero in the published files, stay in the
        result where they are not.

        Raises:
            ValueError: the file lacks what the conversion needs.
        """
        model = getattr(self.model, "_orig_mod", self.model)  # of torch.compile
        modules = [sys.modules[kind.__module__] for kind in type(model).__mro__]
        convert = next(filter(None, (getattr(m, "checkpoint_filter_fn", None) for m in modules)))
        given = {key: value for key, value in state.items() if key != "mask_token"}
        if "blocks.0.ls1.gamma" in model.state_dict():  # gamma_1 in DeiT III
            given = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", k): v for k, v in given.items()}
        if "register_tokens" in state or "blocks.0.mlp.w12.weight" in state:
            given["mask_token"] = next(iter(state.values()))  # by which timm knows DINOv2
        try:
            with redirect_stdout(None):  # a bias that the model does not have
                result: dict[str, Tensor] = convert(given, model)
        except Exception as error:  # whatever a file of another model makes of it
            raise ValueError(
                f"checkpoint: expected a file that timm converts for {type(model).__name__}, got "
                f"one with which it fails: {type(error).__name__}: {error}"
            ) from error
        for key, bias in state.items():
            own = {key, key.replace("qkv.bias", "q_bias")}  # for all three, for queries
            if key.endswith("attn.qkv.bias") and not own & result.keys():
                query, _, value = bias.chunk(3)  # one of the keys has no effect
                if query.any() or value.any():
                    result[key] = bias
        return result

    def start(self, images: Tensor) -> tuple[Tensor, Grid, Sequence[Step]]:
        """Tokens, grid, and one callable for each block.

        Raises:
            ValueError: the model serves one image size, and these images have another.
        """
        if images.shape[0] == 0:
            # timm leaves a size for view to find out, which it cannot without images.
            tokens, shape, steps = self.start(images.new_zeros(1, *images.shape[1:]))
            return tokens[:0], shape, [partial(_beside_a_blank, step) for step in steps]
        model = self.model
        height, width = images.shape[2:]
        embed = model.patch_embed
        if embed.strict_img_size and (height, width) != tuple(embed.img_size):
            advice = "; timm makes it for all with dynamic_img_size=True"
            raise ValueError(
                f"images: expected {embed.img_size[0]}x{embed.img_size[1]} pixels, the one size "
                f"that this timm model serves (img_size), got {height}x{width}"
                f"{advice if hasattr(model, 'dynamic_img_size') else ''}"
            )
        if embed.strict_img_size:
            images = of_traced_size(images)
        shape = (height // self.patch_size, width // self.patch_size)
        x = embed(images)
        if hasattr(model, "shared_rel_pos"):  # VisionTransformerRelPos
            if model.cls_token is not None:
                x = with_class_token(model.cls_token, x)
            bias = model.shared_rel_pos.get_bias() if model.shared_rel_pos is not None else None
            return x, shape, [partial(block, shared_rel_pos=bias) for block in model.blocks]
        if not hasattr(model, "_pos_embed"):  # BEiT, whose positions live in its blocks
            x = with_class_token(model.cls_token, x)
            if model.pos_embed is not None:
                x = x + model.pos_embed
            bias = model.rel_pos_bias() if model.rel_pos_bias is not None else None
            blocks = [partial(block, shared_rel_pos_bias=bias) for block in model.blocks]
            return model.pos_drop(x), shape, blocks
        x = model._pos_embed(x)
        if isinstance(x, tuple):  # Eva and DINOv3, with rotary positions
            x, rope = x
            of_block = [rope] * self.depth
            if getattr(model, "rope_mixed", False) and rope is not None:
                of_block = [rope[index] for index in range(self.depth)]
            steps = [
                partial(block, rope=own) for block, own in zip(model.blocks, of_block, strict=True)
            ]
            return model.norm_pre(x), shape, steps
        return model.norm_pre(model.patch_drop(x)), shape, list(model.blocks)


def _beside_a_blank(step: Step, x: Tensor) -> Tensor:
    """step(x) of no images, by way of one of which nothing is kept; gradients are zero."""
    return step(torch.cat((x, x.new_zeros(1, *x.shape[1:]))))[:0]


def _create(
    model: str | nn.Module,
    pretrained: bool,
    img_size: int | tuple[int, int] | None,
    model_args: dict[str, Any],
) -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "ViTAdapter.from_timm needs timm: pip install 'vitadapter[models]'"
        ) from error
    if not isinstance(model, str):
        making = {"pretrained": pretrained, "img_size": img_size, "model_args": model_args}
        for name, value in making.items():
            if value:
                raise ValueError(
                    f"{name}: expected to be left out with a model that timm has made already, "
                    f"got {value!r}; give it to timm.create_model"
                )
        if not isinstance(model, nn.Module):
            raise TypeError(f"name: expected the name of a timm model or the model, got {model!r}")
        check_not_compiled("name", model)
        _check_plain(model)
        return model
    if not isinstance(model_args, Mapping):
        raise TypeError(f"model_args: expected a dict, got {model_args!r}")
    arguments = {"num_classes": 0, **model_args}
    if img_size is not None:
        other = model_args.get("img_size")
        if other not in (None, img_size):
            raise ValueError(
                f"img_size: expected once, got {img_size!r} beside {other!r} in model_args"
            )
        arguments["img_size"] = img_size
    # The images are padded already. But timm's check of that writes their size into a message,
    # which makes it a constant for torch.compile; padding by nothing does not.
    dynamic = {"dynamic_img_size": True, "dynamic_img_pad": True}
    try:
        try:
            vit = timm.create_model(model, pretrained=pretrained, **{**dynamic, **arguments})
        except TypeError:  # a model of one image size
            vit = timm.create_model(model, pretrained=pretrained, **arguments)
    except _WRONG_ARGUMENTS as error:
        known = [*timm.list_models(), *timm.list_pretrained()]
        near = [] if model in known else difflib.get_close_matches(model, known)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"name, model_args: expected what timm.create_model takes, got {model!r}, "
            f"{arguments}: {type(error).__name__}: {error}{hint}"
        ) from error
    _check_plain(vit)
    return vit


def _check_plain(model: Any) -> None:
    """Raises ValueError unless `TimmViT.start` runs what the model does, patch for patch."""
    from timm.layers import PatchEmbed
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    kind = type(model)
    kinds = (VisionTransformer, Eva, Beit, VisionTransformerRelPos)
    # A subclass with a forward of its own does something else.
    if getattr(kind, "forward_features", None) not in [each.forward_features for each in kinds]:
        names = ", ".join(each.__name__ for each in kinds)
        raise ValueError(
            "name: expected a plain vision transformer of timm (one with the forward_features of "
            f"{names}), got {kind.__name__}"
        )
    embed = model.patch_embed
    if type(embed).forward is not PatchEmbed.forward:
        raise ValueError(
            "name: expected a plain vision transformer, whose patches one convolution embeds "
            f"(timm's PatchEmbed), got {kind.__name__} with the stem {type(embed).__name__}"
        )
    rows, columns = embed.patch_size
    if rows != columns:
        raise ValueError(f"name: expected square patches, got {rows}x{columns} pixels")
    if not all(embed.grid_size):
        raise ValueError(
            f"img_size: expected a patch of {rows}x{columns} pixels or more, got {embed.img_size}"
        )
    if embed.proj.weight.dtype != torch.get_default_dtype():
        raise ValueError(
            f"name, model_args: expected weights of {torch.get_default_dtype()}, as the adapter's, "
            f"got {embed.proj.weight.dtype}; convert both afterwards, by model.to(dtype)"
        )
    # Whoever wants more tokens changes the stride; positions and patch_size know nothing of it.
    stride = tuple(getattr(embed.proj, "stride", embed.patch_size))
    if stride != tuple(embed.patch_size):
        raise ValueError(
            f"name: expected patches of {rows}x{columns} pixels side by side, as patch_size says, "
            f"got a convolution with stride {stride}"
        )
    rate = getattr(getattr(model, "patch_drop", None), "prob", 0.0)
    if rate:
        raise ValueError(
            f"patch_drop_rate: expected 0, since maps need the token of every patch, got {rate}"
        )
