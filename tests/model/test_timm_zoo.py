# SPDX-License-Identifier: Apache-2.0
"""Every model of timm: an adapter is built around it, or it is refused.

Takes a minute. `python tests/model/test_timm_zoo.py` prints the table of docs/model.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from optional import require_integration
from vitadapter import ViTAdapter

# Convolutions of several strides embed the patches.
STEMS = {
    "vit_base_mci_224",
    *(f"vit_{kind}_224" for kind in ("tiny_r_s16_p8", "small_r26_s32", "base_r50_s16")),
    *(f"vit_{kind}_384" for kind in ("tiny_r_s16_p8", "small_r26_s32", "base_r50_s16")),
    *("vit_base_r26_s32_224", "vit_large_r50_s32_224", "vit_large_r50_s32_384"),
    *("vit_small_resnet26d_224", "vit_small_resnet50d_s16_224"),
    *("vit_base_resnet26d_224", "vit_base_resnet50d_224"),
    *("vitamin_small_224", "vitamin_base_224"),
    *(f"vitamin_large_{side}" for side in (224, 256, 336, 384)),
    *(f"vitamin_large2_{side}" for side in (224, 256, 336, 384)),
    *(f"vitamin_xlarge_{side}" for side in (256, 336, 384)),
}
# Label and what names have in them, for the table; the first that fits.
FAMILIES = {
    "tests of timm": "test_vit",
    "DeiT, DeiT III": "deit",
    "BEiT-3": "beit3",
    "BEiT, BEiTv2 (one size)": "beit",
    "relative positions (one size)": "relpos",
    "EVA, EVA-02": "eva",
    "AIMv2": "aimv2",
    "FlexiViT": "flexivit",
    "DINOv2": "dinov2",
    "DINOv3": "dinov3",
    "SigLIP": "siglip",
    "CLIP": "clip",
    "Perception Encoder": "vit_pe_",
    "RADIO": "radio",
    "TIPSv2": "tipsv2",
    "Sapiens2": "sapiens2",
    "LingBot": "lingbot",
    "rotary positions": "rope",
    "others: AugReg, MAE, DINO, ...": "vit",
}


def _names(timm: ModuleType) -> tuple[list[str], list[str]]:
    """Names of the plain vision transformers; and one of each other kind."""
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    plain, others = [], {}
    for name in timm.list_models():
        entry = timm.models.model_entrypoint(name)
        kind = entry.__annotations__.get("return")
        if isinstance(kind, type) and issubclass(
            kind, VisionTransformer | Eva | Beit | VisionTransformerRelPos
        ):
            plain.append(name)
        else:
            others.setdefault((entry.__module__, kind), name)
    return plain, list(others.values())


def _scan(names: list[str]) -> Iterator[tuple[str, ViTAdapter | str]]:
    """Each name, and an adapter whose tensors have no values, or the reason why there is none."""
    for name in names:
        try:
            with torch.device("meta"):
                model = ViTAdapter.from_timm(name, task="segmentation").eval()
        except ValueError as error:
            yield name, str(error)
        else:
            yield name, model


def test_every_plain_vit_of_timm_gets_an_adapter_or_is_refused():
    plain, _ = _names(require_integration("timm"))
    assert len(plain) > 200
    seen, refused = set(), {}
    for name, model in _scan(plain):
        if isinstance(model, str):
            refused[name] = model
            continue
        values = model.interactions[0].extractor.attn.value_proj.out_features
        assert values // model.config.adapter_heads in (16, 32, 64), name
        assert len(model.config.ranges) == 4, name
        # One of each structure computes; not all, which takes another minute.
        parts = frozenset(map(type, model.backbone.modules()))
        structure = (parts, model.patch_size, model.num_prefix_tokens, model.depth % 4)
        if structure in seen:
            continue
        seen.add(structure)
        embed = model.backbone.model.patch_embed
        height, width = embed.img_size if embed.strict_img_size else (64, 96)
        with torch.no_grad():
            maps = model(torch.empty(1, 3, height, width, device="meta"))
        assert [tuple(m.shape) for m in maps] == [
            (1, model.embed_dim, -(-height // s), -(-width // s)) for s in model.strides
        ], name
    assert refused.keys() == STEMS & set(plain)
    assert all("one convolution" in reason for reason in refused.values())


def test_every_other_kind_of_timms_models_is_refused():
    _, others = _names(require_integration("timm"))
    reasons = {name: str(reason) for name, reason in _scan(others)}
    assert {n: r for n, r in reasons.items() if "name: expected a plain vision" not in r} == {}


def _table(timm: ModuleType) -> str:
    rows: dict[str, list[ViTAdapter]] = {}
    for name, model in _scan(_names(timm)[0]):
        if isinstance(model, ViTAdapter):
            family = next(label for label, part in FAMILIES.items() if part in name)
            rows.setdefault(family, []).append(model)

    def values(models: list[ViTAdapter], name: str) -> str:
        return ", ".join(map(str, sorted({getattr(model, name) for model in models})))

    lines = ["| family | models | patch | width | depth |", "|---|---|---|---|---|"]
    for family, models in sorted(rows.items(), key=lambda row: -len(row[1])):
        columns = (values(models, name) for name in ("patch_size", "embed_dim", "depth"))
        lines.append(f"| {family} | {len(models)} | {' | '.join(columns)} |")
    lines.append(f"| | {sum(map(len, rows.values()))} | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    import timm

    print(f"timm {timm.__version__}\n\n{_table(timm)}")
