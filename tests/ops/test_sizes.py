# SPDX-License-Identifier: Apache-2.0
"""Sizes in every form that is a sequence of integers, and none that depends on earlier calls."""

import numpy as np
import pytest
import torch

from vitadapter_ops import _calls, ms_deform_attn, ms_deform_attn_from_offsets
from vitadapter_ops.testing import cases

CASE = cases.Case("sizes", ((4, 6), (2, 3)))
SIZES, STARTS = [(4, 6), (2, 3)], [0, 24]
OFFSET_CASE = cases.OffsetCase("sizes", ((4, 6), (2, 3)), (3, 1))
COUNTS = [3, 1]


def call(spatial_shapes, level_start_index=None):
    value, locations, weights = CASE.inputs().to(torch.float32).tensors
    return ms_deform_attn(
        value, spatial_shapes, locations, weights, level_start_index=level_start_index
    )


def call_from_offsets(spatial_shapes, level_start_index=None, points_per_level=COUNTS):
    value, *points = OFFSET_CASE.inputs().to(torch.float32).tensors
    return ms_deform_attn_from_offsets(
        value,
        spatial_shapes,
        *points,
        level_start_index=level_start_index,
        points_per_level=points_per_level,
    )


GOOD_SIZES = {
    "lists": [[4, 6], [2, 3]],
    "torch.Size": (torch.Size((4, 6)), torch.Size((2, 3))),
    "int64 tensor": torch.tensor(SIZES),
    "int32 tensor": torch.tensor(SIZES, dtype=torch.int32),
    "rows of a tensor": list(torch.tensor(SIZES)),
    "tensors without a dimension": [(torch.tensor(4), torch.tensor(6)), (2, torch.tensor(3))],
    "integers of numpy": [(np.int64(4), np.int32(6)), (np.uint8(2), 3)],
    "array of numpy": np.array(SIZES),
    "rows of an array": list(np.array(SIZES, dtype=np.int32)),
}


@pytest.mark.parametrize("form", GOOD_SIZES)
def test_sizes_that_are_integers_of_another_library(form):
    assert torch.equal(call(GOOD_SIZES[form]), call(SIZES))
    assert torch.equal(call_from_offsets(GOOD_SIZES[form]), call_from_offsets(SIZES))


GOOD_INTEGERS = {
    "tuple": tuple,
    "torch.Size": torch.Size,
    "tensor": torch.tensor,
    "int32 tensor": lambda values: torch.tensor(values, dtype=torch.int32),
    "array": np.array,
    "integers of numpy": lambda values: [np.int64(value) for value in values],
    "tensors without a dimension": lambda values: [torch.tensor(value) for value in values],
    "range-like": lambda values: range(values[0], values[1] + 1, values[1] - values[0]),
}


@pytest.mark.parametrize("form", GOOD_INTEGERS)
def test_starts_and_points_that_are_integers_of_another_library(form):
    starts = GOOD_INTEGERS[form](STARTS)
    assert torch.equal(call(SIZES, starts), call(SIZES))
    if form != "range-like":
        counts = GOOD_INTEGERS[form](COUNTS)
        expected = call_from_offsets(SIZES)
        assert torch.equal(call_from_offsets(SIZES, starts, counts), expected)


# What may be iterated over only once, or in another order the next time.
UNORDERED = {
    "generator": lambda values: (value for value in values),
    "iterator": iter,
    "dict": lambda values: dict.fromkeys(map(_hashable, values)),
    "set": lambda values: {_hashable(value) for value in values},
    "map": lambda values: map(_hashable, values),
    "text": str,
    "memoryview": lambda values: memoryview(np.array(values)),
    "None": lambda values: None,
    "int": lambda values: 5,
    "tensor without a dimension": lambda values: torch.tensor(5),
}


def _hashable(value):
    return tuple(value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "seen"])
@pytest.mark.parametrize("form", UNORDERED)
def test_what_is_no_sequence_is_refused_whatever_was_called_before(form, seen):
    def check(name, call, *arguments):
        _calls.forget()
        if seen:
            call(SIZES)
        with pytest.raises(TypeError, match=rf"^{name}: expected .*, got \w+"):
            call(*arguments)

    make = UNORDERED[form]
    for function in (call, call_from_offsets):
        check("spatial_shapes", function, make(SIZES))
        if form != "None":
            check("level_start_index", function, SIZES, make(STARTS))
    if form != "None":
        check("points_per_level", call_from_offsets, SIZES, None, make(COUNTS))


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "seen"])
def test_a_pair_that_can_be_read_once_is_refused_whatever_was_called_before(seen):
    _calls.forget()
    if seen:
        call(SIZES)
    for bad in ([iter((4, 6)), (2, 3)], [{4, 6}, (2, 3)], [{4: 0, 6: 0}, (2, 3)], ["46", (2, 3)]):
        with pytest.raises(ValueError, match=r"spatial_shapes\[0\]: expected \(H, W\)"):
            call(bad)


NO_INTEGERS = [
    4.0,
    True,
    np.float32(4),
    np.bool_(True),
    "4",
    None,
    4j,
    torch.tensor(4.0),
    torch.tensor(True),
    torch.tensor([4]),
    torch.tensor(4, device="meta"),
]


@pytest.mark.parametrize("number", NO_INTEGERS, ids=repr)
def test_what_is_no_integer_is_named(number):
    with pytest.raises(ValueError, match=r"spatial_shapes\[0\]: expected integers, got"):
        call([(number, 6), (2, 3)])
    with pytest.raises(ValueError, match=r"level_start_index: expected integers, got"):
        call(SIZES, [number, 24])
    with pytest.raises(ValueError, match=r"points_per_level: expected integers, got"):
        call_from_offsets(SIZES, None, [number, 1])


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor(SIZES, dtype=torch.float32),
        torch.tensor(SIZES, dtype=torch.bool),
        torch.tensor(SIZES, device="meta"),
        torch.tensor(SIZES).to_sparse(),
        np.array(SIZES, dtype=np.float64),
    ],
    ids=["float", "bool", "meta", "sparse", "array"],
)
def test_tensors_of_sizes_that_cannot_be_read(bad):
    with pytest.raises(ValueError, match=r"^spatial_shapes: expected"):
        call(bad)


@pytest.mark.parametrize("form", ["int64 tensor", "rows of a tensor", "lists"])
def test_sizes_of_a_compiled_graph(form):
    value, locations, weights = CASE.inputs().to(torch.float32).tensors

    def function(sizes):
        return ms_deform_attn(value, sizes, locations, weights)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(GOOD_SIZES[form]), call(SIZES))


def test_traced_sizes_are_those_of_the_example():
    inputs = CASE.inputs().to(torch.float32)

    def function(first, second, value, locations, weights):
        sizes = [(each.shape[2], each.shape[3]) for each in (first, second)]
        return ms_deform_attn(value, sizes, locations, weights)

    maps = torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 2, 3)
    traced = torch.jit.trace(function, (*maps, *inputs.tensors))
    value, *points = inputs.tensors
    assert torch.equal(
        traced(*maps, value.flip(0), *points), function(*maps, value.flip(0), *points)
    )
    larger = torch.zeros(1, 1, 8, 6), maps[1]
    with pytest.raises(RuntimeError, match="expanded size"):
        traced(*larger, torch.cat((value, value[:, :24]), 1), *points)
