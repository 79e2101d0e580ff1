# SPDX-License-Identifier: Apache-2.0
"""The modules of projects that no registry has, against their published arithmetic."""

import copy

import pytest
import torch

import drop_in_checks
from vitadapter_ops.compat import dcnv4, deformable_detr, detrex, mmcv, rtdetr
from vitadapter_ops.testing import tolerances

SHAPES = [(5, 8), (3, 4), (2, 2)]
PIXELS = sum(height * width for height, width in SHAPES)
TENSOR = torch.tensor(SHAPES)
STARTS = torch.tensor([0, 40, 52])
BATCH, QUERIES, WIDTH, HEADS, POINTS = 2, 7, 24, 3, 4
MANY = [3, 6, 2]


def tensors(coordinates: int, levels: int = len(SHAPES), width: int = WIDTH):
    reference = torch.rand(BATCH, QUERIES, levels, coordinates) * 0.8 + 0.1
    return torch.randn(BATCH, QUERIES, width), torch.randn(BATCH, PIXELS, width), reference


def mask():
    return torch.rand(BATCH, PIXELS) < 0.3


def first(batch_first, *tensors):
    return tensors if batch_first else tuple(t.transpose(0, 1) for t in tensors)


class Entry:
    """A module, how to call it, and what the original computes."""

    def __init__(self, make, call, points=(POINTS,) * 3, true_counts=False, **original):
        self.make, self.call, self.points = make, call, list(points)
        self.true_counts, self.original_options = true_counts, original

    def module(self):
        return drop_in_checks.perturbed(self.make())

    def ours(self, padding):
        return lambda module, *tensors: self.call(module, *tensors, padding)

    def original(self, padding):
        def function(module, query, value, reference):
            out = drop_in_checks.published_module(
                module,
                query,
                value,
                reference,
                SHAPES,
                HEADS,
                self.points,
                padding,
                **self.original_options,
            )
            # mmcv's and detrex's add an identity, here zeros in the dtype of the query.
            return out + torch.zeros_like(query) if self.call is mmcv_call else out

        return function


def detr_call(m, q, v, r, p):
    return m(q, r, v, TENSOR, STARTS, p)


def mmcv_call(m, q, v, r, p):
    first_q, first_v = (q, v) if m.batch_first else (q.transpose(0, 1), v.transpose(0, 1))
    out = m(
        first_q,
        None,
        first_v,
        identity=torch.zeros_like(first_q),
        key_padding_mask=p,
        reference_points=r,
        spatial_shapes=TENSOR,
        level_start_index=STARTS,
    )
    return out if m.batch_first else out.transpose(0, 1)


def grounding_dino_call(m, q, v, r, p):
    return m(
        q, value=v, key_padding_mask=p, reference_points=r, spatial_shapes=TENSOR,
        level_start_index=STARTS,
    )  # fmt: skip


def rtdetr_call(m, q, v, r, p):
    return m(q, r, v, SHAPES, None if p is None else ~p)


def dfine_call(m, q, v, r, p):
    if p is not None:
        v = v.masked_fill(p[..., None], 0.0)
    levels = v.view(BATCH, PIXELS, HEADS, -1).permute(0, 2, 3, 1).split([40, 12, 4], -1)
    return m(q, r, levels, SHAPES)


