# SPDX-License-Identifier: Apache-2.0
"""Export: ONNX with standard nodes and with TensorRT's plugin, torch.export, AOTInductor."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

import children
import drop_in_checks
import vitadapter
from optional import require_integration, sweep
from vitadapter_ops import MSDeformAttn, ms_deform_attn, ms_deform_attn_from_offsets
from vitadapter_ops.compat.onnx import PLUGIN, translation_table
from vitadapter_ops.compat.transformers import patch_transformers
from vitadapter_ops.testing import tolerances

SHAPES = [(4, 6), (2, 3)]
PIXELS, QUERIES, HEADS, WIDTH = 30, 5, 3, 24

pytestmark = pytest.mark.filterwarnings("ignore")


class Sampling(nn.Module):
    def forward(self, value, locations, weights):
        return ms_deform_attn(value, SHAPES, locations, weights)


class Offsets(nn.Module):
    def __init__(self, points, scale=None):
        super().__init__()
        self.points, self.scale = points, scale

    def forward(self, value, reference, offsets, logits, mask):
        return ms_deform_attn_from_offsets(
            value, SHAPES, reference, offsets, logits, padding_mask=mask,
            points_per_level=self.points, offset_scale=self.scale, return_weights=True,
        )  # fmt: skip


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = drop_in_checks.perturbed(MSDeformAttn(WIDTH, 2, HEADS, 4))

    def forward(self, query, reference, feature):
        return self.attention(query, reference, feature, SHAPES)


def offsets(coordinates, levels, points, batch=2):
    return (
        torch.randn(batch, PIXELS, HEADS, 8),
        torch.rand(batch, QUERIES, levels, coordinates),
        torch.randn(batch, QUERIES, HEADS, sum(points), 2),
        torch.randn(batch, QUERIES, HEADS, sum(points)),
        torch.rand(batch, PIXELS) < 0.3,
    )


def sampling():
    weights = torch.rand(2, QUERIES, HEADS, 2, 4)
    return torch.randn(2, PIXELS, HEADS, 8), torch.rand(*weights.shape, 2) * 1.4 - 0.2, weights


def attention():
    return (
        torch.randn(2, QUERIES, WIDTH),
        torch.rand(2, QUERIES, 2, 2),
        torch.randn(2, PIXELS, WIDTH),
    )


CASES = {
    "sampling": (Sampling, sampling),
    "module": (Attention, attention),
    "pixels": (lambda: Offsets([4, 4]), lambda: offsets(2, 2, [4, 4])),
    "boxes": (lambda: Offsets([3, 5]), lambda: offsets(4, 1, [3, 5])),
    "scaled-boxes": (lambda: Offsets([3, 5], 0.2), lambda: offsets(4, 2, [3, 5])),
}


FOUR_MAPS = ["stride4", "stride8", "stride16", "stride32"]


def exported(model, arguments, target="standard", **options):
    require_integration("onnxscript")
    if target != "standard":
        options["custom_translation_table"] = translation_table(target)
    with torch.no_grad():
        return torch.onnx.export(model, arguments, dynamo=True, verbose=False, **options)


def saved(program, path):
    """The file of an exported program, as the checker and strict shape inference take it."""
    program.save(str(path))
    return checked(path)


def checked(path):
    onnx = require_integration("onnx")
    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True)
    return str(path)


class Runtime:
    """The file in ONNX Runtime, which must not warn."""

    def __init__(self, path, capfd):
        runtime = require_integration("onnxruntime")
        capfd.readouterr()
        self.session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        written = capfd.readouterr()
        assert "onnxruntime" not in written.out + written.err

    @property
    def output_names(self):
        return [each.name for each in self.session.get_outputs()]

    def __call__(self, *arguments):
        names = [each.name for each in self.session.get_inputs()]
        feed = {name: each.numpy() for name, each in zip(names, arguments, strict=True)}
        return [torch.from_numpy(each) for each in self.session.run(None, feed)]

    def agrees(self, model, *arguments):
        with torch.no_grad():
            expected = model(*arguments)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for mine, theirs in zip(self(*arguments), expected, strict=True):
            torch.testing.assert_close(mine, theirs, **tolerances.CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_exported_without_a_table(case, tmp_path, capfd):
    make, given = CASES[case]
    model, arguments = make().eval(), given()
    program = exported(model, arguments)
    assert set(program.model.opset_imports) == {""}
    assert "GridSample" in {node.op_type for node in program.model.graph}
    Runtime(saved(program, tmp_path / "model.onnx"), capfd).agrees(model, *arguments)


def test_a_program_that_was_exported_before_needs_no_table(tmp_path, capfd):
    model, arguments = Attention().eval(), attention()
    with torch.no_grad():
        program = torch.export.export(model, arguments)
    Runtime(saved(exported(program, ()), tmp_path / "model.onnx"), capfd).agrees(model, *arguments)


def test_the_standard_table_is_still_taken(tmp_path, capfd):
    model, arguments = Attention().eval(), attention()
    program = exported(model, arguments, custom_translation_table=translation_table())
    Runtime(saved(program, tmp_path / "model.onnx"), capfd).agrees(model, *arguments)


def test_half_precision_is_sampled_in_single(tmp_path, capfd):
    model, arguments = Sampling(), tuple(each.half() for each in sampling())
    runtime = Runtime(saved(exported(model, arguments), tmp_path / "model.onnx"), capfd)
    (got,) = runtime(*arguments)
    torch.testing.assert_close(got, model(*arguments), **tolerances.CLOSE_EXPORTED_16_BITS)


# Below 18 torch itself writes 18 with dynamo=True, and says so.
@pytest.mark.parametrize("opset", sweep([16, 17, 18, 20], "16", "20"))
@pytest.mark.parametrize("dynamo", [True, False])
def test_every_opset_loads_and_outputs_have_the_names_given(dynamo, opset, tmp_path, capfd):
    model, arguments, path = Attention().eval(), attention(), tmp_path / "model.onnx"
    require_integration("onnxscript")
    options = {"verbose": False} if dynamo else {}
    with torch.no_grad():
        torch.onnx.export(
            model, arguments, str(path), dynamo=dynamo, opset_version=opset,
            output_names=["attended"], **options,
        )  # fmt: skip
    runtime = Runtime(checked(path), capfd)
    assert runtime.output_names == ["attended"]
    runtime.agrees(model, *arguments)


def test_an_opset_without_grid_sample_is_named(tmp_path):
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="added in version 16"):
        torch.onnx.export(
            Attention().eval(), attention(), str(tmp_path / "model.onnx"), dynamo=False,
            opset_version=15,
        )  # fmt: skip


class Maps(nn.Module):
    """Attention whose levels come as maps, and with them their sizes."""

    def __init__(self):
        super().__init__()
        self.attention = drop_in_checks.perturbed(MSDeformAttn(WIDTH, 2, HEADS, 4))

    def forward(self, query, reference, first, second):
        maps = (first, second)
        feature = torch.cat([each.flatten(2) for each in maps], 2).transpose(1, 2)
        return self.attention(query, reference, feature, [each.shape[2:] for each in maps])


def maps(batch, queries, *sizes):
    return (
        torch.randn(batch, queries, WIDTH),
        torch.rand(batch, queries, 2, 2),
        *(torch.randn(batch, WIDTH, *size) for size in sizes),
    )


DYNAMIC = torch.export.Dim.DYNAMIC
EVERYTHING = ({0: DYNAMIC, 1: DYNAMIC},) * 2 + ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},) * 2
OTHER_MAPS = [(3, 7, (8, 9), (2, 2)), (1, 1, (1, 1), (20, 3)), (1, 4, (6, 4), (3, 5))]


def test_one_file_serves_all_sizes_of_maps(tmp_path, capfd):
    model = Maps().eval()
    program = exported(model, maps(2, 5, (4, 6), (2, 3)), dynamic_shapes=EVERYTHING)
    runtime = Runtime(saved(program, tmp_path / "model.onnx"), capfd)
    for sizes in OTHER_MAPS:
        runtime.agrees(model, *maps(*sizes))


@pytest.mark.exhaustive
def test_one_file_of_a_vit_adapter_serves_all_image_sizes(tmp_path, capfd):
    model = vit_adapter("detection", num_interactions=1, use_extra_extractor=False)
    program = exported(
        model, (torch.randn(2, 3, 64, 96),), optimize=False, output_names=FOUR_MAPS,
        dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},),
    )  # fmt: skip
    runtime = Runtime(saved(program, tmp_path / "model.onnx"), capfd)
    assert runtime.output_names == FOUR_MAPS
    for size in ((2, 3, 64, 96), (1, 3, 128, 160), (3, 3, 100, 230), (1, 3, 33, 101)):
        runtime.agrees(model, torch.randn(size))


def vit_adapter(task, **options):
    sizes = {"embed_dim": 24, "num_heads": 2, "adapter_heads": 2, "conv_inplane": 8, "depth": 4}
    model = vitadapter.create_model(
        "vit_adapter_tiny", task=task, window_size=4, **sizes, **options
    ).eval()
    for name, parameter in drop_in_checks.perturbed(model).named_parameters():
        if name.endswith("gamma"):  # of the injectors, that start at zero
            nn.init.normal_(parameter, std=0.5)
    return model


def test_a_patched_module_of_transformers_serves_all_sizes(tmp_path, capfd):
    modeling = require_integration("transformers.models.deformable_detr.modeling_deformable_detr")
    config = modeling.DeformableDetrConfig(
        d_model=WIDTH, encoder_attention_heads=HEADS, num_feature_levels=2
    )

    class Patched(nn.Module):
        def __init__(self):
            super().__init__()
            module = modeling.DeformableDetrMultiscaleDeformableAttention(config, HEADS, 4)
            self.attention = drop_in_checks.perturbed(module)

        def forward(self, query, reference, first, second):
            sizes = [tuple(each.shape[2:]) for each in (first, second)]
            feature = torch.cat([each.flatten(2) for each in (first, second)], 2).transpose(1, 2)
            return self.attention(
                query, encoder_hidden_states=feature, reference_points=reference,
                spatial_shapes_list=sizes, attention_mask=feature[..., 0] < 1,
            )  # fmt: skip

    model = Patched().eval()
    with patch_transformers("deformable_detr"):
        program = exported(model, maps(2, 5, (4, 6), (2, 3)), dynamic_shapes=EVERYTHING)
        runtime = Runtime(saved(program, tmp_path / "model.onnx"), capfd)
        for sizes in OTHER_MAPS:
            runtime.agrees(model, *maps(*sizes))


def traced(model, arguments, path, **options):
    with torch.no_grad():
        torch.onnx.export(model, arguments, str(path), dynamo=False, opset_version=17, **options)
    return checked(path)


def test_a_vit_adapter_is_exported_by_tracing(tmp_path, capfd):
    model, images = vit_adapter("segmentation"), torch.randn(1, 3, 64, 96)
    path = traced(model, (images,), tmp_path / "model.onnx", output_names=FOUR_MAPS)
    runtime = Runtime(path, capfd)
    assert runtime.output_names == FOUR_MAPS
    runtime.agrees(model, images)


def test_a_patched_deformable_detr_is_exported_by_tracing(tmp_path, capfd):
    transformers = require_integration("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone, use_timm_backbone=False, backbone=None, d_model=32,
        use_pretrained_backbone=False, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=10,
    )  # fmt: skip

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.detr = transformers.DeformableDetrForObjectDetection(config)

        def forward(self, images):
            return self.detr(images).logits

    model, images = drop_in_checks.perturbed(Logits()).eval(), torch.randn(1, 3, 128, 192)
    with patch_transformers("deformable_detr"):
        path = traced(model, (images,), tmp_path / "model.onnx")
        Runtime(path, capfd).agrees(model, images)


def test_a_traced_file_refuses_other_sizes(tmp_path, capfd):
    model, arguments = Maps().eval(), maps(1, 5, (4, 6), (2, 3))
    names = ["query", "reference", "first", "second"]
    runtime = Runtime(
        traced(
            model, arguments, tmp_path / "model.onnx", input_names=names,
            dynamic_axes={"query": [1], "reference": [1], "first": [2, 3], "second": [2, 3]},
        ),
        capfd,
    )  # fmt: skip
    runtime.agrees(model, *maps(1, 7, (4, 6), (2, 3)))
    with pytest.raises(Exception, match="cannot be reshaped"):
        runtime(*maps(1, 5, (6, 8), (2, 3)))


def plugin_nodes(program):
    assert "GridSample" not in {each.op_type for each in program.model.graph}
    return [node for node in program.model.graph if node.op_type == PLUGIN]


def evaluated(path):
    """The file in ONNX's reference evaluator, with our operator for the plugin."""
    onnx = require_integration("onnx")
    reference = require_integration("onnx.reference")
    op_run = require_integration("onnx.reference.op_run")

    def run(self, value, spatial_shapes, level_start_index, locations, weights):
        assert (spatial_shapes.dtype, level_start_index.dtype) == (np.int32, np.int32)
        value, locations, weights = map(torch.from_numpy, (value, locations, weights))
        out = ms_deform_attn(
            value, spatial_shapes.tolist(), locations, weights,
            level_start_index=level_start_index.tolist(),
        )  # fmt: skip
        return (out.view(*out.shape[:2], *value.shape[2:]).numpy(),)

    members = {"op_domain": "trt.plugins", "_run": run}
    plugin = type(PLUGIN, (op_run.OpRun,), members)
    return reference.ReferenceEvaluator(onnx.load(path), new_ops=[plugin])


