# SPDX-License-Identifier: Apache-2.0
"""Derivatives other than backward(): the right value, or an error, and never a silent zero."""

import pytest
import torch
from torch.autograd import forward_ad

from vitadapter_ops import (
    BackendUnavailable,
    MSDeformAttn,
    ms_deform_attn,
    ms_deform_attn_from_offsets,
)
from vitadapter_ops.testing import cases, gate, tolerances
from vitadapter_ops.testing.tolerances import DERIVATIVE_ULPS, assert_same_definition

OPS = torch.ops.vitadapter_ops
LOCATED = cases.SMALL[3]
OFFSETS = {case.name: case for case in cases.OFFSETS}
BOXES = OFFSETS["unequal-scaled-boxes"]
POINTS = OFFSETS["three-levels"]


def located():
    """(the operator as a function of its tensors, the tensors in fp64)."""
    inputs = LOCATED.inputs()

    def function(value, locations, weights, backend="auto"):
        return ms_deform_attn(value, inputs.spatial_shapes, locations, weights, backend=backend)

    return function, inputs.tensors


def from_offsets(case=POINTS):
    inputs = case.inputs()

    def function(value, *points, backend="auto"):
        return ms_deform_attn_from_offsets(
            value, inputs.spatial_shapes, *points, **inputs.keywords, backend=backend
        )

    return function, inputs.tensors


CALLS = {
    "located": located,
    "from_offsets": from_offsets,
    "from_offsets_boxes": lambda: from_offsets(BOXES),
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]()


def gradients(function, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves).sin().sum(), leaves)


def along(function, tensors, tangents):
    """The derivative along `tangents` of the sum of sines, by the kernels' backward."""
    pairs = zip(gradients(function, tensors), tangents, strict=True)
    return sum((grad * tangent).sum() for grad, tangent in pairs)


def test_forward_mode_is_not_zero(call):
    function, tensors = call
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    expected = along(function, tensors, tangents)
    _, got = torch.func.jvp(lambda *t: function(*t).sin().sum(), tensors, tuple(tangents))
    assert_same_definition("jvp", got, expected, ulps=DERIVATIVE_ULPS)
    with forward_ad.dual_level(), torch.no_grad():
        duals = [forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
        got = forward_ad.unpack_dual(function(*duals).sin().sum()).tangent
    assert_same_definition("dual numbers", got, expected, ulps=DERIVATIVE_ULPS)


@pytest.mark.parametrize("index", range(3))
def test_one_tangent_among_many_arguments_is_seen(index):
    function, tensors = located()
    tangents = [torch.randn_like(t) if i == index else torch.zeros_like(t)
                for i, t in enumerate(tensors)]  # fmt: skip
    expected = along(function, tensors, tangents)
    with forward_ad.dual_level():
        duals = list(tensors)
        duals[index] = forward_ad.make_dual(tensors[index], tangents[index])
        got = forward_ad.unpack_dual(function(*duals).sin().sum()).tangent
    assert_same_definition("tangent", got, expected, ulps=DERIVATIVE_ULPS)


def test_forward_mode_of_the_raw_operator():
    inputs = LOCATED.inputs()
    value, *points = inputs.tensors
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, value)
        out = OPS.ms_deform_attn(dual, inputs.flat_shapes, inputs.starts, *points)
        # Linear in value.
        assert torch.allclose(forward_ad.unpack_dual(out).tangent, out)


def test_tangent_of_a_gradient_is_refused(call):
    function, tensors = call
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="second-order"):
            torch.autograd.grad(out, leaves, grad)


def test_func_grad_equals_backward(call):
    function, tensors = call
    every = tuple(range(len(tensors)))
    got = torch.func.grad(lambda *t: function(*t).sin().sum(), argnums=every)(*tensors)
    for a, b in zip(got, gradients(function, tensors), strict=True):
        assert_same_definition("grad", a, b, ulps=DERIVATIVE_ULPS)


def test_vjp_and_jacrev(call):
    function, tensors = call
    out, pullback = torch.func.vjp(function, *tensors)
    for a, b in zip(pullback(out.cos()), gradients(function, tensors), strict=True):
        assert_same_definition("vjp", a, b, ulps=DERIVATIVE_ULPS)
    value, *points = tensors
    small = value[:, :, :, :1].contiguous()
    reverse = torch.func.jacrev(lambda v: function(v, *points).sum((0, 1)))(small)
    forward = torch.func.jacfwd(lambda s: function(s * small, *points).sum((0, 1)))(
        small.new_ones(())
    )
    assert_same_definition(
        "jacobian", (reverse * small).sum((1, 2, 3, 4)), forward, ulps=DERIVATIVE_ULPS
    )


