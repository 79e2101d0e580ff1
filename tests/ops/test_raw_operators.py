# SPDX-License-Identifier: Apache-2.0
"""Raw operators with a tensor of another device, layout, dtype or size: an error that names it.

Before any pointer is taken: what lies elsewhere would be read as if it were here.
"""

import re

import pytest
import torch

import vitadapter_ops
from vitadapter_ops.testing import cases

OPS = torch.ops.vitadapter_ops
LOCATED = [
    "value",
    "spatial_shapes",
    "level_start_index",
    "sampling_locations",
    "attention_weights",
]
FUSED = [
    *LOCATED[:3],
    "points_per_level",
    "reference_points",
    "sampling_offsets",
    "attention_logits",
    "padding_mask",
    "offset_scale",
]


def located():
    inputs = cases.SMALL[3].inputs().to(torch.float32)
    value, locations, weights = inputs.tensors
    given = (value, inputs.flat_shapes, inputs.starts, locations, weights)
    return dict(zip(LOCATED, given, strict=True))


def fused():
    case = cases.OffsetCase(
        "raw", ((4, 6), (2, 3)), (4, 4), boxes=True, masked=True, scaled=True, channels=8
    )
    inputs = case.inputs().to(torch.float32)
    return dict(zip(FUSED, inputs.arguments, strict=True))


def arguments(op):
    """The arguments of an operator by their names, all good."""
    fused_op = "from_offsets" in op
    given = fused() if fused_op else located()
    if not op.endswith("backward"):
        return given | ({"return_weights": True} if fused_op else {})
    value, like = given["value"], given["attention_logits" if fused_op else "attention_weights"]
    grads = {"grad_output": torch.randn(2, like.shape[1], value.shape[2] * value.shape[3])}
    if fused_op:
        grads["grad_weights"] = torch.randn(like.shape)
    return grads | given | {f"need_{i}": True for i in range(4 if fused_op else 3)}


FAULTS = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "integers": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "rank": lambda t: t[None],
    "size": lambda t: t.repeat_interleave(2, -1),
}
NAMES = [
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "ms_deform_attn_from_offsets",
    "ms_deform_attn_from_offsets_backward",
]
TENSORS = [
    (op, name)
    for op in NAMES
    for name, argument in arguments(op).items()
    if torch.is_tensor(argument)
]


def assert_named(call, given, name, fault):
    # Twice the channels of value are right for a forward; twice the heads never are.
    turn = fault == "size" and name == "value"
    bad = given[name].repeat(1, 1, 2, 1) if turn else FAULTS[fault](given[name])
    # A change of value is noticed at what has to fit it.
    named = r"\w+" if name == "value" else name
    with pytest.raises(ValueError, match=rf"(?s)^{named}: expected .*, got .*$") as caught:
        call(*(given | {name: bad}).values())
    came = {"meta": r"meta|cpu", "integers": "int32", "sparse": "layout", "complex": "[cC]omplex"}
    got = str(caught.value).rpartition(", got ")[2]
    assert re.search(came.get(fault, r"\[[0-9, ]+\]"), got)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("op", "name"), TENSORS, ids=str)
def test_cpu_kernels_name_the_argument(op, name, fault):
    if "cpu" not in vitadapter_ops.available_backends():
        pytest.skip("needs the CPU library")
    call = getattr(OPS, op).default
    if fault in ("meta", "sparse"):
        # Torch would send it elsewhere. No one else may, either.
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        cpu_kernel = call.redispatch

        def call(*given):
            return cpu_kernel(keys, *given)

    with torch.no_grad():
        assert_named(call, arguments(op), name, fault)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("op", "name"), TENSORS, ids=str)
def test_triton_launchers_name_the_argument(op, name, fault):
    pytest.importorskip("triton")
    from vitadapter_ops.triton import launch

    direction = "backward" if op.endswith("backward") else "forward"
    suffix = "_from_offsets" if "from_offsets" in op else ""
    assert_named(getattr(launch, direction + suffix), arguments(op), name, fault)


