# SPDX-License-Identifier: Apache-2.0
"""MSDeformAttn: published parameters, initialisation, and both kinds of reference points."""

import math

import pytest
import torch

from vitadapter_ops import MSDeformAttn, ms_deform_attn
from vitadapter_ops.modules import offsets_and_logits
from vitadapter_ops.testing import tolerances

SHAPES = [(4, 6), (2, 3)]


def module(**changes):
    module = MSDeformAttn(**{"d_model": 16, "n_levels": 2, "n_heads": 4, "n_points": 3, **changes})
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.3)
    torch.nn.init.normal_(module.attention_weights.weight, std=0.3)
    return module


def by_hand(m, query, reference, feature, mask=None):
    """The module's chain of operations, written out in fp64 index by index."""
    m = m.double()
    query, reference, feature = query.double(), reference.double(), feature.double()
    batch, queries, _ = query.shape
    value = m.value_proj(feature)
    if mask is not None:
        value = value * (~mask).unsqueeze(-1)
    value = value.view(batch, feature.shape[1], m.n_heads, -1)
    size = (batch, queries, m.n_heads, m.n_levels, m.n_points)
    offsets = m.sampling_offsets(query).view(*size, 2)
    weights = m.attention_weights(query).view(*size[:3], -1).softmax(-1).view(size)
    locations = torch.empty_like(offsets)
    for level, (height, width) in enumerate(SHAPES):
        for p in range(m.n_points):
            point = reference[:, :, min(level, reference.shape[2] - 1)]
            offset = offsets[:, :, :, level, p]
            if reference.shape[-1] == 2:
                step = offset / torch.tensor([width, height], dtype=torch.float64)
            else:
                step = offset / m.n_points * point[:, :, None, 2:] * 0.5
            locations[:, :, :, level, p] = point[:, :, None, :2] + step
    out = ms_deform_attn(value, SHAPES, locations, weights, backend="reference")
    return m.output_proj(out)


@pytest.mark.parametrize("reference", ["points", "boxes", "points-for-all-levels"])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_forward_equals_the_chain_by_hand(reference, ratio):
    query, feature = torch.randn(2, 5, 16), torch.randn(2, 30, 16)
    points = torch.rand(2, 5, 1 if "all" in reference else 2, 4 if reference == "boxes" else 2)
    mask = torch.rand(2, 30) < 0.3
    m = module(ratio=ratio)
    got = m(query, points, feature, SHAPES, input_padding_mask=mask)
    expected = by_hand(m, query, points, feature, mask)
    torch.testing.assert_close(got.double(), expected, **tolerances.CLOSE)


def test_reference_points_broadcast_over_the_batch():
    m, query, feature = module(), torch.randn(3, 5, 16), torch.randn(3, 30, 16)
    points = torch.rand(1, 5, 1, 2)
    got = m(query, points, feature, SHAPES)
    torch.testing.assert_close(got, m(query, points.expand(3, -1, 2, -1), feature, SHAPES))


def test_state_dict_is_deformable_detrs():
    shapes = {name: list(t.shape) for name, t in MSDeformAttn(ratio=0.5).state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": [256, 256],
        "sampling_offsets.bias": [256],
        "attention_weights.weight": [128, 256],
        "attention_weights.bias": [128],
        "value_proj.weight": [128, 256],
        "value_proj.bias": [128],
        "output_proj.weight": [256, 128],
        "output_proj.bias": [256],
    }


def test_initial_points_lie_on_one_ray_per_head():
    m = MSDeformAttn(d_model=64, n_levels=3, n_heads=8, n_points=4)
    bias = m.sampling_offsets.bias.detach().view(8, 3, 4, 2)
    for head in range(8):
        angle = 2 * math.pi * head / 8
        x, y = math.cos(angle), math.sin(angle)
        longest = max(abs(x), abs(y))
        for point in range(4):
            expected = torch.tensor([x, y]) / longest * (point + 1)
            for level in range(3):
                torch.testing.assert_close(bias[head, level, point], expected)
    assert (m.sampling_offsets.weight == 0).all()
    assert (m.attention_weights.weight == 0).all()
    assert (m.attention_weights.bias == 0).all()
    bound = math.sqrt(6 / (64 + 64))
    for linear in (m.value_proj, m.output_proj):
        assert (linear.bias == 0).all()
        assert linear.weight.abs().max() <= bound
        torch.testing.assert_close(
            linear.weight.std(), torch.tensor(bound / 3**0.5), rtol=0.1, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_whole_module_in_another_dtype(dtype):
    m, points = module(), torch.rand(2, 5, 1, 2)
    query, feature = torch.randn(2, 5, 16), torch.randn(2, 30, 16)
    expected = m(query, points, feature, SHAPES)
    got = m.to(dtype)(query.to(dtype), points, feature.to(dtype), SHAPES)
    assert got.dtype == dtype
    error = (got.double() - expected).norm() / expected.norm()
    assert error < 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def test_frozen_input_gets_no_gradient_and_parameters_do():
    m, points = module(), torch.rand(2, 5, 1, 2)
    query, feature = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 30, 16)
    m.value_proj.requires_grad_(False)
    m(query, points, feature, SHAPES).square().sum().backward()
    assert m.value_proj.weight.grad is None
    assert query.grad.abs().sum() > 0
    assert m.sampling_offsets.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["hook", "subclass", "plain"])