SIZE = {"num_heads": HEADS, "num_levels": 3, "num_points": POINTS}
ENTRIES = {
    "deformable-detr": Entry(
        lambda: deformable_detr.MSDeformAttn(WIDTH, 3, HEADS, POINTS), detr_call
    ),
    "vit-adapter": Entry(
        lambda: deformable_detr.MSDeformAttn(WIDTH, 3, HEADS, POINTS, ratio=0.5), detr_call
    ),
    "dcnv4": Entry(lambda: dcnv4.FlashDeformAttn(WIDTH, 3, HEADS, POINTS), detr_call),
    "mmcv": Entry(
        lambda: mmcv.MultiScaleDeformableAttention(WIDTH, **SIZE, dropout=0.0), mmcv_call
    ),
    "mmcv-batch-first": Entry(
        lambda: mmcv.MultiScaleDeformableAttention(
            WIDTH, **SIZE, dropout=0.0, batch_first=True, value_proj_ratio=0.5
        ),
        mmcv_call,
    ),
    "detrex": Entry(
        lambda: detrex.MultiScaleDeformableAttention(
            embed_dim=WIDTH, **SIZE, dropout=0.0, img2col_step=32
        ),
        mmcv_call,
    ),
    "groundingdino": Entry(
        lambda: detrex.GroundingDinoAttention(embed_dim=WIDTH, **SIZE, batch_first=True),
        grounding_dino_call,
    ),
    "rtdetr-v1": Entry(
        lambda: rtdetr.MSDeformableAttentionV1(WIDTH, HEADS, 3, POINTS), rtdetr_call
    ),
    "rtdetr-v2": Entry(
        lambda: rtdetr.MSDeformableAttention(WIDTH, HEADS, 3, MANY, offset_scale=0.7),
        rtdetr_call,
        MANY,
        scale=0.7,
    ),
    "rtdetr-v2-discrete": Entry(
        lambda: rtdetr.MSDeformableAttention(WIDTH, HEADS, 3, POINTS, method="discrete"),
        rtdetr_call,
        method="discrete-by-height",
    ),
    "d-fine": Entry(
        lambda: rtdetr.DFineMSDeformableAttention(WIDTH, HEADS, 3, MANY), dfine_call, MANY
    ),
}
by_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


@by_entry
@pytest.mark.parametrize("precision", drop_in_checks.PRECISIONS)
@pytest.mark.parametrize("coordinates", [2, 4])
def test_outputs_and_gradients_are_the_originals(entry, coordinates, precision):
    padding = mask()
    drop_in_checks.check(
        entry.original(padding),
        entry.ours(padding),
        entry.module(),
        tensors(coordinates),
        precision,
    )


@by_entry
def test_one_reference_point_serves_all_levels(entry):
    drop_in_checks.check(
        entry.original(None), entry.ours(None), entry.module(), tensors(4, levels=1)
    )


@by_entry
def test_compiled_module_equals_eager(entry):
    module, padding = entry.module(), mask()
    compiled = drop_in_checks.in_one_graph(entry.ours(padding))
    drop_in_checks.check(entry.ours(padding), compiled, module, tensors(4))


@by_entry
def test_state_dict_has_the_published_keys_and_travels(entry):
    module = entry.module()
    state = module.state_dict()
    projections = [] if isinstance(module, rtdetr.DFineMSDeformableAttention) else ["value_proj"]
    projections += ["output_proj"] if projections else []
    expected = {
        f"{name}.{kind}"
        for name in ("sampling_offsets", "attention_weights", *projections)
        for kind in ("weight", "bias")
    }
    if hasattr(module, "num_points_scale"):
        expected.add("num_points_scale")
    assert set(state) == expected
    points = sum(entry.points)
    assert list(state["sampling_offsets.weight"].shape) == [HEADS * points * 2, WIDTH]
    assert list(state["attention_weights.weight"].shape) == [HEADS * points, WIDTH]
    other = entry.make()
    other.load_state_dict(copy.deepcopy(state), strict=True)
    arguments = (*tensors(2), None)
    torch.testing.assert_close(
        entry.call(other, *arguments), entry.call(module, *arguments), rtol=0, atol=0
    )


@by_entry
def test_initial_offsets_are_a_ray_for_each_head(entry):
    bias = entry.make().sampling_offsets.bias.detach().view(HEADS, -1, 2)
    steps = torch.cat([torch.arange(1, points + 1) for points in entry.points])
    torch.testing.assert_close(bias.abs().amax(-1), steps.expand(HEADS, -1).float())
    assert torch.equal(bias[0, :, 1], torch.zeros(len(steps)))  # the first head looks right


def test_mmcv_adds_positions_and_identity():
    module = drop_in_checks.perturbed(
        mmcv.MultiScaleDeformableAttention(WIDTH, **SIZE, dropout=0.0)
    )
    query, value, reference = tensors(2)
    query, value = query.transpose(0, 1), value.transpose(0, 1)
    position = torch.randn_like(query)
    rest = {"reference_points": reference, "spatial_shapes": TENSOR, "level_start_index": STARTS}
    alone = module(query + position, value=value, identity=torch.zeros_like(query), **rest)
    for got in (
        module(query, value=value, query_pos=position, **rest) - query,
        module(query, value=value, query_pos=position, identity=position, **rest) - position,
        module(query, value=value, query_pos=position, residual=position, **rest) - position,
    ):
        torch.testing.assert_close(got, alone, **tolerances.CLOSE)


