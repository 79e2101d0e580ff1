# SPDX-License-Identifier: Apache-2.0
"""The fused step from the Linear's outputs: right everywhere, and nothing extra kept for it."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

from optional import sweep
from vitadapter_ops import ms_deform_attn, ms_deform_attn_from_offsets
from vitadapter_ops.testing import cases, gate, oracles, tolerances
from vitadapter_ops.testing.tolerances import assert_same_definition

OPS = torch.ops.vitadapter_ops
NEEDS = [
    (True, True, True, True),
    (True, False, False, False),
    (False, True, False, False),
    (False, False, True, False),
    (False, False, False, True),
    (False, True, True, True),
]


def call(inputs, backend="auto", **changes):
    value, *points = inputs.tensors
    return ms_deform_attn_from_offsets(
        value, inputs.spatial_shapes, *points, **{**inputs.keywords, **changes}, backend=backend
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("case", cases.OFFSETS, ids=str)
def test_small_shapes(case, backend, dtypes):
    device, name = backend
    gate.check_offsets_backend(case, dtypes, name, device)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [cases.fused(c) for c in cases.MODEL[1:3]], ids=str)
def test_vit_adapter_shapes(case, backend, dtypes):
    device, name = backend
    if name == "reference":
        pytest.skip("the reference sees no difference between small shapes and large ones")
    gate.check_offsets_backend(case, dtypes, name, device)


@pytest.mark.parametrize("case", cases.OFFSETS, ids=str)
def test_reference_equals_the_chain_of_torch_operations(case):
    inputs = case.inputs()
    weights = torch.randn(inputs.attention_logits.shape, dtype=torch.float64)
    out = torch.randn(case.batch, case.queries, case.heads * case.channels, dtype=torch.float64)
    got = gate.run_offsets(gate.from_offsets("reference"), inputs, [out, weights])
    expected = gate.run_offsets(oracles.from_offsets, inputs, [out, weights])
    for name, a, b in zip(gate.OFFSET_NAMES, got, expected, strict=True):
        # Locations in pixels come from another order of the same operations.
        assert_same_definition(name, a, b, ulps=64)


@pytest.mark.parametrize("case", [c for c in cases.OFFSETS if c.channels <= 16], ids=str)
def test_gradcheck(backend, case):
    device, name = backend
    inputs = case.inputs(seed=1).to(torch.float64, device)

    def function(*tensors):
        return gate.from_offsets(name)(inputs, *tensors)

    tensors = tuple(t.requires_grad_() for t in inputs.tensors)
    # Steps of 1e-6 boxes move a point by a thousandth of the distance that is kept from lines.
    assert torch.autograd.gradcheck(function, tensors, fast_mode=case.channels > 3)


def test_equals_the_unfused_operator(backend):
    device, name = backend
    inputs = cases.OFFSETS[3].inputs().to(torch.float64, device)
    locations = torch.stack(
        [
            x / torch.tensor([w, h], dtype=x.dtype, device=device)
            for (_, x), (h, w) in zip(
                cases.offset_positions(inputs), inputs.spatial_shapes, strict=True
            )
        ],
        3,
    )
    weights = inputs.attention_logits.softmax(-1).view(locations.shape[:-1])
    value = inputs.value.masked_fill(inputs.padding_mask[..., None, None], 0)
    expected = ms_deform_attn(value, inputs.spatial_shapes, locations, weights, backend=name)
    assert_same_definition("output", call(inputs, name), expected, ulps=64)


def test_a_constant_added_to_the_logits_changes_nothing(backend):
    device, name = backend
    inputs = cases.OFFSETS[8].inputs().to(torch.float32, device)
    shift = torch.randint(-64, 64, (*inputs.attention_logits.shape[:3], 1), device=device)
    expected = call(inputs, name, return_weights=True)
    shifted = dataclasses.replace(inputs, attention_logits=inputs.attention_logits + shift)
    # Logits are multiples of 2^-8 and shifts whole numbers: the sums are exact.
    for a, b in zip(call(shifted, name, return_weights=True), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [1e4, 88.0, -88.0, 1e-30])
def test_extreme_logits(backend, size):
    device, name = backend
    inputs = cases.OFFSETS[8].inputs().to(torch.float32, device)
    logits = inputs.attention_logits * size
    logits[:, ::2, :, 1] = -float("inf")
    inputs = dataclasses.replace(inputs, attention_logits=logits)
    out, weights = call(inputs, name, return_weights=True)
    torch.testing.assert_close(weights, logits.softmax(-1))
    assert out.isfinite().all()
    assert (weights[:, ::2, :, 1] == 0).all()


def test_a_logit_that_is_not_a_number_spoils_its_query_only(backend):
    device, name = backend
    inputs = cases.OFFSETS[0 + 3].inputs().to(torch.float32, device)
    inputs.attention_logits[:, 2, 1, 0] = float("nan")
    out, weights = call(inputs, name, return_weights=True)
    assert weights[:, 2, 1].isnan().all()
    keep = torch.ones_like(weights, dtype=torch.bool)
    keep[:, 2, 1] = False
    assert weights[keep].isfinite().all()
    out = out.view(*out.shape[:2], 3, -1)
    assert out[:, :2].isfinite().all()
    assert out[:, 3:].isfinite().all()
    assert out[:, 2, ::2].isfinite().all()


@pytest.mark.parametrize("what", ["offset", "reference", "box"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_non_finite_locations_contribute_nothing(backend, bad, what):
    device, name = backend
    inputs = cases.OFFSETS[4].inputs().to(torch.float32, device)
    if what == "offset":
        inputs.sampling_offsets[:, ::2, :, :6, 0] = bad
        gone = (slice(None), slice(None, None, 2), slice(None), slice(0, 6))
    else:
        inputs.reference_points[:, ::2, :, 0 if what == "reference" else 3] = bad
        gone = (slice(None), slice(None, None, 2))
    tensors = [t.requires_grad_() for t in inputs.tensors]
    out = call(inputs, name)
    grads = torch.autograd.grad(out.square().sum(), tensors)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[2][gone] == 0).all()
    if what == "reference":
        assert (out[:, ::2] == 0).all()
        assert (grads[1][:, ::2] == 0).all()
    assert grads[2][:, 1::2].abs().sum() > 0


def test_points_outside_the_map_still_share_the_softmax(backend):
    """Their own weight multiplies zero, but takes from the others': the logit has a gradient."""
    device, name = backend
    inputs = cases.OFFSETS[3].inputs().to(torch.float64, device)
    inputs.sampling_offsets[..., :5, :] = 1000.0
    cotangents = [
        torch.randn(2, 7, 24, dtype=torch.float64, device=device),
        torch.zeros_like(inputs.attention_logits),
    ]
    got = gate.run_offsets(gate.from_offsets(name), inputs, cotangents)
    expected = gate.run_offsets(oracles.from_offsets, inputs, cotangents)
    assert (expected[-1][..., :5].abs() > 0).any()
    for what, a, b in zip(gate.OFFSET_NAMES, got, expected, strict=True):
        assert_same_definition(what, a, b, ulps=64)