@pytest.mark.parametrize("case", CASES)
def test_plugin_has_tensorrts_five_inputs(case, tmp_path):
    make, given = CASES[case]
    model, arguments = make().eval(), given()
    program = exported(model, arguments, "tensorrt")
    nodes = plugin_nodes(program)
    # The plugin has as many points on each of its levels.
    assert len(nodes) == (2 if "boxes" in case else 1)
    for node in nodes:
        assert node.domain == "trt.plugins"
        assert (len(node.inputs), len(node.outputs)) == (5, 1)
    saved(program, tmp_path / "model.onnx")


def test_one_file_with_the_plugin_serves_all_sizes_of_maps(tmp_path):
    model = Maps().eval()
    program = exported(model, maps(2, 5, (4, 6), (2, 3)), "tensorrt", dynamic_shapes=EVERYTHING)
    assert len(plugin_nodes(program)) == 1
    file = evaluated(saved(program, tmp_path / "model.onnx"))
    for sizes in OTHER_MAPS:
        arguments = maps(*sizes)
        feed = {n: each.numpy() for n, each in zip(file.input_names, arguments, strict=True)}
        (got,) = file.run(None, feed)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(*arguments))


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="target: expected 'standard' or 'tensorrt', got 'coreml'"):
        translation_table("coreml")


LOAD = """
import sys, torch, vitadapter_ops.testing
arguments, expected = torch.load(sys.argv[2])
if sys.argv[3] == "export":
    model = torch.export.load(sys.argv[1]).module()
else:
    model = torch._inductor.aoti_load_package(sys.argv[1])
torch.testing.assert_close(model(*arguments), expected, **vitadapter_ops.testing.tolerances.CLOSE)
print("equal")
"""


@pytest.mark.parametrize("kind", sweep(["export", "aoti"], "export"))
def test_a_package_loads_by_importing_vitadapter_ops(kind, tmp_path):
    if kind == "aoti" and shutil.which("c++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    model, arguments = Attention().eval(), attention()
    with torch.no_grad():
        program = torch.export.export(model, arguments)
        torch.save((arguments, model(*arguments)), tmp_path / "expected.pt")
    package = str(tmp_path / "model.pt2")
    if kind == "export":
        torch.export.save(program, package)
    else:
        torch._inductor.aoti_compile_and_package(program, package_path=package)
    done = children.python(["-c", LOAD, package, str(tmp_path / "expected.pt"), kind])
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("equal\n")
