# SPDX-License-Identifier: Apache-2.0
"""load_checkpoint finds the model in a file by its keys, whatever is around them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import children
import vitadapter
from families import FAMILIES, build
from vitadapter import ViTAdapter, load_checkpoint
from weights import is_loaded, values


def _behind(front, state):
    return {front + key: value for key, value in state.items()}


def _without(state, *stems):
    return {key: value for key, value in state.items() if not key.startswith(stems)}


class _Around(nn.Module):
    """A module that has the model under some name, and parts of its own with names like ours."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.zeros(4, 8))
        self.norm1 = nn.LayerNorm(8)
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
        self.add_module(name, model)


@pytest.mark.parametrize(
    "front",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.backbone._orig_mod.",
        "_fsdp_wrapped_module.",
        "_forward_module.model.",
        "body.",
        "net.encoder.",
        "student.",
        "segmentation_model.0.",
        "a.b.c.d.e.f.",
    ],
)
@pytest.mark.parametrize("family", ["plain", "beit", "uniperceiver", "vitdet"])
def test_whatever_is_in_front_of_all_keys_is_taken_off(front, family):
    model = build(family)
    state = values(model)
    report = load_checkpoint(model, _behind(front, state), strict=True)
    assert is_loaded(model, state)
    assert report.ignored == ()


@pytest.mark.parametrize(
    "contents",
    [
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"weights": {"anything": state}},
        lambda state: {
            "student": state,
            "optimizer": {"state": {0: {"exp_avg": state["up.bias"]}}},
        },
        lambda state: {"state_dict": _behind("student.module.", state), "loss": torch.zeros(1)},
        lambda state: {"app": {"model": {"module": _behind("_orig_mod.", state)}}},
    ],
    ids=["model_state_dict", "nested", "student", "Lightning", "DCP"],
)
def test_containers_are_found_by_their_contents(contents):
    model = build("plain")
    state = values(model)
    load_checkpoint(model, contents(state), strict=True)
    assert is_loaded(model, state)


@pytest.mark.parametrize("name", ["backbone", "body", "level_embed_net"])
def test_outer_keys_with_names_like_ours_do_not_stop_it(name):
    model = build("plain")
    state = values(model)
    report = load_checkpoint(
        model, values(_Around(name, build("plain"))) | _behind(f"{name}.", state)
    )
    assert is_loaded(model, state)
    assert report.ignored == (
        *("blocks.0.bias", "blocks.0.weight", "level_embed", "norm1.bias", "norm1.weight"),
    )


@pytest.mark.parametrize("wrap", ["block", "FSDP of blocks", "checkpointed"])
def test_wrappers_of_single_blocks_are_taken_out_of_the_middle(wrap):
    model, other = build("plain"), build("plain")
    state = values(other)
    if wrap == "block":
        other.blocks[1] = torch.compile(other.blocks[1])
        other.load_state_dict(
            {key.replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in state.items()}
        )
        file = other.state_dict()
        assert any("_orig_mod" in key for key in file)
    else:
        inner = {
            "FSDP of blocks": "_fsdp_wrapped_module",
            "checkpointed": "_checkpoint_wrapped_module",
        }[wrap]
        file = {key.replace("blocks.2.", f"blocks.2.{inner}."): v for key, v in state.items()}
    load_checkpoint(model, file, strict=True)
    assert is_loaded(model, state)


@pytest.fixture
def process_group(tmp_path):
    with children.process_group(tmp_path):
        yield


@pytest.mark.parametrize("kind", ["compiled", "DataParallel", "DDP", "DDP of compiled", "blocks"])
def test_the_target_may_be_wrapped(kind, process_group):
    model = build("plain")
    state = values(model)
    target = model
    if kind == "blocks":
        model.blocks[0] = torch.compile(model.blocks[0])
    elif kind == "DataParallel":
        target = nn.DataParallel(model)
    elif kind == "DDP":
        target = nn.parallel.DistributedDataParallel(model)
    else:
        target = torch.compile(model)
        if kind == "DDP of compiled":
            target = nn.parallel.DistributedDataParallel(target)
    report = load_checkpoint(target, _behind("backbone.", state), strict=True)
    assert report == vitadapter.LoadReport((), (), (), (), ())
    assert all(
        torch.equal(p, state[k.replace("_orig_mod.", "")]) for k, p in model.named_parameters()
    )