def test_masked_pixels_are_never_used(backend):
    device, name = backend
    inputs = cases.OFFSETS[3].inputs().to(torch.float32, device)
    expected = call(inputs, name)
    mask = inputs.padding_mask[..., None, None]
    poisoned = dataclasses.replace(inputs, value=inputs.value.masked_fill(mask, float("nan")))
    tensors = [t.requires_grad_() for t in poisoned.tensors]
    out = call(poisoned, name)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0].masked_select(mask) == 0).all()
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("empty", ["batch", "queries", "points"])
def test_empty_inputs_give_empty_or_zero_results(backend, empty):
    device, name = backend
    changes = {"points": (0, 0)} if empty == "points" else {empty: 0}
    case = dataclasses.replace(cases.OFFSETS[5], shared_batch=False, **changes)
    inputs = case.inputs().to(torch.float32, device)
    tensors = [t.requires_grad_() for t in inputs.tensors]
    out, weights = call(inputs, name, return_weights=True)
    assert out.shape == (case.batch, case.queries, case.heads * case.channels)
    assert weights.shape == inputs.attention_logits.shape
    assert (out == 0).all()
    (out.sum() + weights.sum()).backward()
    for tensor in tensors:
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()


@pytest.mark.parametrize("case", [cases.OFFSETS[i] for i in (3, 9)], ids=str)
def test_one_projection_for_offsets_and_logits(backend, case):
    """Slices of one Linear's output, with gaps between rows, are read where they lie."""
    device, name = backend
    inputs = case.inputs().to(torch.float32, device)
    parts = [inputs.sampling_offsets.flatten(2), inputs.attention_logits.flatten(2)]
    joined = torch.cat(parts, -1).requires_grad_()
    offsets, logits = joined.split([part.shape[-1] for part in parts], -1)
    sliced = dataclasses.replace(
        inputs,
        sampling_offsets=offsets.unflatten(-1, inputs.sampling_offsets.shape[2:]),
        attention_logits=logits.unflatten(-1, inputs.attention_logits.shape[2:]),
    )
    got = call(sliced, name)
    expected = call(inputs, name)
    torch.testing.assert_close(got, expected, **tolerances.EQUAL)
    (grad,) = torch.autograd.grad(got.square().sum(), joined)
    tensors = [t.requires_grad_() for t in inputs.tensors]
    grads = torch.autograd.grad(call(inputs, name).square().sum(), tensors[2:])
    torch.testing.assert_close(grad, torch.cat([g.flatten(2) for g in grads], -1))