def test_a_level_table_that_does_not_fit_is_named():
    given = list(located().values())
    for index, bad, message in (
        (1, [8, 12, 4, 6, 2], r"^spatial_shapes: expected 6 sides .*, got 5$"),
        (
            1,
            [8, 12, 4, 6, 2, 30],
            r"^spatial_shapes, level_start_index: expected level 2 .* got 2 x",
        ),
        (2, [], r"^level_start_index: expected 1 to 64 levels, got 0$"),
    ):
        changed = [bad if i == index else argument for i, argument in enumerate(given)]
        with pytest.raises(ValueError, match=message):
            OPS.ms_deform_attn(*changed)
    given = list(fused().values())
    given[3] = [4]
    with pytest.raises(ValueError, match=r"^points_per_level: expected 2 numbers .*, got 1$"):
        OPS.ms_deform_attn_from_offsets(*given, False)


def everyone(op):
    """An operator and all that stand beside it."""
    name = op.removesuffix("_backward")
    yield op
    yield f"{name}_reference{'_backward' if op.endswith('_backward') else ''}"
    if op.endswith("_backward"):
        yield f"{name}_deterministic_backward"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("op", "name"), TENSORS, ids=str)
def test_kernels_in_python_name_the_argument(op, name, fault):
    for each in list(everyone(op))[1:]:
        assert_named(getattr(OPS, each), arguments(op), name, fault)


@pytest.mark.parametrize(("op", "name"), TENSORS, ids=str)
def test_what_is_no_tensor_or_packed_by_onednn_is_named(op, name):
    for each in everyone(op):
        given = arguments(op)
        optional = name in ("padding_mask", "offset_scale", "grad_weights")
        if not optional:
            with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected a .*ensor, got"):
                getattr(OPS, each)(*(given | {name: None}).values())
        if given[name].dtype == torch.float32 and given[name].dim() < 6:  # as many as oneDNN packs
            packed = given | {name: given[name].to_mkldnn()}
            with pytest.raises(ValueError, match=rf"^{name}: expected a dense tensor"):
                getattr(OPS, each)(*packed.values())


BAD_TABLES = {
    "negative sides": {"spatial_shapes": [-4, -6, 2, 3]},
    "too few starts": {"level_start_index": [0]},
    "no levels": {"spatial_shapes": [], "level_start_index": []},
    "outside": {"level_start_index": [0, 25]},
}


@pytest.mark.parametrize("table", BAD_TABLES)
@pytest.mark.parametrize("op", NAMES)
def test_level_tables_that_do_not_fit_are_refused_by_every_kernel(op, table):
    for each in everyone(op):
        given = arguments(op) | BAD_TABLES[table]
        with pytest.raises(ValueError, match=r"^(spatial_shapes|level_start_index).*: expected"):
            getattr(OPS, each)(*given.values())


@pytest.mark.parametrize("counts", [[4, 3], [9, -1], [], [8]])
@pytest.mark.parametrize("op", NAMES[2:])
def test_points_that_do_not_add_up_are_refused_by_every_kernel(op, counts):
    for each in everyone(op):
        with pytest.raises(ValueError, match=r"^(points_per_level|sampling_offsets): expected"):
            getattr(OPS, each)(*(arguments(op) | {"points_per_level": counts}).values())


@pytest.mark.parametrize("fault", ["meta", "sparse"])
@pytest.mark.parametrize(("op", "name"), TENSORS, ids=str)
def test_what_torch_sends_elsewhere_is_named(op, name, fault):
    given = arguments(op)
    given[name] = FAULTS[fault](given[name])
    named = r"\w+" if name == "value" and fault == "meta" else name
    for each in everyone(op):
        with torch.no_grad(), pytest.raises(ValueError, match=rf"(?s)^{named}: expected .*, got "):
            getattr(OPS, each)(*given.values())


@pytest.mark.parametrize("op", NAMES)
def test_all_on_meta_gives_shapes(op):
    given = [a.to("meta") if torch.is_tensor(a) else a for a in arguments(op).values()]
    with torch.no_grad():
        for each in everyone(op):
            result = getattr(OPS, each)(*given)
            assert all(t.is_meta for t in (result if isinstance(result, tuple) else (result,)))
