# SPDX-License-Identifier: Apache-2.0
"""FlopCounterMode counts the operators: the sums over corners, two FLOPs per multiply-add."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import children
from vitadapter_ops import MSDeformAttn, ms_deform_attn, ms_deform_attn_from_offsets
from vitadapter_ops.testing import cases

LOCATED = next(case for case in cases.SMALL if case.name == "three-levels")
UNEQUAL = next(case for case in cases.OFFSETS if case.name == "unequal-points")
# 2 FLOPs of 4 corners for each of B x Q x heads x points x channels.
SUMS = 2 * 4 * 2 * 7 * 3 * (3 * 4) * 8
UNEQUAL_SUMS = 2 * 4 * 2 * 7 * 3 * (3 + 6 + 1) * 16


def counted(function, *, modules=False):
    """FLOPs of our operators by name, or all FLOPs by module."""
    with FlopCounterMode(display=False) as counter:
        function()
    found = counter.get_flop_counts()
    if modules:
        return {name: sum(flops.values()) for name, flops in found.items()}
    return {
        str(op).removeprefix("vitadapter_ops."): flops
        for op, flops in found.get("Global", {}).items()
        if str(op).startswith("vitadapter_ops.")
    }


def located(inputs, needs=(True, True, True), backend="auto"):
    tensors = [t.detach().requires_grad_(n) for t, n in zip(inputs.tensors, needs, strict=True)]
    out = ms_deform_attn(tensors[0], inputs.spatial_shapes, *tensors[1:], backend=backend)
    if out.requires_grad:
        out.backward(torch.ones_like(out))


@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_forward_counts_the_sums_and_backward_twice_as_many(dtypes, device):
    dtype, points = cases.DTYPES[dtypes]
    inputs = LOCATED.inputs().to(dtype, device, points)
    name = "ms_deform_attn" + "_reference" * (device == "meta")
    expected = {name: SUMS, f"{name}_backward": 2 * SUMS}
    assert counted(lambda: located(inputs)) == expected


@pytest.mark.parametrize(
    ("needs", "times"),
    [
        ((True, False, False), 1),
        ((False, True, False), 1),
        ((False, True, True), 1),
        ((True, False, True), 2),
    ],
)
def test_backward_counts_what_is_needed(needs, times):
    inputs = LOCATED.inputs(dtype=torch.float32)
    found = counted(lambda: located(inputs, needs))
    assert found["ms_deform_attn_backward"] == times * SUMS


def test_without_gradients_there_is_no_backward():
    inputs = LOCATED.inputs(dtype=torch.float32)
    assert counted(lambda: located(inputs, (False,) * 3)) == {"ms_deform_attn": SUMS}


def from_offsets(inputs):
    tensors = [t.detach().requires_grad_() for t in inputs.tensors]
    out = ms_deform_attn_from_offsets(
        tensors[0], inputs.spatial_shapes, *tensors[1:], **inputs.keywords
    )
    out.backward(torch.ones_like(out))


@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_levels_with_points_of_their_own_number_are_summed(dtypes):
    dtype, points = cases.DTYPES[dtypes]
    inputs = UNEQUAL.inputs().to(dtype, points=points)
    name = "ms_deform_attn_from_offsets"
    expected = {name: UNEQUAL_SUMS, f"{name}_backward": 2 * UNEQUAL_SUMS}
    assert counted(lambda: from_offsets(inputs)) == expected


def test_every_operator_has_a_formula():
    registered = torch._C._dispatch_get_all_op_names()
    names = {name.split("::")[1] for name in registered if name.startswith("vitadapter_ops::")}
    counter = FlopCounterMode(display=False)
    missing = {
        name
        for name in names
        if getattr(torch.ops.vitadapter_ops, name) not in counter.flop_registry
    }
    assert "ms_deform_attn_triton_backward" in names
    assert not missing


def test_attention_is_counted_where_a_model_has_it():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = MSDeformAttn(32, 2, 4, 4)
            self.mlp = torch.nn.Linear(32, 64)

        def forward(self, x, points):
            return self.mlp(self.attention(x, points, x, [(8, 8), (4, 4)]))

    block = Block().eval()
    x, points = torch.randn(2, 80, 32), torch.rand(2, 80, 2, 2)
    with torch.no_grad():  # linear layers by oneDNN step aside for the counter
        found = counted(lambda: block(x, points), modules=True)
    rows = 2 * 80
    linears = rows * 32 * (32 + 2 * 4 * 2 * 4 + 4 * 2 * 4 + 32)
    assert found["Block.attention"] == 2 * (linears + rows * 4 * 2 * 4 * 4 * 8)
    assert found["Block"] == found["Global"] == found["Block.attention"] + 2 * rows * 32 * 64


def test_importing_the_package_without_triton_warns_of_nothing():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; torch.version.cuda = '13.0'\n"  # with which the counter's import warns
        "import vitadapter_ops, logging\n"
        "assert not logging.getLogger('torch.utils.flop_counter').disabled\n"
    )
    done = children.python(["-c", code])
    assert done.returncode == 0, done.stderr
    assert "flop counting" not in done.stderr