def test_strided_inputs(backend):
    device, name = backend
    inputs = cases.OFFSETS[4].inputs().to(torch.float32, device)
    value, reference, offsets, logits = map(gate.dense_permuted, inputs.tensors)
    strided = dataclasses.replace(
        inputs,
        value=value,
        reference_points=reference,
        sampling_offsets=offsets,
        attention_logits=logits,
    )
    torch.testing.assert_close(call(strided, name), call(inputs, name), **tolerances.EQUAL)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_gradients_that_are_not_needed_are_not_computed(backend, needs):
    device, name = backend
    case = dataclasses.replace(cases.OFFSETS[8], batch=1, heads=1)
    inputs = case.inputs().to(torch.float32, device)
    gate.check_needs(
        lambda *tensors: gate.from_offsets(name)(inputs, *tensors)[0], inputs.tensors, needs
    )


def test_only_the_arguments_are_kept_for_the_backward(backend):
    device, name = backend
    inputs = cases.OFFSETS[9].inputs().to(torch.bfloat16, device)
    saved = []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    tensors = [t.requires_grad_() for t in inputs.tensors]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call(inputs, name)
    out.sum().backward()
    arguments = [*tensors, inputs.padding_mask, inputs.offset_scale]
    assert sorted(saved) == sorted(t.data_ptr() for t in arguments)


@pytest.mark.parametrize("case", cases.OFFSETS, ids=str)
def test_results_repeat_to_the_bit_under_the_deterministic_flag(backend, case):
    device, name = backend
    inputs = case.inputs().to(torch.float32, device)
    cotangents = [
        torch.randn(case.batch, case.queries, case.heads * case.channels, device=device),
        torch.randn(inputs.attention_logits.shape, device=device),
    ]
    torch.use_deterministic_algorithms(True)
    try:
        first = gate.run_offsets(gate.from_offsets(name), inputs, cotangents)
        for _ in range(3):
            again = gate.run_offsets(gate.from_offsets(name), inputs, cotangents)
            assert all(map(torch.equal, first, again))
    finally:
        torch.use_deterministic_algorithms(False)


def test_mixed_precisions_are_widened(backend):
    """fp32 value beside bf16 offsets and fp16 logits: what torch's promotion would compute."""
    device, name = backend
    inputs = cases.OFFSETS[3].inputs().to(torch.float32, device)
    mixed = dataclasses.replace(
        inputs,
        sampling_offsets=inputs.sampling_offsets.bfloat16(),
        attention_logits=inputs.attention_logits.half(),
        reference_points=inputs.reference_points.double().to(torch.float32),
    )
    out, weights = call(mixed, name, return_weights=True)
    expected, expected_weights = call(inputs, name, return_weights=True)
    assert (out.dtype, weights.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights.half())


# How torch sees the operator.


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize(
    "case", sweep(cases.OFFSETS, "three-levels", "unequal-scaled-boxes", "a-level-without-points")
)
@pytest.mark.parametrize("name", ["", "_reference"], ids=["native", "reference"])
def test_opcheck_forward(name, case, permuted):
    arguments = case.inputs().to(torch.float32).arguments
    for i in (0, 4, 5, 6):
        if permuted:
            arguments[i] = gate.dense_permuted(arguments[i])
        arguments[i] = arguments[i].requires_grad_()
    op = getattr(OPS, f"ms_deform_attn_from_offsets{name}").default
    for return_weights in (True, False):
        torch.library.opcheck(op, (*arguments, return_weights))


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("name", ["", "_reference"], ids=["native", "reference"])
def test_opcheck_backward(name, needs):
    case = cases.OFFSETS[9]
    inputs = case.inputs().to(torch.float32)
    grad = torch.randn(case.batch, case.queries, case.heads * case.channels)
    op = getattr(OPS, f"ms_deform_attn_from_offsets{name}_backward").default
    for grad_weights in (None, torch.randn_like(inputs.attention_logits)):
        torch.library.opcheck(op, (grad, grad_weights, *inputs.arguments, *needs))