def test_a_model_that_is_none_of_ours_is_refused():
    with pytest.raises(TypeError, match=r"model: expected one of create_model.*got Linear$"):
        load_checkpoint(nn.Linear(2, 2), {})
    with pytest.raises(TypeError, match=r"got _Around; give its body$"):
        load_checkpoint(_Around("body", build("plain")), {})


def test_of_teacher_and_student_the_teacher_is_taken():
    model = build("plain")
    teacher = values(model)
    load_checkpoint(model, {"student": values(model), "teacher": _behind("backbone.", teacher)})
    assert is_loaded(model, teacher)


def test_several_models_are_refused_unless_they_are_the_same():
    model = build("plain")
    state = values(model)
    with pytest.raises(ValueError, match=r"got 2 with the same keys, under first and under sec"):
        load_checkpoint(model, {"first": state, "second": values(model)})
    with pytest.raises(ValueError, match=r"under left\.net\. and under right\.net\."):
        load_checkpoint(model, _behind("left.net.", state) | _behind("right.net.", values(model)))
    load_checkpoint(model, {"first": state, "second": {k: v.clone() for k, v in state.items()}})
    assert is_loaded(model, state)


def test_averages_are_refused_where_there_are_none_and_not_taken_unasked():
    model = build("plain")
    state = values(model)
    with pytest.raises(ValueError, match="ema: expected a file with averaged weights"):
        load_checkpoint(model, {"state_dict": state}, ema=True)
    with pytest.raises(ValueError, match="ema: expected a file with averaged weights"):
        load_checkpoint(model, {"state_dict": state | {"ema_decay": torch.ones(1)}}, ema=True)
    with pytest.raises(ValueError, match=r"got averaged ones only; take them by ema=True"):
        load_checkpoint(model, {"model_ema": state})
    load_checkpoint(model, {"state_dict": _behind("ema_model.module.", state)}, ema=True)
    assert is_loaded(model, state)


def test_one_lost_key_of_the_vit_is_seen_beside_a_fresh_adapter(caplog):
    model = build("plain")
    vit = {k: v for k, v in values(model).items() if k.startswith(("patch", "pos", "blocks"))}
    with caplog.at_level(logging.INFO, "vitadapter"):
        report = load_checkpoint(model, vit, strict="vit")
    assert report.missing == ()
    assert {key.split(".")[0] for key in report.fresh} == set(model.own_parts)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert str(report).startswith("fresh (")
    assert len(str(report).splitlines()) == 1

    caplog.clear()
    del vit["blocks.2.attn.proj.bias"]
    with caplog.at_level(logging.INFO, "vitadapter"):
        assert load_checkpoint(model, vit).missing == ("blocks.2.attn.proj.bias",)
    assert "missing (1): blocks.2.attn.proj.bias\nfresh" in caplog.text
    assert caplog.records[0].levelname == "WARNING"
    with pytest.raises(ValueError, match=r"the ViT's keys, got\nmissing \(1\): blocks.2.attn.proj"):
        load_checkpoint(model, vit, strict="vit")
    with pytest.raises(ValueError, match=r"unexpected \(1\): blocks.0.surprise"):
        load_checkpoint(model, values(model) | {"blocks.0.surprise": torch.zeros(1)}, strict="vit")
    with pytest.raises(ValueError, match=r'strict: expected True, False or "vit", got .backbone'):
        load_checkpoint(model, vit, strict="backbone")


def test_keys_that_an_adapters_file_lacks_are_missing_and_not_fresh():
    model = build("plain")
    state = _without(values(model), "interactions.1.extractor.ffn")
    report = load_checkpoint(model, state, strict="vit")
    assert report.fresh == ()
    assert len(report.missing) == 8
    with pytest.raises(ValueError, match=r"the model's keys, got\nmissing \(8\): interactions"):
        load_checkpoint(model, state, strict=True)


def test_layer_scales_of_a_file_without_are_one():
    model = build("plain")  # other than one
    file = {k: v for k, v in values(model).items() if "gamma" not in k or "injector" in k}
    report = load_checkpoint(model, file)
    assert report.missing == ()
    assert report.fresh == tuple(f"blocks.{i}.gamma{n}" for i in range(4) for n in (1, 2))
    assert all(torch.equal(block.gamma2, torch.ones(32)) for block in model.blocks)
    # One that is lost is no such file.
    file = _without(values(model), "blocks.1.gamma1")
    assert load_checkpoint(model, file).missing == ("blocks.1.gamma1",)