def test_projections_are_called_where_they_are_more_than_a_product(how):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    m, points = module(), torch.rand(2, 5, 1, 2)
    query, feature = torch.randn(2, 5, 16), torch.randn(2, 30, 16)
    doubled = module()
    doubled.load_state_dict(m.state_dict())
    with torch.no_grad():
        doubled.sampling_offsets.weight *= 2
        doubled.sampling_offsets.bias *= 2
    expected = (m if how == "plain" else doubled)(query, points, feature, SHAPES)
    if how == "hook":
        m.sampling_offsets.register_forward_hook(lambda layer, args, out: 2 * out)
    elif how == "subclass":
        layer = Doubled(16, m.sampling_offsets.out_features)
        layer.load_state_dict(m.sampling_offsets.state_dict())
        m.sampling_offsets = layer
    torch.testing.assert_close(m(query, points, feature, SHAPES), expected)


def test_a_projection_that_is_more_than_a_product_is_called():
    """accelerate fetches offloaded weights in a forward of its own; others drop the bias."""
    module = MSDeformAttn(16, 2, 2, 2)
    arguments = (torch.randn(1, 5, 16), torch.rand(1, 5, 2, 2), torch.randn(1, 20, 16))
    expected = module(*arguments, [(4, 4), (2, 2)])
    layer, calls = module.attention_weights, []
    original = layer.forward
    layer.forward = lambda query: calls.append(1) or original(query)
    torch.testing.assert_close(module(*arguments, [(4, 4), (2, 2)]), expected)
    assert calls == [1]
    del layer.forward
    layer.bias = None
    torch.testing.assert_close(module(*arguments, [(4, 4), (2, 2)]), expected)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("reference", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize(
    ("batch", "queries", "shapes"),
    [(2, 0, SHAPES), (0, 5, SHAPES), (0, 0, SHAPES), (2, 5, [(0, 6), (0, 0)])],
    ids=["no queries", "no images", "neither", "no pixels"],
)
def test_nothing_to_sample_or_for_gives_zero(batch, queries, shapes, reference, grad):
    m = module()
    pixels = sum(height * width for height, width in shapes)
    query = torch.randn(batch, queries, 16, requires_grad=True)
    feature = torch.randn(batch, pixels, 16, requires_grad=True)
    points = torch.rand(batch, queries, 2, reference, requires_grad=True)
    mask = torch.zeros(batch, pixels, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        out = m(query, points, feature, shapes, input_padding_mask=mask)
    assert out.shape == (batch, queries, 16)
    assert torch.equal(out, m.output_proj.bias.expand_as(out))
    if grad:
        out.sum().backward()
        for name, tensor in (
            ("query", query),
            ("feature", feature),
            ("points", points),
            *m.named_parameters(),
        ):
            assert tensor.grad.shape == tensor.shape
            assert name == "output_proj.bias" or (tensor.grad == 0).all()


def test_projections_of_different_dtypes_are_called_one_by_one():
    m, query = module(), torch.randn(2, 5, 16)
    m.attention_weights.bfloat16()
    # One product would widen the narrower weights.
    with pytest.raises(RuntimeError, match="dtype"):
        offsets_and_logits(m, query)
    with torch.autocast("cpu", torch.bfloat16):
        offsets, logits = offsets_and_logits(m, query)
        torch.testing.assert_close(offsets, m.sampling_offsets(query))
        torch.testing.assert_close(logits, m.attention_weights(query))


def test_half_weights_are_served_under_autocast_to_the_other_half_type():
    m, query = module().half(), torch.randn(2, 5, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        offsets, logits = offsets_and_logits(m, query)
        torch.testing.assert_close(offsets, m.sampling_offsets(query))
        torch.testing.assert_close(logits, m.attention_weights(query))


def test_module_in_16_bits_compiles_into_one_graph_under_autocast():
    m = module().bfloat16()
    inputs = torch.randn(2, 5, 16), torch.rand(2, 5, 1, 2), torch.randn(2, 30, 16)
    query, points, feature = (t.bfloat16() for t in inputs)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected = m(query, points, feature, SHAPES)
        torch.testing.assert_close(compiled(query, points, feature, SHAPES), expected)
