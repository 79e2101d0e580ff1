# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run on the host by a small emulation, equal the fp64 reference.

The kernels' source is compiled as it is. That the emulation can fail is tested too: changed copies
of the source, each with one mistake, must be caught.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import infinities
import pytest
import torch

from benchmarks.op import locality
from vitadapter_ops import _extension
from vitadapter_ops.testing import cases, gate
from vitadapter_ops.testing.tolerances import Inaccurate

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CXX = os.environ.get("CXX", "c++")
CASES = cases.SMALL
SPECIALISED = [12, 16, 24, 32, 40, 64, 128]
# Queries are the pixels, more of them than a run has (rows.cuh), and a band is lower than others.
ENCODER = cases.Case("encoder", ((9, 8), (4, 5)), queries=92, heads=2, channels=32)


def build(folder, source, vectors=True, only_fp32=False):
    """Compiles the emulated kernels from a copy of csrc and imports them."""
    import sysconfig

    import pybind11

    output = folder / f"emulated_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [pybind11.get_include(), sysconfig.get_path("include"), str(source)]
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    flags.append(f"-DVITADAPTER_VECTOR_REDUCTIONS={int(vectors)}")
    flags += ["-DVITADAPTER_ONLY_FP32"] * only_fp32
    command = [CXX, *flags, *(f"-I{path}" for path in include)]
    command += [str(HERE / "kernels.cpp"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("emulated_kernels", output)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if shutil.which(CXX) is None:
        pytest.skip("needs a C++ compiler")
    return build(tmp_path_factory.mktemp("emulation"), _extension.source_dir())


@pytest.fixture(scope="module")
def scalar_kernels(kernels, tmp_path_factory):
    """As on architectures whose memory adds one number at a time."""
    return build(tmp_path_factory.mktemp("emulation"), _extension.source_dir(), vectors=False)


def levels_of(inputs, starts, points):
    rows = zip(inputs.spatial_shapes, starts, points, strict=True)
    return [number for size, start, count in rows for number in (*size, start, count)]


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def grad_value_memory(value, dtype, fixed):
    """Zeros, which the kernels add to; or anything, which the deterministic ones write over."""
    return torch.full(value.shape, float("nan") if fixed else 0.0, dtype=dtype)


def fixed_sums(kernels, grad_value):
    """The integer sums of fixed_point.cuh, and their state."""
    state = torch.zeros(kernels.state_size(grad_value.numel()), dtype=torch.int32)
    return [torch.zeros(grad_value.shape, dtype=torch.int64), state]


def emulate(
    kernels, dtypes, inputs, cotangent, general=False, needs=(True, True, True), fixed=False
):
    """Output and gradients, as the launchers of csrc/ would compute them."""
    value, locations, weights = inputs.tensors
    batch, pixels, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    sizes = [batch, pixels, queries, heads, channels]
    levels = levels_of(inputs, inputs.starts, [points] * len(inputs.spatial_shapes))
    shape = [sizes, levels, list(value.stride()[:3]), []]
    where = [address(locations), address(weights)]
    nan = float("nan")
    out = torch.full((batch, queries, heads * channels), nan, dtype=value.dtype)
    rest = [address(value), 0, address(out), 0]
    getattr(kernels, f"forward_{dtypes}")(*shape, where, rest, general)
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    grads = [
        grad_value_memory(value, compute, fixed),
        torch.full_like(locations, nan),
        torch.full_like(weights, nan),
    ]
    wanted = [address(t) if need else 0 for t, need in zip(grads, needs, strict=True)]
    rest = [address(value), 0, address(cotangent), wanted[0]]
    sums = fixed_sums(kernels, grads[0]) if fixed else []
    arguments = [*shape, where, rest, wanted[1:], [t.data_ptr() for t in sums], general]
    getattr(kernels, f"backward_{dtypes}")(*arguments)
    grads[0] = grads[0].to(value.dtype)
    return [out, *grads]


def emulate_offsets(kernels, dtypes, inputs, cotangents, general=False, fixed=False):
    """As `emulate`, for the fused operator; to what gate.OFFSET_NAMES lists."""
    value, reference, offsets, logits = inputs.tensors
    batch, pixels, heads, channels = value.shape
    queries = offsets.shape[1]
    starts = cases.first_pixels(inputs.spatial_shapes, inputs.level_start_index)
    sizes = [batch, pixels, queries, heads, channels]
    levels = levels_of(inputs, starts, inputs.points_per_level)
    layout = [*offsets.stride()[:2], *logits.stride()[:2]]
    layout += [reference.shape[0], *reference.shape[2:], queries]
    shape = [sizes, levels, list(value.stride()[:3]), layout]
    where = [address(t) for t in (offsets, logits, reference, inputs.offset_scale)]
    nan, mask = float("nan"), inputs.padding_mask
    out = torch.full((batch, queries, heads * channels), nan, dtype=value.dtype)
    weights = torch.full_like(logits, nan)
    rest = [address(value), address(mask), address(out), address(weights)]
    getattr(kernels, f"offsets_forward_{dtypes}")(*shape, where, rest, general)
    compute = reference.dtype
    grad_value = grad_value_memory(value, compute, fixed)
    by_head = torch.full((batch, queries, heads, *reference.shape[2:]), nan, dtype=compute)
    grad_offsets, grad_logits = torch.full_like(offsets, nan), torch.full_like(logits, nan)
    grads = [address(t) for t in (grad_offsets, grad_logits, by_head, cotangents[1])]
    rest = [address(value), address(mask), address(cotangents[0]), address(grad_value)]
    sums = fixed_sums(kernels, grad_value) if fixed else []
    arguments = [*shape, where, rest, grads, [t.data_ptr() for t in sums], general]
    getattr(kernels, f"offsets_backward_{dtypes}")(*arguments)
    grad_reference = by_head.sum(2)
    if reference.shape[0] == 1:
        grad_reference = grad_reference.sum(0, keepdim=True)
    return [out, weights, grad_value.to(value.dtype), grad_reference, grad_offsets, grad_logits]


def check(kernels, case, dtypes, **how):
    gate.check(case, dtypes, lambda *args: emulate(kernels, dtypes, *args, **how))


def check_offsets(kernels, case, dtypes, **how):
    gate.check_offsets(case, dtypes, lambda *args: emulate_offsets(kernels, dtypes, *args, **how))


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
    torch.testing.assert_close(scaled / size, plain, rtol=1e-4, atol=1e-6)


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


MUTATIONS = {
    "corner off by one": (
        "bilinear.h",
        "const auto high_in = high < size",
        "const auto high_in = high + one < size",
    ),
    "half of the warp in the mask": (
        "cuda/warp.cuh",
        "kAllLanes = 0xffffffffu",
        "kAllLanes = 0x0000ffffu",
    ),
    "four sums that miss half of the group": (
        "cuda/warp.cuh",
        "for (int offset = 4; offset < LANES; offset *= 2)",
        "for (int offset = 8; offset < LANES; offset *= 2)",
    ),
    "a lane that finishes another corner's sum": (
        "cuda/warp.cuh",
        "(high ? b : a) +",
        "(high ? a : b) +",
    ),
    "a lane that leaves early": (
        "cuda/backward.cuh",
        "= GroupRow<group>(n, p.plan, p.mask, r0, lane);",
        "= GroupRow<group>(n, p.plan, p.mask, r0, lane);\n    if (lane == 31) return;",
    ),
    "dot products in the place of weights that are still read": (
        "cuda/backward.cuh",
        "lane % group::kLanes < 4) {",
        "lane % group::kLanes < 4) {\n            samples[(i + 1) % count].weight[0] = 0;",
    ),
    "samples read before they are written": (
        "cuda/forward.cuh",
        "__syncwarp();\n        if (has_channels)",
        "if (has_channels)",
    ),
    "gradient without the attention weight": (
        "cuda/points.cuh",
        "s.weight[i] = at.attention * f.wy[i / 2] * f.wx[i % 2];",
        "s.weight[i] = f.wy[i / 2] * f.wx[i % 2];",
    ),
    "points that take the place of earlier ones": (
        "cuda/points.cuh",
        "count += __popc(on);",
        "count = __popc(on);",
    ),
    "softmax without its sum": (
        "cuda/points.cuh",
        "exponential(logit - most_) * scale_",
        "exponential(logit - most_)",
    ),
    "the mean of one lane": (
        "cuda/points.cuh",
        "const acc mean = group_sum<kLanes>(mean_);",
        "const acc mean = mean_;",
    ),
    "a reference that all lanes add to": (
        "cuda/points.cuh",
        "if (lane_ == 0 && points_ > 0 && i < p_.width)",
        "if (points_ > 0 && i < p_.width)",
    ),
    "a mask of another image": (
        "cuda/rows.cuh",
        "mask(masks == nullptr ? nullptr : masks + index.b * n.pixels)",
        "mask(masks)",
    ),
    "one row's memory for all": (
        "cuda/backward.cuh",
        "+ lane / group::kLanes * n.points;",
        ";",
    ),
    "a row of another image": (
        "cuda/rows.cuh",
        "return (high + n) >> shift;",
        "return high >> shift;",
    ),
    "a last band as high as the others": (
        "cuda/rows.cuh",
        "const uint32_t lines = band < bands ? kBand : by_lines.divisor;",
        "const uint32_t lines = kBand;",
    ),
    "a last run as long as the others": (
        "cuda/rows.cuh",
        "const uint32_t length = run < order.runs ? kRun : order.by_rest.divisor;",
        "const uint32_t length = kRun;",
    ),
}


def run_with(mistake, folder, script):
    """Runs a script whose `kernels` are compiled from a copy of the source with a mistake."""
    file, right, wrong = mistake
    source = folder / "csrc"
    shutil.copytree(_extension.source_dir(), source)
    text = (source / file).read_text()
    assert text.count(right) == 1
    (source / file).write_text(text.replace(right, wrong))
    # In a process of its own: a second module of the same name would share the first one's state.
    prepare = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "from pathlib import Path\n"
        "import test_emulated_kernels as t\n"
        "from vitadapter_ops.testing import cases\n"
        "kernels = t.build(Path(sys.argv[3]), Path(sys.argv[4]), only_fp32=True)\n"
    )
    arguments = [str(HERE), str(ROOT), str(folder), str(source)]
    return subprocess.run(
        [sys.executable, "-c", prepare + script, *arguments], capture_output=True, text=True
    )


# Times its bound: correct sums miss theirs by less, wrong ones by far more.
NEAR = 4


def first_error(kernels):
    """What some checks in fp32 say of kernels first, or None; not of an error near its bound."""
    located = (cases.SMALL[3], cases.SMALL[7], ENCODER)
    # With 16 channels several rows for each warp.
    offsets = [replace(case, channels=d) for case in cases.OFFSETS[:8] for d in (case.channels, 16)]
    checks = [(check, case) for case in located] + [(check_offsets, case) for case in offsets]
    for one, case in checks:
        try:
            one(kernels, case, "fp32")
        except Inaccurate as error:
            if error.times > NEAR:
                return f"{case}: {error}"
        except (AssertionError, RuntimeError) as error:
            return f"{case}: {error}"
    return None


def test_no_mistake_is_seen_where_there_is_none(kernels):
    assert first_error(kernels) is None


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_in_the_kernels_is_caught(name, tmp_path):
    done = run_with(MUTATIONS[name], tmp_path, "print('caught:', t.first_error(kernels))\n")
    # What is read before it is written is NaN, and as a pixel it leads out of the process's memory,
    # as do rows that do not exist.
    assert done.returncode in (0, -signal.SIGSEGV, -signal.SIGABRT), done.stderr
    assert done.returncode != 0 or "caught:" in done.stdout
    assert "caught: None" not in done.stdout


# 16 bytes less for each block than its warps use.
TOO_SMALL = {
    "forward": (
        "cuda/launch.cuh",
        "Stage<value_t, CHANNELS>::kWarpBytes}",
        "Stage<value_t, CHANNELS>::kWarpBytes - 16}",
    ),
    "backward": ("cuda/launch.cuh", "kWarp * warp_bytes}", "kWarp * warp_bytes - 16}"),
}
# Rows for all warps of a block, with all points on the map.
FULL = cases.Case("full", ((5, 7), (3, 4)), queries=13, points=40, spread=0)
FULL_OFFSETS = cases.OffsetCase(
    "full", FULL.shapes, (40, 40), queries=13, spread=0.1, grids=FULL.shapes
)


def errors_of_full_blocks(kernels):
    """What the emulation says of each operator and kernel when blocks use all of their memory."""
    for channels, general in ((12, 0), (16, 0), (32, 0), (64, 0), (128, 0), (20, 0), (32, 1)):
        for case, run in ((FULL, emulate), (FULL_OFFSETS, emulate_offsets)):
            inputs = replace(case, channels=channels).inputs().to(torch.float32)
            cotangent = torch.randn(case.batch, case.queries, case.heads * channels)
            if run is emulate_offsets:
                cotangent = [cotangent, torch.randn(inputs.attention_logits.shape)]
            try:
                run(kernels, "fp32", inputs, cotangent, general)
                yield None
            except RuntimeError as error:
                yield str(error)


def test_full_blocks_stay_within_their_shared_memory(kernels):
    assert set(errors_of_full_blocks(kernels)) == {None}


@pytest.mark.parametrize("direction", TOO_SMALL)
def test_a_launch_with_too_little_shared_memory_is_caught(kernels, direction, tmp_path):
    script = "print(*t.errors_of_full_blocks(kernels), sep='\\n')"
    done = run_with(TOO_SMALL[direction], tmp_path, script)
    assert done.returncode == 0, done.stderr
    errors = done.stdout.splitlines()
    assert len(errors) == 7 * 2
    for error in errors:
        assert re.fullmatch(r"a kernel wrote to byte \d+ of \d+ bytes of shared memory", error)