def test_vmap_of_grad_gives_gradients_of_every_sample(call):
    function, tensors = call
    many = [torch.stack((tensor, tensor.flip(0))) for tensor in tensors]
    every = tuple(range(len(tensors)))
    got = torch.func.vmap(torch.func.grad(lambda *t: function(*t).sin().sum(), every))(*many)
    for sample in range(2):
        expected = gradients(function, [tensor[sample] for tensor in many])
        for a, b in zip(got, expected, strict=True):
            assert_same_definition("per-sample", a[sample], b, ulps=DERIVATIVE_ULPS)


def test_hessian():
    function, (value, locations, weights) = located()
    direction = torch.randn_like(weights)

    def scalar(step):
        return function(value, locations, weights + step * direction).sin().sum()

    zero = torch.zeros((), dtype=torch.float64)
    got = torch.func.hessian(scalar)(zero)
    out, slope = function(value, locations, weights), function(value, locations, direction)
    assert_same_definition("hessian", got, -(out.sin() * slope**2).sum(), ulps=DERIVATIVE_ULPS)


def test_gradients_through_returned_weights_under_func():
    inputs = POINTS.inputs()
    value, reference, offsets, logits = inputs.tensors

    def weights(logits):
        _, weights = ms_deform_attn_from_offsets(
            value, inputs.spatial_shapes, reference, offsets, logits, return_weights=True
        )
        return weights.square().sum()

    expected = torch.func.grad(lambda x: x.softmax(-1).square().sum())(logits)
    assert_same_definition("weights", torch.func.grad(weights)(logits), expected)


def test_a_scale_has_derivatives_or_says_that_it_has_none():
    inputs = BOXES.inputs()
    value, *points = inputs.tensors
    keywords = {**inputs.keywords}
    scale = keywords.pop("offset_scale")

    def function(scale):
        return ms_deform_attn_from_offsets(
            value, inputs.spatial_shapes, *points, offset_scale=scale, **keywords
        ).sum()

    direction, step = torch.randn_like(scale), 1e-7
    expected = (function(scale + step * direction) - function(scale - step * direction)) / step / 2
    gradient = (torch.func.grad(function)(scale) * direction).sum()
    _, tangent = torch.func.jvp(function, (scale,), (direction,))
    assert abs(expected) > 1e-2
    torch.testing.assert_close(gradient, expected, **tolerances.CLOSE_DERIVATIVES)
    torch.testing.assert_close(tangent, gradient)
    with pytest.raises(NotImplementedError, match=r"^offset_scale: expected"):
        function(scale.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(function(scale.clone().requires_grad_()), function(scale))


def test_functional_call_of_a_module():
    module = MSDeformAttn(16, 2, 2, 2).double()
    query, reference = torch.randn(2, 5, 16).double(), torch.rand(2, 5, 2, 2).double()
    feature, shapes = torch.randn(2, 42, 16).double(), [(6, 5), (3, 4)]
    parameters = {name: each.detach() for name, each in module.named_parameters()}

    def loss(parameters):
        arguments = (query, reference, feature, shapes)
        return torch.func.functional_call(module, parameters, arguments).square().sum()

    got = torch.func.grad(loss)(parameters)
    module(query, reference, feature, shapes).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert_same_definition(name, got[name], parameter.grad, ulps=DERIVATIVE_ULPS)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_backend_by_name_says_that_it_cannot(call, name):
    function, (value, *points) = call
    with pytest.raises(BackendUnavailable, match=r"only 'reference' can|cannot run"):
        torch.func.grad(lambda v: function(v, *points, backend=name).sum())(value)
    got = torch.func.grad(lambda v: function(v, *points, backend="reference").sum())(value)
    assert got.abs().sum() > 0


def test_transforms_inside_a_compiled_graph():
    function, (value, *points) = located()

    def grad(value):
        return torch.func.grad(lambda v: function(v, *points).sin().sum())(value)

    compiled = torch.compile(grad, backend="aot_eager", fullgraph=True)
    assert_same_definition("compiled", compiled(value), grad(value), ulps=DERIVATIVE_ULPS)


def test_plain_calls_in_a_dual_level_keep_their_kernels():
    function, tensors = located()
    expected = function(*tensors)
    with forward_ad.dual_level():
        assert torch.equal(function(*tensors, backend="cpu"), expected)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        got = torch.autograd.grad(function(*leaves).sin().sum(), leaves)
    for a, b in zip(got, gradients(function, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [c for c in cases.OFFSETS if c.channels <= 16], ids=str)
def test_definition_agrees_with_its_backward_under_func(case):
    inputs = case.inputs()
    function, tensors = gate.from_offsets("reference"), inputs.tensors
    out = torch.func.grad(lambda *t: function(inputs, *t)[0].sin().sum(), tuple(range(4)))(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(function(inputs, *leaves)[0].sin().sum(), leaves)
    for a, b in zip(out, expected, strict=True):
        assert_same_definition("grad", a, b, ulps=DERIVATIVE_ULPS)
