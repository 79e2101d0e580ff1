# SPDX-License-Identifier: Apache-2.0
"""Export: ONNX with standard nodes and with TensorRT's plugin, torch.export, AOTInductor."""

import shutil

import pytest
import torch
from torch import nn

import children
import drop_in_checks
from optional import require_integration
from vitadapter_ops import MSDeformAttn, ms_deform_attn, ms_deform_attn_from_offsets
from vitadapter_ops.compat.onnx import OPSET, PLUGIN, translation_table

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


def exported(model, arguments, target="standard", **options):
    require_integration("onnxscript")
    return torch.onnx.export(
        model.eval(), arguments, dynamo=True, opset_version=OPSET, verbose=False,
        custom_translation_table=translation_table(target), **options,
    )  # fmt: skip


def run(program, path, arguments):
    runtime = require_integration("onnxruntime")
    program.save(str(path))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feed = {name: each.numpy() for name, each in zip(names, arguments, strict=True)}
    return [torch.from_numpy(each) for each in session.run(None, feed)]


def check(program, path, model, arguments):
    got = run(program, path, arguments)
    with torch.no_grad():
        expected = model(*arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_standard_graph_runs_in_onnxruntime(case, tmp_path):
    make, given = CASES[case]
    model, arguments = make(), given()
    program = exported(model, arguments)
    assert set(program.model.opset_imports) == {""}
    assert "GridSample" in {node.op_type for node in program.model.graph}
    check(program, tmp_path / "model.onnx", model, arguments)


def test_batch_and_queries_may_be_dynamic(tmp_path):
    model, arguments = Attention(), attention()
    batch, queries = torch.export.Dim("batch"), torch.export.Dim("queries")
    program = exported(
        model, arguments,
        dynamic_shapes=({0: batch, 1: queries}, {0: batch, 1: queries}, {0: batch}),
    )  # fmt: skip
    other = (torch.randn(3, 9, WIDTH), torch.rand(3, 9, 2, 2), torch.randn(3, PIXELS, WIDTH))
    check(program, tmp_path / "model.onnx", model, other)


@pytest.mark.parametrize("case", ["sampling", "module", "pixels"])
def test_plugin_has_tensorrts_five_inputs(case):
    make, given = CASES[case]
    program = exported(make(), given(), "tensorrt")
    (node,) = (node for node in program.model.graph if node.op_type == PLUGIN)
    assert node.domain == "trt.plugins"
    assert len(node.inputs) == 5
    assert len(node.outputs) == 1
    assert "GridSample" not in {each.op_type for each in program.model.graph}


def test_what_cannot_be_translated_is_named():
    with pytest.raises(ValueError, match="target: expected 'standard' or 'tensorrt', got 'coreml'"):
        translation_table("coreml")
    with pytest.raises(Exception, match="points_per_level: expected the same on all levels"):
        exported(Offsets([3, 5]), offsets(4, 1, [3, 5]), "tensorrt")


LOAD = """
import sys, torch, vitadapter_ops
arguments, expected = torch.load(sys.argv[2])
if sys.argv[3] == "export":
    model = torch.export.load(sys.argv[1]).module()
else:
    model = torch._inductor.aoti_load_package(sys.argv[1])
torch.testing.assert_close(model(*arguments), expected, rtol=1e-5, atol=1e-5)
print("equal")
"""


@pytest.mark.parametrize("kind", ["export", "aoti"])
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