def test_mmcv_attends_to_the_queries_without_a_value():
    module = mmcv.MultiScaleDeformableAttention(WIDTH, **SIZE, dropout=0.0, batch_first=True)
    tokens = torch.randn(BATCH, PIXELS, WIDTH)
    rest = {"reference_points": torch.rand(BATCH, PIXELS, 3, 2), "spatial_shapes": TENSOR}
    torch.testing.assert_close(module(tokens, **rest), module(tokens, value=tokens, **rest))


def test_mmcv_drops_out_in_training_only():
    module = mmcv.MultiScaleDeformableAttention(WIDTH, **SIZE, dropout=1.0, batch_first=True)
    query, value, reference = tensors(2)
    rest = {"value": value, "reference_points": reference, "spatial_shapes": TENSOR}
    torch.testing.assert_close(module.train()(query, **rest), query)
    assert not torch.allclose(module.eval()(query, **rest), query)


def test_discrete_freezes_its_offsets():
    module = rtdetr.MSDeformableAttention(WIDTH, HEADS, 3, POINTS, method="discrete")
    assert not any(each.requires_grad for each in module.sampling_offsets.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mmcv.MultiScaleDeformableAttention(10, 3), "num_heads: expected a divisor of em"),
        (lambda: rtdetr.MSDeformableAttention(num_points=[4, 4]), "num_points: expected a posit"),
        (lambda: rtdetr.MSDeformableAttention(method="cubic"), "method: expected 'default' or"),
    ],
)
def test_constructors_name_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_forward_names_what_is_wrong():
    module = mmcv.MultiScaleDeformableAttention(WIDTH, **SIZE)
    query, value, reference = tensors(2)
    first_query, first_value = query.transpose(0, 1), value.transpose(0, 1)
    with pytest.raises(TypeError, match=r"reference_points: expected a torch\.Tensor, got None"):
        module(first_query, value=first_value, spatial_shapes=TENSOR)
    with pytest.raises(ValueError, match="reference_points: expected"):
        mmcv_call(module, query, value, reference[..., :1], None)
    with pytest.raises(ValueError, match=r"^key_padding_mask: expected"):
        mmcv_call(module, query, value, reference, mask()[:, :-1])
    packed = torch.zeros(BATCH, QUERIES, HEADS, 3 * 3 * POINTS - 1)
    with pytest.raises(ValueError, match="sampling_loc_attn: expected"):
        dcnv4.FlashDeformAttnFunction.apply(
            value.view(BATCH, PIXELS, HEADS, -1), TENSOR, STARTS, packed, 64, POINTS
        )


@pytest.mark.parametrize("precision", drop_in_checks.PRECISIONS)
def test_packed_locations_and_logits(precision):
    """DCNv4's one tensor: all locations, then all logits."""
    value = torch.randn(BATCH, PIXELS, HEADS, 8)
    locations = torch.rand(BATCH, QUERIES, HEADS, 3 * POINTS, 2) * 1.4 - 0.2
    logits = torch.randn(BATCH, QUERIES, HEADS, 3 * POINTS)

    def ours(module, value, locations, logits):
        packed = torch.cat((locations.flatten(-2), logits), -1)
        return dcnv4.FlashDeformAttnFunction.apply(value, TENSOR, STARTS, packed, 64, POINTS)

    def original(module, value, locations, logits):
        nowhere = locations.new_zeros(BATCH, QUERIES, 1, 2)
        sides = locations.new_tensor([(w, h) for h, w in SHAPES for _ in range(POINTS)])
        return drop_in_checks.attend(
            value, SHAPES, nowhere, locations * sides, logits, [POINTS] * 3
        )

    drop_in_checks.check(original, ours, torch.nn.Module(), (value, locations, logits), precision)
    if precision == "fp32":
        compiled = drop_in_checks.in_one_graph(ours)
        drop_in_checks.check(original, compiled, torch.nn.Module(), (value, locations, logits))