def test_second_order_gradients_are_refused(backend):
    device, name = backend
    inputs = cases.OFFSETS[3].inputs().to(torch.float64, device)
    tensors = [t.requires_grad_() for t in inputs.tensors]
    grads = torch.autograd.grad(call(inputs, name).square().sum(), tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        sum(grad.sum() for grad in grads).backward()


def decoder_layer(feature, boxes):
    """Sizes that stay symbolic, boxes that are refined, weights that are returned."""
    channels, height, width = feature.shape[1:]
    fine, coarse = feature, feature[:, :, ::2, ::2]
    shapes = [(height, width), tuple(coarse.shape[2:])]
    value = torch.cat((fine.flatten(2), coarse.flatten(2)), 2).transpose(1, 2)
    query = boxes.repeat_interleave(3, -1)
    offsets = (query * 2).unflatten(-1, (2, 6, 1)).expand(-1, -1, -1, -1, 2)
    out, weights = ms_deform_attn_from_offsets(
        value.unflatten(2, (2, channels // 2)),
        shapes,
        boxes[:, :, None],
        offsets,
        query.unflatten(-1, (2, 6)),
        points_per_level=[4, 2],
        return_weights=True,
    )
    return out.sum(-1) + weights.square().sum((2, 3))


def test_compile_fullgraph_serves_several_image_sizes_with_one_graph():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decoder_layer, fullgraph=True, dynamic=True, backend=counter)
    for height, width in ((8, 12), (14, 10), (16, 6)):
        feature = torch.randn(2, 24, height, width, requires_grad=True)
        boxes = torch.rand(2, 5, 4, requires_grad=True)
        got, expected = compiled(feature, boxes), decoder_layer(feature, boxes)
        torch.testing.assert_close(got, expected)
        for a, b in zip(
            torch.autograd.grad(got.sum(), (feature, boxes)),
            torch.autograd.grad(expected.sum(), (feature, boxes)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_export_keeps_the_operator():
    class Layer(torch.nn.Module):
        def forward(self, feature, boxes):
            return decoder_layer(feature, boxes)

    arguments = (torch.randn(1, 24, 6, 4), torch.rand(1, 5, 4))
    program = torch.export.export(Layer(), arguments)
    targets = [node.target for node in program.graph.nodes]
    assert OPS.ms_deform_attn_from_offsets.default in targets
    torch.testing.assert_close(program.module()(*arguments), decoder_layer(*arguments))


def test_autocast_leaves_every_argument_in_its_precision():
    inputs = cases.OFFSETS[3].inputs().to(torch.float32)
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPS.ms_deform_attn_from_offsets.default:
                seen.append([t.dtype for t in args if torch.is_tensor(t)])
            return func(*args, **(kwargs or {}))

    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16), Record():
            call(inputs.to(dtype))
    assert seen == [
        [torch.float32] * 4 + [torch.bool],
        [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, torch.bool],
    ]


@pytest.mark.parametrize("byte", [1, 2, 255])
def test_any_byte_but_zero_of_a_mask_is_true(backend, byte):
    """torch takes it so, and a mask may be a view of bytes."""
    device, name = backend
    inputs = next(c for c in cases.OFFSETS if c.masked).inputs().to(torch.float32, device)
    mask = inputs.padding_mask
    odd = (mask.to(torch.uint8) * byte).view(torch.bool)

    def compute(mask):
        tensors = [t.detach().clone().requires_grad_() for t in inputs.tensors]
        names = ("value", "reference_points", "sampling_offsets", "attention_logits")
        changed = dataclasses.replace(
            inputs, **dict(zip(names, tensors, strict=True)), padding_mask=mask
        )
        out = call(changed, name)
        return out, *torch.autograd.grad(out.sin().sum(), tensors)

    assert all(map(torch.equal, compute(odd), compute(mask)))
