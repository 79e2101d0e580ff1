# SPDX-License-Identifier: Apache-2.0
"""What is particular to the Triton kernels, in Triton's interpreter.

test_triton_interpreted.py runs this file, and the tests of every backend, in child processes.
"""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import children
from vitadapter_ops import ms_deform_attn, ms_deform_attn_from_offsets
from vitadapter_ops.testing import cases, gate

pytestmark = pytest.mark.skipif(not children.INTERPRETED, reason="needs TRITON_INTERPRET=1")
if children.INTERPRETED:
    from vitadapter_ops.triton import kernels, launch, tuning

OPS = torch.ops.vitadapter_ops


def permuted(tensor):
    order = list(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


@pytest.fixture
def prepared_anew():
    """Whatever a test changes of the kernels is forgotten afterwards."""

    def forget():
        launch._prepare.cache_clear()
        launch._known.clear()

    forget()
    yield
    forget()


# --- how torch sees the operators ---------------------------------------------------------------


# Small, for the interpreter; of no side alone, so that strides tell.
LOCATED = cases.Case("opcheck", ((2, 3),), queries=3, heads=2, channels=3, points=2)
FUSED = cases.OffsetCase(
    "opcheck", ((2, 3), (1, 2)), (1, 2), queries=3, heads=2, boxes=True, scaled=True, masked=True
)


def located():
    inputs = LOCATED.inputs().to(torch.float32)
    return [inputs.value, inputs.flat_shapes, inputs.starts, *inputs.tensors[1:]]


@pytest.mark.parametrize("change", [lambda t: t, permuted], ids=["contiguous", "permuted"])
def test_opcheck(change):
    arguments = located()
    for i in (0, 3, 4):
        arguments[i] = change(arguments[i]).requires_grad_()
    torch.library.opcheck(OPS.ms_deform_attn_triton.default, tuple(arguments))
    plain = [change(a.detach()) if torch.is_tensor(a) else a for a in arguments]
    grad = change(torch.randn(2, 3, 6))
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(OPS.ms_deform_attn_triton_backward.default, (grad, *plain, *needs))


@pytest.mark.parametrize("change", [lambda t: t, permuted], ids=["contiguous", "permuted"])
def test_opcheck_from_offsets(change):
    arguments = FUSED.inputs().to(torch.float32).arguments
    for i in (0, 4, 5, 6):
        arguments[i] = change(arguments[i]).requires_grad_()
    op = OPS.ms_deform_attn_from_offsets_triton
    torch.library.opcheck(op.default, (*arguments, True))
    plain = [a.detach() if torch.is_tensor(a) else a for a in arguments]
    grad = torch.randn(FUSED.batch, FUSED.queries, FUSED.heads * FUSED.channels)
    backward = OPS.ms_deform_attn_from_offsets_triton_backward
    for by_weights, needs in ((plain[6], (True,) * 4), (None, (False, True, False, False))):
        torch.library.opcheck(backward.default, (grad, by_weights, *plain, *needs))


def model(feature):
    height, width = feature.shape[2:]
    value = feature.flatten(2).transpose(1, 2).unflatten(2, (2, -1))
    points = torch.sigmoid(value[:, :4, :, None, None, :2])
    located = ms_deform_attn(value, [(height, width)], points, points[..., 0], backend="triton")
    fused = ms_deform_attn_from_offsets(
        value,
        [(height, width)],
        points[:, :, 0, 0],
        points[:, :, :, 0] * 3,
        points[:, :, :, 0, :, 0],
        backend="triton",
    )
    return located + fused


def test_compile_fullgraph_serves_several_image_sizes_with_one_graph():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for height, width in ((4, 6), (7, 5)):
        feature = torch.randn(2, 8, height, width, requires_grad=True)
        got, expected = compiled(feature), model(feature)
        torch.testing.assert_close(got, expected)
        (grad,) = torch.autograd.grad(got.sum(), feature)
        (expected_grad,) = torch.autograd.grad(expected.sum(), feature)
        torch.testing.assert_close(grad, expected_grad)
    assert counter.frame_count == 1


def test_a_raw_operator_never_reads_out_of_bounds():
    value, _, _, locations, weights = located()
    op = OPS.ms_deform_attn_triton
    for shapes, starts in (
        ([2, 3], [1]),
        ([2, 3], [-1]),
        ([1, 7], [0]),
        ([1 << 40, 1 << 40], [0]),
        ([2, 3, 1], [0]),
        ([0, 6], [0]),
    ):
        with pytest.raises(
            ValueError, match=r"^(spatial_shapes|level_start_index)(\[0\])?: expected"
        ):
            op(value, shapes, starts, locations, weights)
    for wrong_locations, wrong_weights in (
        (locations[:1], weights),
        (locations, weights[:, :, :1]),
        (locations.double(), weights),
        (locations.half(), weights.half()),
    ):
        with pytest.raises(ValueError, match=r"sampling_locations|attention_weights"):
            op(value, [2, 3], [0], wrong_locations, wrong_weights)


# --- how tensors lie ----------------------------------------------------------------------------


def misaligned(tensor):
    """The same numbers, one element off a multiple of anything."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_misaligned_tensors_give_the_same(dtype):
    inputs = cases.SMALL[7].inputs().to(dtype)
    expected = gate.run(gate.op("triton"), inputs, torch.ones(2, 7, 36))
    value, locations, weights = map(misaligned, inputs.tensors)
    moved = dataclasses.replace(
        inputs, value=value, sampling_locations=locations, attention_weights=weights
    )
    tensors = [t.requires_grad_() for t in moved.tensors]
    out = ms_deform_attn(tensors[0], moved.spatial_shapes, *tensors[1:], backend="triton")
    grads = torch.autograd.grad(out, tensors, misaligned(torch.ones(2, 7, 36, dtype=dtype)))
    for got, same in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(got, same)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
@pytest.mark.parametrize("channels", [12, 24, 31, 40, 64])
def test_every_layout_is_right(channels, architecture, dtypes, monkeypatch, prepared_anew):
    """The layouts of real architectures, which the interpreter would not choose."""
    monkeypatch.setattr(tuning, "family", lambda backend, arch: architecture)
    case = cases.Case("layout", ((5, 7),), 1, 5, 2, channels, 2)
    gate.check_backend(case, dtypes, "triton", "cpu")


def test_wide_offsets_are_right(monkeypatch, prepared_anew):
    monkeypatch.setattr(launch, "_INT32_END", 1)
    gate.check_backend(cases.SMALL[3], "fp32", "triton", "cpu")
    gate.check_offsets_backend(cases.OFFSETS[9], "fp32", "triton", "cpu")


@pytest.mark.parametrize("case", [cases.SMALL[3], cases.OFFSETS[4]], ids=str)
def test_a_second_call_takes_the_launch_of_the_first(case, prepared_anew):
    inputs, again = (case.inputs(seed).to(torch.float32) for seed in (0, 1))

    def call(inputs):
        if isinstance(case, cases.Case):
            function = ms_deform_attn
            keywords = {}
        else:
            function = ms_deform_attn_from_offsets
            keywords = inputs.keywords
        value, *points = inputs.tensors
        return [
            function(value, inputs.spatial_shapes, *points, **keywords, backend=backend)
            for backend in ("triton", "reference")
        ]

    call(inputs)
    assert len(launch._known) == 1
    torch.testing.assert_close(*call(again))
    assert len(launch._known) == 1


def test_no_configuration_knows_queries_sizes_or_strides(prepared_anew):
    """What a kernel is compiled for does not change with them."""
    for queries, shapes in ((7, ((5, 7), (3, 4))), (16, ((1, 1), (1, 2))), (300, ((9, 9), (4, 4)))):
        inputs = cases.Case("sizes", shapes, queries=queries).inputs().to(torch.float32)
        for value in (inputs.value, inputs.value.transpose(1, 2).contiguous().transpose(1, 2)):
            ms_deform_attn(value, shapes, *inputs.tensors[1:], backend="triton")
    assert launch._prepare.cache_info().misses == 1


# --- that mistakes are found --------------------------------------------------------------------

# What stands in place of the statement that kernels.py marks so, and where it shows. None of them
# reaches beyond a tensor, which would end the process.
MUTATIONS = {
    "last column": ("right = touches & (column + 2 < width)", cases.SMALL[3], "fp32"),
    "upper row": ("upper = a", cases.SMALL[3], "fp32"),
    "weight of a location's gradient": ("slope_x = across", cases.SMALL[3], "fp32"),
    "image": (
        "points += 2 * (0 * b + query * sizes.points_q + m * TOTAL)",
        cases.SMALL[3],
        "fp32",
    ),
    "channels in order": ("tiles = tiles + (odd, even)", cases.SMALL[3], "bf16"),
    "padding": ("image = inside[k]", cases.OFFSETS[3], "fp32"),
    "sum of a softmax": ("return largest, exponentials", cases.OFFSETS[3], "fp32"),
    "mean of a softmax's gradient": ("pulled -= 0 * weighted", cases.OFFSETS[3], "fp32"),
    "level of a box": ("one = 0", cases.OFFSETS[4], "fp32"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_in_the_kernels_is_caught(name, tmp_path, monkeypatch, prepared_anew):
    wrong, case, dtypes = MUTATIONS[name]
    marked = rf"(?m)^( +)\S.*  # tested: {name}$"
    text, found = re.subn(marked, rf"\g<1>{wrong}", Path(kernels.__file__).read_text())
    assert found == 1
    changed = tmp_path / "kernels.py"
    changed.write_text(text)
    spec = importlib.util.spec_from_file_location("changed_kernels", changed)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(launch, "kernels", module)
    check = gate.check_backend if isinstance(case, cases.Case) else gate.check_offsets_backend
    with pytest.raises(AssertionError, match=r"error|not finite"):
        check(case, dtypes, "triton", "cpu")
