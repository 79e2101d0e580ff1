# SPDX-License-Identifier: Apache-2.0
"""Compiled, exported, and on a photograph."""

from __future__ import annotations

import matplotlib.cbook
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

import vitadapter
import vitadapter_ops
from dynamic_graphs import one_dynamic_graph_serves_all, one_dynamic_graph_trains_all
from optional import sweep
from vitadapter_ops.testing import force_backend

SMALL = {"embed_dim": 48, "depth": 4, "conv_inplane": 8, "drop_path_rate": 0.0}
MODELS = ["vit_adapter_tiny", "vitdet_tiny", "beit_adapter_base", "uniperceiver_adapter_base"]


def _build(name: str, task: str = "detection", **overrides):
    if name.startswith("vitdet"):
        overrides = {"embed_dim": 96, **overrides}
    return vitadapter.create_model(name, task=task, **{**SMALL, **overrides}).eval()


@pytest.mark.parametrize("name", sweep(MODELS, "vit_adapter_tiny", "uniperceiver_adapter_base"))
def test_whole_model_is_one_graph(name):
    torch._dynamo.reset()
    model = _build(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for got, expected in zip(compiled(images), model(images), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("name", [each for each in MODELS if "adapter" in each])
def test_each_block_attends_by_torchs_fused_attention(name, task, monkeypatch):
    overrides = {"img_size": 64} if name.startswith("beit") and task == "segmentation" else {}
    model, calls = _build(name, task, **overrides), []
    fused = F.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert len(calls) == model.depth == SMALL["depth"]


@pytest.mark.parametrize("name", sweep(MODELS, "vit_adapter_tiny"))
def test_one_dynamic_graph_serves_all_image_sizes(name):
    overrides = {"window_size": 4, "num_heads": 3}
    if "adapter" in name:
        overrides["num_interactions"] = 1
    one_dynamic_graph_serves_all(
        _build(name, **overrides), ((64, 96), (128, 160), (100, 230), (96, 101), (101, 96))
    )


@pytest.mark.exhaustive
def test_one_dynamic_graph_trains_on_all_batches_and_image_sizes(randomise):
    overrides = {"window_size": 4, "num_heads": 3, "num_interactions": 1}
    model = randomise(_build("vit_adapter_tiny", use_extra_extractor=False, **overrides))
    one_dynamic_graph_trains_all(
        model, ((2, 64, 96), (3, 128, 160), (2, 100, 230), (3, 96, 101), (2, 101, 96))
    )


def test_beit_with_a_class_token_is_one_graph():
    torch._dynamo.reset()
    model = _build("beit_adapter_base", "segmentation", img_size=64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for got, expected in zip(compiled(images), model(images), strict=True):
            torch.testing.assert_close(got, expected)


def test_maps_are_16_bits_wide_under_autocast_without_gradients():
    model = _build("vit_adapter_tiny")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            maps = model(images)
    for got, want in zip(maps, expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() < 0.02 * want.norm()  # some twenty roundings by 2**-9
    with torch.autocast("cpu", torch.bfloat16):
        assert {m.dtype for m in model.train()(images)} == {torch.float32}


@pytest.fixture(params=sweep(["reference", "native"], "native"))
def backend(request):
    """Makes deformable attention take this one."""
    if request.param == "native" and "cpu" not in vitadapter_ops.available_backends():
        pytest.skip("needs the CPU library")
    with force_backend("cpu" if request.param == "native" else request.param):
        yield request.param


def test_exported_model_gives_the_same_maps(backend):
    model = _build("vit_adapter_tiny", "segmentation")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        targets = {str(node.target) for node in program.graph.nodes}
        used = [target for target in targets if "vitadapter" in target]
        assert used
        assert all(("reference" in target) == (backend == "reference") for target in used)
        torch.compiler.reset()
        compiled = torch.compile(program.module(), fullgraph=True, backend="aot_eager")
        for run in (program.module(), compiled):
            for got, expected in zip(run(images), model(images), strict=True):
                torch.testing.assert_close(got, expected)


def test_one_exported_program_serves_all_batches_and_image_sizes(backend):
    model = _build("vit_adapter_tiny", window_size=4, num_interactions=1)
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
        ).module()
        for size in ((3, 3, 128, 160), (1, 3, 100, 230), (2, 3, 33, 101)):
            images = torch.randn(size)
            for got, expected in zip(program(images), model(images), strict=True):
                torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_photograph_gives_finite_maps_that_vary(task):
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    pixels = np.asarray(PIL.Image.open(path).convert("RGB"), dtype=np.float32)
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    images = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None].float()
    model = vitadapter.create_model("vit_adapter_tiny", task=task).eval()
    with torch.no_grad():
        maps = model(images)
    for m, stride in zip(maps, model.strides, strict=True):
        assert m.shape[2:] == (-(-images.shape[2] // stride), -(-images.shape[3] // stride))
        assert m.isfinite().all()
        # Channel by channel the map says something about the place.
        assert (m.std((0, 2, 3)) > 1e-3).all()
