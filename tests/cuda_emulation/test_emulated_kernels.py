# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run on the host by a small emulation, equal the fp64 reference.

The kernels' source is compiled as it is. That the emulation can fail is tested too: changed copies
of the source, each with one mistake, must be caught.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cases
import gate
from vitadapter_ops import _extension

HERE = Path(__file__).parent
CXX = os.environ.get("CXX", "c++")
CASES = [case for case in cases.SMALL if case.channels <= 128]


def build(folder, source):
    """Compiles the emulated kernels from a copy of csrc and imports them."""
    import sysconfig

    import pybind11

    output = folder / f"emulated_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [pybind11.get_include(), sysconfig.get_path("include"), str(source)]
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
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


def levels_of(inputs, starts, points):
    rows = zip(inputs.spatial_shapes, starts, points, strict=True)
    return [number for size, start, count in rows for number in (*size, start, count)]


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def emulate(kernels, dtypes, inputs, cotangent, packed, needs=(True, True, True)):
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
    getattr(kernels, f"forward_{dtypes}")(*shape, where, rest, packed)
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    grads = [
        torch.zeros(batch, pixels, heads, channels, dtype=compute),
        torch.full_like(locations, nan),
        torch.full_like(weights, nan),
    ]
    wanted = [address(t) if need else 0 for t, need in zip(grads, needs, strict=True)]
    rest = [address(value), 0, address(cotangent), wanted[0]]
    getattr(kernels, f"backward_{dtypes}")(*shape, where, rest, wanted[1:])
    grads[0] = grads[0].to(value.dtype)
    return [out, *grads]


def emulate_offsets(kernels, dtypes, inputs, cotangents, packed=False):
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
    getattr(kernels, f"offsets_forward_{dtypes}")(*shape, where, rest, packed)
    compute = reference.dtype
    grad_value = torch.zeros(batch, pixels, heads, channels, dtype=compute)
    by_head = torch.full((batch, queries, heads, *reference.shape[2:]), nan, dtype=compute)
    grad_offsets, grad_logits = torch.full_like(offsets, nan), torch.full_like(logits, nan)
    grads = [address(t) for t in (grad_offsets, grad_logits, by_head, cotangents[1])]
    rest = [address(value), address(mask), address(cotangents[0]), address(grad_value)]
    getattr(kernels, f"offsets_backward_{dtypes}")(*shape, where, rest, grads)
    grad_reference = by_head.sum(2)
    if reference.shape[0] == 1:
        grad_reference = grad_reference.sum(0, keepdim=True)
    return [out, weights, grad_value.to(value.dtype), grad_reference, grad_offsets, grad_logits]


def check(kernels, case, dtypes, packed=False):
    gate.check(case, dtypes, lambda *args: emulate(kernels, dtypes, *args, packed))


def check_offsets(kernels, case, dtypes, packed=False):
    gate.check_offsets(case, dtypes, lambda *args: emulate_offsets(kernels, dtypes, *args, packed))


@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(kernels, case, dtypes):
    check(kernels, case, dtypes)


@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("channels", [8, 16, 24, 64])
def test_packed_loads_equal_the_reference(kernels, channels, dtypes):
    check(kernels, cases.Case("packed", ((5, 7), (3, 4)), channels=channels), dtypes, packed=True)


@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("case", cases.OFFSETS, ids=str)
def test_fused_kernels_equal_the_reference(kernels, case, dtypes):
    check_offsets(kernels, case, dtypes)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_fused_kernels_with_packed_loads_equal_the_reference(kernels, dtypes):
    case = next(case for case in cases.OFFSETS if case.name == "unequal-points")
    check_offsets(kernels, case, dtypes, packed=True)


def test_gradients_that_are_not_needed_are_not_written(kernels):
    case = cases.SMALL[3]
    inputs = case.inputs().to(torch.float32)
    cotangent = torch.randn(case.batch, case.queries, case.heads * case.channels)
    everything = emulate(kernels, "fp32", inputs, cotangent, False)[1:]
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        got = emulate(kernels, "fp32", inputs, cotangent, False, needs)[1:]
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
    out, grad_value, grad_locations, grad_weights = emulate(
        kernels, "fp32", inputs, cotangent, False
    )
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
        "cuda/backward.cuh",
        "__shfl_xor_sync(0xffffffffu",
        "__shfl_xor_sync(0x0000ffffu",
    ),
    "reduction over half of the warp": (
        "cuda/backward.cuh",
        "int offset = kWarp / 2",
        "int offset = kWarp / 4",
    ),
    "a lane that leaves early": (
        "cuda/backward.cuh",
        "const RowIndex index(n, r);",
        "if (lane == 31) return;\n    const RowIndex index(n, r);",
    ),
    "gradient without the attention weight": (
        "cuda/backward.cuh",
        "const acc w = attention * f.wy[i / 2] * f.wx[i % 2];",
        "const acc w = f.wy[i / 2] * f.wx[i % 2];",
    ),
    "softmax without its sum": (
        "cuda/points.cuh",
        "exponential(to_acc(logits_[k]) - most_) * scale_",
        "exponential(to_acc(logits_[k]) - most_)",
    ),
    "the mean of a lane that has none": (
        "cuda/points.cuh",
        "__shfl_sync(0xffffffffu, mean_, 0)",
        "__shfl_sync(0xffffffffu, mean_, 1)",
    ),
    "a level that keeps another's reference": (
        "cuda/points.cuh",
        "if (l > 0 && p_.reference_l == 0) return;",
        "if (l > 0) return;",
    ),
    "a mask of another image": (
        "cuda/backward.cuh",
        "p.mask == nullptr ? nullptr : p.mask + b * n.pixels;",
        "p.mask;",
    ),
    "one warp's memory for all": (
        "cuda/backward.cuh",
        "block_memory<acc>() + threadIdx.x / kWarp * n.points",
        "block_memory<acc>()",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_in_the_kernels_is_caught(kernels, name, tmp_path):
    file, right, wrong = MUTATIONS[name]
    source = tmp_path / "csrc"
    shutil.copytree(_extension.source_dir(), source)
    text = (source / file).read_text()
    assert text.count(right) == 1
    (source / file).write_text(text.replace(right, wrong))
    # In a process of its own : a second module of the same name would share the first one's state.
    script = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "from pathlib import Path\n"
        "import cases, test_emulated_kernels as t\n"
        "kernels = t.build(Path(sys.argv[3]), Path(sys.argv[4]))\n"
        "try:\n"
        "    t.check(kernels, cases.SMALL[5], 'fp32')\n"
        "    t.check_offsets(kernels, cases.OFFSETS[3], 'fp32')\n"
        "except (AssertionError, RuntimeError) as error:\n"
        "    print('caught:', error)\n"
    )
    arguments = [str(HERE), str(HERE.parent), str(tmp_path), str(source)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("caught:"), done.stdout
