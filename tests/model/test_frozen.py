# SPDX-License-Identifier: Apache-2.0
"""What learns, what is frozen and what is computed twice, in every model that can be asked for."""

from __future__ import annotations

import itertools

import pytest
import torch

from families import FAMILIES, build
from vitadapter import create_model
from vitadapter.layers.attention import ATTENTIONS
from vitadapter.layers.interaction import Extractor, Injector

IMAGES = torch.randn(2, 3, 64, 64)
VIT_PARTS = ("patch_embed", "pos_embed", "cls_token", "blocks", "visual_embed", "layers")


def _combinations():
    """Arguments of `build`: all models, and for the plain family all parts and attentions."""
    for family, freeze, with_cp in itertools.product(FAMILIES, (False, True), (False, True)):
        if family != "vitdet" or not freeze:
            yield family, {"freeze_backbone": freeze, "with_cp": with_cp}
    for components, number, attention, freeze, task in itertools.product(
        ("full", "spm+extractor", "spm+injector", "spm"),
        (0, 1, 4),
        ATTENTIONS,
        (False, True),
        ("segmentation", "detection"),
    ):
        if (attention, number) != ("deformable", 4) and task != "detection":
            continue
        if attention != "deformable" and number != 1:
            continue
        yield (
            "plain",
            {
                **{"components": components, "num_interactions": number, "attention": attention},
                **{"freeze_backbone": freeze, "with_cp": True, "task": task},
            },
        )


def _name(value) -> str:
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


@pytest.mark.parametrize(("family", "options"), [*_combinations()], ids=_name)
def test_what_asks_for_a_gradient_gets_one_and_nothing_else(family, options):
    model = build(family, **options)
    sum(m.square().mean() for m in model(IMAGES)).backward()
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad != (parameter.grad is not None)
    ]
    assert wrong == []
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    vit = {name for name, _ in model.named_parameters() if name.startswith(VIT_PARTS)}
    assert {id(each) for each in model.vit_parameters()} == {
        id(each) for name, each in model.named_parameters() if name in vit
    }
    if not options["freeze_backbone"]:
        assert frozen == set()
        return
    unread = {name for name in frozen if "injector" in name}
    if model.config.components == "spm+injector" and model.config.ranges:
        unread.add("level_embed")
    assert frozen == vit | unread


@pytest.mark.parametrize("family", [each for each in FAMILIES if each != "vitdet"])
def test_a_frozen_vit_stays_in_inference_mode_and_makes_no_graph(family):
    model = build(family, freeze_backbone=True, drop_path_rate=0.5).train()
    blocks = [*getattr(model, "blocks", [])] or [*model.layers]
    graph = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: graph.append(out.requires_grad))
    model(IMAGES)
    assert not any(block.training for block in blocks)
    assert graph == [False] * len(blocks)
    assert not hasattr(model, "spm") or model.spm.training


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_computes_every_block_twice(family, with_cp):
    model = build(family, with_cp=with_cp)
    parts = [*getattr(model, "blocks", [])] or [*model.layers]
    parts += [part for part in model.modules() if isinstance(part, Injector | Extractor)]
    runs = dict.fromkeys(parts, 0)

    def count(module, args):
        runs[module] += 1

    for part in parts:
        part.register_forward_pre_hook(count)
    maps = model(IMAGES)
    assert set(runs.values()) == {1}
    sum(m.square().mean() for m in maps).backward()
    assert set(runs.values()) == {2 if with_cp else 1}


@pytest.mark.parametrize("family", ["baseline", "beit baseline", "spm", "spm+injector", "vitdet"])
def test_activation_checkpointing_changes_no_gradient_of_a_baseline(family):
    plain, saving = build(family).double(), build(family, with_cp=True).double()
    saving.load_state_dict(plain.state_dict())
    for model in (plain, saving):
        sum(m.square().mean() for m in model(IMAGES.double())).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_residual_blocks_in_a_frozen_vit_are_refused():
    with pytest.raises(ValueError, match="freeze_backbone: expected False with residual_blocks"):
        create_model("vitdet_tiny", task="detection", freeze_backbone=True)