def _dino(registers: str = "storage_tokens", **more):
    """Keys of DINOv3's files for a width of 32, of DINOv2's with a position embedding."""
    state = _without(values(build("plain")), *build("plain").own_parts, "pos_embed")
    state = {
        key.replace(".gamma", ".ls").replace("ls1", "ls1.gamma"): v for key, v in state.items()
    }
    tokens = {"cls_token": torch.randn(1, 1, 32), "mask_token": torch.randn(1, 32)}
    return state | tokens | {registers: torch.randn(1, 4, 32), **more}


def test_vits_without_a_position_embedding_are_refused():
    model = build("plain")
    with pytest.raises(ValueError, match=r"looks like DINOv3, .* ViTAdapter.from_timm"):
        load_checkpoint(model, _dino(**{"rope_embed.periods": torch.randn(4)}))
    before = values(model)
    model.load_state_dict(before)
    with pytest.raises(ValueError, match="looks like DINOv3"):
        load_checkpoint(model, _without(before, "pos_embed"))
    assert is_loaded(model, before)


@pytest.mark.parametrize("lost", ["mlp.fc1.weight", "norm2.bias", "attn.proj.weight"])
def test_blocks_of_another_kind_are_refused(lost):
    model = build("plain")
    file = {
        key.replace("mlp.fc1.", "mlp.w12."): value
        for key, value in values(model).items()
        if not key.endswith(lost) or not key.startswith("blocks.")
    }
    with pytest.raises(
        ValueError, match=rf"expected a plain ViT .*got one without .*blocks\.\*\.{lost}"
    ):
        load_checkpoint(model, file)


@pytest.mark.parametrize(
    ("front", "architecture"),
    [
        ("backbone.layers.2.blocks.1.norm1.weight", "a Swin Transformer"),
        ("model.layers.0.blocks.0.attn.qkv.weight", "a Swin Transformer"),
        ("visual.transformer.resblocks.0.ln_1.weight", "CLIP"),
        ("vit.encoder.layer.0.attention.attention.query.weight", "a transformers model"),
        ("encoder.layer.0.norm1.weight", "a transformers model"),
        ("layer.0.norm1.weight", "a transformers model"),
        ("blocks.0.attn.q_proj.weight", "EVA-02"),
    ],
)
def test_other_architectures_are_named_whatever_is_in_front(front, architecture):
    with pytest.raises(ValueError, match=f"got one that looks like {architecture}"):
        load_checkpoint(build("plain"), {front: torch.zeros(32), "head.weight": torch.zeros(2)})


class _Vit(nn.Module):
    """A ViT of a user, whose keys are those of ours, and a class token."""

    embed_dim, depth, patch_size, num_prefix_tokens = 32, 4, 16, 1

    def __init__(self) -> None:
        super().__init__()
        plain = build("baseline")
        self.patch_embed, self.pos_embed, self.blocks = (
            *(plain.patch_embed, plain.pos_embed, plain.blocks),
        )
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))

    def start(self, images):
        raise NotImplementedError


def _around(**options):
    return ViTAdapter.around(
        _Vit(), task="segmentation", conv_inplane=4, adapter_heads=2, **options
    )


def test_an_adapter_around_a_users_vit_loads_its_own_file_and_the_vits():
    model = _around()
    state = values(model)
    load_checkpoint(model, {"state_dict": _behind("module.", state)}, strict=True)
    assert is_loaded(model, state)
    vit = values(model.backbone)
    report = load_checkpoint(model, {"teacher": _behind("backbone.", vit)}, strict="vit")
    assert is_loaded(model.backbone, vit)
    assert {key.split(".")[0] for key in report.fresh} == set(model.own_parts)


def test_files_are_never_loaded_by_half():
    published = build("plain")
    around = _around()
    with pytest.raises(
        ValueError, match=r"around another ViT, under backbone\.; build .*from_timm"
    ):
        load_checkpoint(published, {"state_dict": values(around)})
    with pytest.raises(
        ValueError, match=r"around another ViT, under backbone\.; build .*from_timm"
    ):
        load_checkpoint(published, _behind("net.", values(around)))
    with pytest.raises(
        ValueError, match=r"got a model of create_model, .*; build the model by crea"
    ):
        load_checkpoint(around, values(published))


def _vit_of(family: str) -> str:
    return next((vit for vit in ("beit", "uniperceiver") if family.startswith(vit)), "plain")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_vit_takes_the_file_of_another(family):
    model = build(family)
    load_checkpoint(model, _behind("backbone.", values(build(family))), strict=True)
    for other in FAMILIES:
        if _vit_of(other) != _vit_of(family):
            with pytest.raises(ValueError, match=r"^checkpoint: expected .* got one that looks"):
                load_checkpoint(model, _behind("backbone.", values(build(other))))


