# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run on the host by a small emulation, equal the fp64 reference.

The kernels' source is compiled as it is. That these checks catch mistakes: test_mutants.py.
"""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import emulation
import infinities
import native
from benchmarks.op import locality
from emulation import (
    ENCODER,
    address,
    check,
    check_offsets,
    emulate,
    emulate_offsets,
    errors_of_full_blocks,
)
from once import once
from vitadapter_ops import _extension
from vitadapter_ops.testing import cases, tolerances

CASES = cases.SMALL
SPECIALISED = native.head_dims()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return built(tmp_path_factory, "emulation", "VITADAPTER_VECTOR_REDUCTIONS=1")


@pytest.fixture(scope="module")
def scalar_kernels(kernels, tmp_path_factory):
    """As on architectures whose memory adds one number at a time, which the backward alone does."""
    defines = ("VITADAPTER_VECTOR_REDUCTIONS=0", "VITADAPTER_ONLY_BACKWARD")
    backward = built(tmp_path_factory, "emulation-scalar", *defines)
    return SimpleNamespace(**{**vars(kernels), **vars(backward)})


def built(tmp_path_factory, name, *defines):
    if shutil.which(emulation.CXX) is None:
        pytest.skip("needs a C++ compiler")
    source = _extension.source_dir()
    folder = once(tmp_path_factory, name, lambda folder: emulation.build(folder, source, *defines))
    return emulation.load(folder)


def test_every_pair_of_dtypes_is_emulated(kernels):
    names = {name.removeprefix("forward_") for name in vars(kernels) if name.startswith("forward_")}
    assert names == {*cases.DTYPES}


# The kernels that a launch chooses, and the general one, which serves every problem.
KERNELS = pytest.mark.parametrize("general", [False, True], ids=["chosen", "general"])


@KERNELS
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(kernels, case, dtypes, general):
    check(kernels, case, dtypes, general=general)


@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("channels", SPECIALISED)
def test_specialised_kernels_equal_the_reference(kernels, scalar_kernels, channels, dtypes):
    # Two steps of each lane's points, and a warp whose last rows do not exist.
    case = cases.Case("specialised", ((5, 7), (3, 4)), queries=13, channels=channels, points=40)
    check(kernels, case, dtypes)
    check(scalar_kernels, case, dtypes)


# value as a view, and the widest pack in bytes that it can be read in.
LAYOUTS = {
    "contiguous": 16,
    "head-major": 16,
    "slice at 16 bytes": 16,
    "slice at 8 bytes": 8,
    "slice at one number": 0,
}


def value_laid_out(layout, dtype, channels, pixels=12, heads=3):
    shape = (2, pixels, heads, channels)
    if layout == "contiguous":
        return torch.ones(shape, dtype=dtype)
    if layout == "head-major":
        return torch.ones(2, heads, pixels, channels, dtype=dtype).transpose(1, 2)
    skipped = max(LAYOUTS[layout], dtype.itemsize) // dtype.itemsize
    wide = torch.ones(2, pixels, heads * channels + skipped, dtype=dtype)
    return wide[..., skipped:].unflatten(-1, (heads, channels))


def pack_bytes(dtype, channels):
    """Of the kernel for a width: 4 numbers, or 16 bytes where four lanes have as much to do."""
    return 8 if dtype.itemsize == 2 and channels in (12, 16) else 16


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("channels", [*SPECIALISED, 8, 31])
def test_which_kernel_serves(kernels, channels, dtypes, layout):
    dtype, points = cases.DTYPES[dtypes]
    value = value_laid_out(layout, dtype, channels)
    specialised = channels in SPECIALISED and dtype != torch.float64
    fits = pack_bytes(dtype, channels) <= LAYOUTS[layout]
    expected = channels if specialised and fits else 0
    assert served(kernels, dtypes, value, points) == [expected] * 4


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp16_points_fp32"])
def test_the_general_kernel_serves_pairs_that_are_not_aligned(kernels, dtypes):
    dtype, points = cases.DTYPES[dtypes]
    value = value_laid_out("contiguous", dtype, 12)
    assert served(kernels, dtypes, value, points, shift=1) == [0] * 4


def served(kernels, dtypes, value, points, shift=0):
    """D of the kernels that serve the operators, located and from offsets, forward and backward.

    `shift`: numbers before the first location or offset.
    """
    batch, pixels, heads, channels = value.shape
    queries, each = 2, 3
    sizes = [batch, pixels, queries, heads, channels]
    levels = [3, pixels // 3, 0, each]
    pairs = batch * queries * heads * each * 2
    xy = torch.full((pairs + shift,), 0.5, dtype=points)[shift:]
    weights = torch.full((pairs // 2,), 0.5, dtype=points)
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    reference = torch.full((batch, queries, 1, 2), 0.5, dtype=compute)
    out = torch.ones(batch, queries, heads, channels, dtype=value.dtype)
    grad_value = torch.zeros(value.shape, dtype=compute)
    grads = [torch.empty_like(xy).resize_(pairs), torch.empty_like(weights)]
    chosen = []
    per_query = heads * each
    strides = [queries * 2 * per_query, 2 * per_query, queries * per_query, per_query]
    for name, layout, where in (
        ("", [], [xy, weights]),
        ("offsets_", [*strides, batch, 1, 2, queries], [xy, weights, reference, None]),
    ):
        shape = [sizes, levels, list(value.stride()[:3]), layout, [address(t) for t in where]]
        wanted = [*map(address, grads), *[0, 0] * (name != "")]
        forward = getattr(kernels, f"{name}forward_{dtypes}")
        backward = getattr(kernels, f"{name}backward_{dtypes}")
        chosen.append(forward(*shape, [address(value), 0, address(out), 0], False))
        rest = [address(value), 0, address(out), address(grad_value)]
        chosen.append(backward(*shape, rest, wanted, [], False))
    return chosen


def test_blocks_of_the_backward_get_smaller_with_very_many_points(kernels):
    # 4 rows a warp: 2 KiB of Samples, and with offsets 4 bytes for each point of each row.
    assert kernels.fused_backward_shape(16)[0] == 256
    seen = set()
    for points in (16, 100, 240, 400, 1000, 2500):
        threads, size = kernels.fused_backward_shape(points)
        assert threads // 32 * 16 * points < size <= 48 << 10
        seen.add(threads)
    assert seen == {256, 128, 64, 32}
    assert kernels.fused_backward_shape(3000)[1] > 48 << 10
    for points in (400, 1000):
        case = cases.OffsetCase("very-many-points", ((5, 7),), (points,), batch=1, channels=32)
        # In fp32 sums of so many terms are less accurate than eager's.
        check_offsets(kernels, case, "bf16")


@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_queries_that_are_pixels(kernels, dtypes):
    check(kernels, ENCODER, dtypes)


@KERNELS
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("case", cases.OFFSETS, ids=str)
def test_fused_kernels_equal_the_reference(kernels, case, dtypes, general):
    check_offsets(kernels, case, dtypes, general=general)


@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("channels", SPECIALISED)
def test_specialised_fused_kernels_equal_the_reference(kernels, channels, dtypes):
    case = next(case for case in cases.OFFSETS if case.name == "unequal-points")
    check_offsets(kernels, replace(case, channels=channels), dtypes)


# fp64 has no integer sums.
@pytest.mark.parametrize("dtypes", [name for name in cases.DTYPES if name != "fp64"])
def test_deterministic_kernels_equal_the_reference(kernels, dtypes):
    for case in CASES:
        check(kernels, case, dtypes, fixed=True)
    for case in cases.OFFSETS:
        check_offsets(kernels, case, dtypes, fixed=True)


def test_deterministic_kernels_have_the_same_bits_in_any_order(kernels):
    # All queries look at few pixels; rows of another order reach them in another order.
    case = cases.Case("contended", ((3, 3),), queries=50, channels=32)
    inputs = case.inputs().to(torch.float32)
    order = torch.randperm(case.queries, generator=torch.Generator().manual_seed(0))
    turned = cases.Inputs(
        inputs.value,
        inputs.spatial_shapes,
        inputs.sampling_locations[:, order].contiguous(),
        inputs.attention_weights[:, order].contiguous(),
        inputs.level_start_index,
    )
    cotangent = torch.randn(case.batch, case.queries, case.heads * case.channels)
    grads = {
        fixed: [
            emulate(kernels, "fp32", inputs, cotangent, fixed=fixed)[1],
            emulate(kernels, "fp32", turned, cotangent[:, order].contiguous(), fixed=fixed)[1],
        ]
        for fixed in (True, False)
    }
    assert torch.equal(*grads[True])
    assert not torch.equal(*grads[False])


def test_a_finite_gradient_that_no_integer_holds_makes_only_its_pixels_nan(kernels):
    case = cases.SMALL[3]
    inputs = case.inputs().to(torch.float32)
    cotangent = torch.randn(case.batch, case.queries, case.heads * case.channels)
    inputs.sampling_locations[0, 0] = 0.5
    clean = emulate(kernels, "fp32", inputs, cotangent, fixed=True)[1]
    cotangent[0, 0, 0] = 3e38
    got = emulate(kernels, "fp32", inputs, cotangent, fixed=True)[1]
    # Four pixels around the middle of two levels, and two of the one that has a middle column.
    assert got.isnan().sum() == got[0, :, 0, 0].isnan().sum() == 4 + 4 + 2
    assert torch.equal(got[got.isfinite()], clean[got.isfinite()])


# How gradients of value are summed: in vectors, number by number, and in integers.
SUMS = pytest.mark.parametrize("sums", ["vectors", "scalars", "fixed"])


def emulated(request, sums):
    kernels = request.getfixturevalue("scalar_kernels" if sums == "scalars" else "kernels")
    return kernels, {"fixed": sums == "fixed"}


@SUMS
@KERNELS
@pytest.mark.parametrize("poison", infinities.POISONS)
def test_infinities_reach_what_the_definition_says(request, poison, general, sums):
    kernels, how = emulated(request, sums)
    for dtypes, channels in (("fp32", 32), ("bf16", 20), ("fp16", 32)):
        infinities.check(
            infinities.POISONS[poison],
            channels,
            cases.DTYPES[dtypes][0],
            lambda *given, dtypes=dtypes: emulate(kernels, dtypes, *given, general, **how),
        )


@SUMS
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("poison", infinities.FUSED_POISONS)
def test_infinities_in_the_fused_kernels(request, poison, masked, sums):
    kernels, how = emulated(request, sums)
    for dtypes, channels, boxes in (("fp32", 32, False), ("bf16", 20, True)):
        infinities.check_offsets(
            infinities.FUSED_POISONS[poison],
            channels,
            cases.DTYPES[dtypes][0],
            lambda *given, dtypes=dtypes: emulate_offsets(kernels, dtypes, *given, **how),
            boxes,
            masked,
        )


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e36])
def test_the_deterministic_gradient_scales(kernels, size):
    case = cases.SMALL[3]
    inputs = case.inputs().to(torch.float32)
    cotangent = torch.randn(case.batch, case.queries, case.heads * case.channels)
    plain = emulate(kernels, "fp32", inputs, cotangent, fixed=True)[1].double()
    scaled = emulate(kernels, "fp32", inputs, cotangent * size, fixed=True)[1].double()
    torch.testing.assert_close(scaled / size, plain, **tolerances.CLOSE_SMALL)


def test_rows_are_divided_exactly(kernels):
    divisors = [1, 2, 3, 5, 7, 8, 12, 300, 641, 22223, 2**16, 2**16 + 1, 2**30 + 1, 2**31 - 1]
    for divisor in divisors:
        numbers = {0, 1, 2**31 - 1}
        for multiple in (1, 2, 3, 1000, (2**31 - 1) // divisor):
            numbers |= {multiple * divisor + delta for delta in (-1, 0, 1)}
        for number in numbers:
            if 0 <= number < 2**31:
                assert kernels.quotient(number, divisor) == number // divisor


def row_at(kernels, shapes, queries, place, batch=2, heads=3):
    """(b, q, m) of the row at a place in the order in which rows are taken."""
    levels = [number for height, width in shapes for number in (height, width, 0, 4)]
    pixels = sum(height * width for height, width in shapes)
    b, q, m, number = kernels.row_at([batch, pixels, queries, heads, 32], levels, place)
    assert number == (b * queries + q) * heads + m
    return b, q, m


def rows_in_order(kernels, shapes, queries):
    return [row_at(kernels, shapes, queries, place) for place in range(2 * queries * 3)]


@pytest.mark.parametrize(
    ("shapes", "queries"),
    [
        (((1, 1),), 1),
        (((1, 100),), 100),
        (((100, 1),), 100),
        (((8, 8),), 64),
        (((8, 8),), 63),
        (((17, 13), (9, 7), (5, 0), (4, 3)), 296),
        (((18, 14), (9, 7)), 63),
        (((2, 3),), 200),
        (((2, 2),) * 9, 36),
        (((6, 10),), 315),
        (((5, 7),), 181),
    ],
    ids=str,
)
def test_every_row_is_taken_once(kernels, shapes, queries):
    rows = rows_in_order(kernels, shapes, queries)
    assert sorted(rows) == [(b, q, m) for b in range(2) for q in range(queries) for m in range(3)]


@pytest.mark.parametrize(
    ("shapes", "grids"),
    [
        (((48, 32), (24, 16)), ((48, 32), (24, 16))),
        (((48, 32), (24, 16)), ((24, 16),)),
        (((32, 16),), ((64, 32), (32, 16), (16, 8))),
    ],
    ids=["encoder", "injector", "extractor"],
)
def test_a_run_is_a_square_of_one_head(kernels, shapes, grids):
    pixels = [
        (g, line, column)
        for g, (height, width) in enumerate(grids)
        for line in range(height)
        for column in range(width)
    ]
    rows = rows_in_order(kernels, shapes, len(pixels))
    for first in range(0, len(rows), 64):
        run = rows[first : first + 64]
        assert len({(b, m, pixels[q][0]) for b, q, m in run}) == 1
        lines, columns = ({pixels[q][i] for _, q, _ in run} for i in (1, 2))
        for numbers in (lines, columns):
            assert len(numbers) == 8
            assert max(numbers) - min(numbers) == 7


def test_the_order_is_that_of_the_benchmark_that_counts_with_it(kernels):
    grids = ((9, 13), (5, 7))
    rows = locality.runs(locality.banded(grids), heads=3).tolist()
    assert rows_in_order(kernels, grids, len(rows) // 3)[: len(rows)] == [(0, *row) for row in rows]


@pytest.mark.parametrize("shape", [(1, 300_000_000), (300_000_000, 1)])
def test_the_order_of_many_rows(kernels, shape):
    queries = 300_000_000
    assert row_at(kernels, (shape,), queries, 65) == (0, 1, 1)
    assert row_at(kernels, (shape,), queries, 6 * queries - 1) == (1, queries - 1, 2)
    assert row_at(kernels, (shape,), queries, 3 * queries + 3 * 64) == (1, 64, 0)


def test_without_a_grid_a_run_is_of_neighbours(kernels):
    rows = rows_in_order(kernels, ((5, 5),), 130)
    assert rows[:64] == [(0, q, 0) for q in range(64)]
    assert rows[64:128] == [(0, q, 1) for q in range(64)]
    assert rows[6 * 64 : 6 * 64 + 6] == [(0, q, m) for m in range(3) for q in (128, 129)]


def test_gradients_that_are_not_needed_are_not_written(kernels):
    case = cases.SMALL[3]
    inputs = case.inputs().to(torch.float32)
    cotangent = torch.randn(case.batch, case.queries, case.heads * case.channels)
    everything = emulate(kernels, "fp32", inputs, cotangent)[1:]
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        got = emulate(kernels, "fp32", inputs, cotangent, needs=needs)[1:]
        for need, a, b in zip(needs, got, everything, strict=True):
            if need:
                # The order of the atomics depends on which shuffles there are.
                torch.testing.assert_close(a, b)
            else:
                assert a.isnan().all() or (a == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -3e9])
def test_non_finite_locations_contribute_nothing(kernels, bad):
    case = cases.SMALL[3]
    inputs = case.inputs().to(torch.float32)
    inputs.sampling_locations[:, ::2, ..., 0] = bad
    cotangent = torch.randn(case.batch, case.queries, case.heads * case.channels)
    out, grad_value, grad_locations, grad_weights = emulate(kernels, "fp32", inputs, cotangent)
    assert (out[:, ::2] == 0).all()
    assert (grad_locations[:, ::2] == 0).all()
    assert (grad_weights[:, ::2] == 0).all()
    assert grad_value.isfinite().all()
    assert out[:, 1::2].abs().sum() > 0


def test_full_blocks_stay_within_their_shared_memory(kernels):
    assert set(errors_of_full_blocks(kernels)) == {None}
