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


def levels_of(inputs):
    pairs = zip(inputs.spatial_shapes, inputs.starts, strict=True)
    return [number for (height, width), start in pairs for number in (height, width, start)]


def emulate(kernels, dtypes, inputs, cotangent, packed, needs=(True, True, True)):
    """Output and gradients, as the launchers of csrc/ would compute them."""
    value, locations, weights = inputs.tensors
    batch, pixels, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    sizes = [batch, pixels, queries, heads, channels, points]
    levels, strides = levels_of(inputs), list(value.stride()[:3])
    nan = float("nan")
    out = torch.full((batch, queries, heads * channels), nan, dtype=value.dtype)
    pointers = [t.data_ptr() for t in (value, locations, weights, out)]
    getattr(kernels, f"forward_{dtypes}")(sizes, levels, strides, pointers, packed)
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    grads = [
        torch.zeros(batch, pixels, heads, channels, dtype=compute),
        torch.full_like(locations, nan),
        torch.full_like(weights, nan),
    ]
    inputs_of_backward = (cotangent, value, locations, weights)
    pointers = [t.data_ptr() for t in inputs_of_backward]
    pointers += [t.data_ptr() if need else 0 for t, need in zip(grads, needs, strict=True)]
    getattr(kernels, f"backward_{dtypes}")(sizes, levels, strides, pointers)
    grads[0] = grads[0].to(value.dtype)
    return [out, *grads]


def check(kernels, case, dtypes, packed=False):
    gate.check(case, dtypes, lambda *args: emulate(kernels, dtypes, *args, packed))


@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(kernels, case, dtypes):
    check(kernels, case, dtypes)


@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("channels", [8, 16, 24, 64])
def test_packed_loads_equal_the_reference(kernels, channels, dtypes):
    check(kernels, cases.Case("packed", ((5, 7), (3, 4)), channels=channels), dtypes, packed=True)


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
        "const int64_t m = row % n.heads",
        "if (lane == 31) return;\n    const int64_t m = row % n.heads",
    ),
    "gradient without the attention weight": (
        "cuda/backward.cuh",
        "const acc w = attention * f.wy[k / 2] * f.wx[k % 2];",
        "const acc w = f.wy[k / 2] * f.wx[k % 2];",
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
        "except (AssertionError, RuntimeError) as error:\n"
        "    print('caught:', error)\n"
    )
    arguments = [str(HERE), str(HERE.parent), str(tmp_path), str(source)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("caught:"), done.stdout