def _halves(model):
    state = values(model)
    vit = {key: value for key, value in state.items() if not key.startswith((*model.own_parts,))}
    return vit, {key: value for key, value in state.items() if key not in vit}


@pytest.mark.parametrize("depth", [4, 24])  # the adapter has more keys, and the ViT
def test_halves_in_two_places_are_refused(depth):
    model = build("plain", depth=depth)
    vit, adapter = _halves(model)
    for file in (
        {"vit": vit, "adapter": adapter},
        _behind("net.vit.", vit) | _behind("net.adapter.", adapter),
    ):
        with pytest.raises(ValueError, match=r"^checkpoint: expected "):
            load_checkpoint(model, file)
    load_checkpoint(model, {"net": vit | adapter}, strict=True)


def test_names_that_do_not_tell_which_model_is_meant():
    model = build("plain")
    state, vit = values(model), _halves(model)[0]
    for file in (
        _behind("rgb.", state) | _behind("depth.stream.", values(model)),
        {"old": state, "trainer": {"new": values(model)}},
        _behind("architecture.backbone.", state) | _behind("teacher.backbone.", values(model)),
        {"encoder": vit, "target_encoder": _halves(model)[0]},
        {"q": vit, "k": _halves(model)[0]},
        _behind("backbone.original_module.", state)
        | _behind("backbone.modules_to_save.default.", values(model)),
    ):
        with pytest.raises(ValueError, match=r"expected one model, got 2 with the same keys"):
            load_checkpoint(model, file)
    usual = {"model": state, "best_model": values(model), "queue": torch.zeros(2)}
    load_checkpoint(model, usual, strict=True)
    assert is_loaded(model, state)


def test_values_that_are_no_weights_are_refused():
    model = build("plain")
    state = values(model)
    key = "blocks.0.attn.qkv.weight"
    for value, message in (
        (torch.zeros(96, 32, dtype=torch.int8), "expected floating-point weights, got 1 others"),
        (torch.zeros(96, 32, dtype=torch.complex64), "expected floating-point weights, got 1 oth"),
        (torch.zeros(0), r"got 1 empty ones \(blocks.0.attn.qkv.weight\); DeepSpeed"),
        (torch.zeros(96, 32).to_sparse(), "expected dense tensors, got sparse ones: blocks.0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(model, state | {key: value})
    with pytest.raises(ValueError, match="expected one level_embed, got two"):
        load_checkpoint(model, state | {"_orig_mod.level_embed": state["level_embed"]})
    load_checkpoint(model, {k: v.half() if v.is_floating_point() else v for k, v in state.items()})
    load_checkpoint(model, {"state": {key: v.numpy() for key, v in state.items()}}, strict=True)
    assert is_loaded(model, state)


def test_nothing_is_loaded_where_strict_raises():
    model = build("plain")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for strict in (True, "vit"):
        with pytest.raises(ValueError, match="checkpoint: expected exactly"):
            load_checkpoint(model, _without(values(model), "blocks.3.norm1"), strict=strict)
    assert is_loaded(model, before)


def test_layer_scales_of_deit_3_have_another_name():
    model = build("plain")
    vit = {key.replace(".gamma", ".gamma_"): v for key, v in _halves(model)[0].items()}
    report = load_checkpoint(model, vit, strict="vit")
    assert torch.equal(model.blocks[1].gamma2, vit["blocks.1.gamma_2"])
    assert not any("gamma" in key for key in report.fresh if "injector" not in key)


@pytest.mark.parametrize(
    "more",
    [
        {f"blocks.{index}.attn.q_norm.weight": torch.ones(16) for index in range(4)},
        {f"interactions.{index}.injector.surprise": torch.ones(1) for index in range(4)},
        {"norm_pre.weight": torch.ones(32), "norm_pre.bias": torch.ones(32)},
    ],
    ids=["qk norm", "interactions", "CLIP"],
)
def test_parts_that_the_model_does_not_have_are_refused(more):
    model = build("plain")
    stem = next(iter(more)).partition(".")[0]
    with pytest.raises(
        ValueError, match=rf"got one with {stem}\.\*\.|looks like a ViT with a norm before"
    ):
        load_checkpoint(model, values(model) | more)


def test_an_adapter_of_another_attention_is_refused():
    model = build("plain")
    with pytest.raises(ValueError, match=r"got one without interactions.*value_proj"):
        load_checkpoint(model, values(build("plain", attention="dense")))
