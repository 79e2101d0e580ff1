# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of its kernels for each architecture. Needs triton, no GPU.

The kernels are compiled from the signature, constants and options that a launch would use.
"""

import dataclasses
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from optional import sweep

triton = pytest.importorskip("triton")

from vitadapter_ops.triton import launch, tuning  # noqa: E402

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter compiles nothing")

ARCHITECTURES = (80, 90, 100)
VALUE_LOCATIONS_WEIGHTS = (True, False, True, True)
EVERYTHING = (True, True, True, True)
TYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.float32),
}


def configuration(dtype="fp32", channels=32, needs=None, **changes):
    value, points = TYPES[dtype]
    lowest = channels & -channels
    fields = {
        "needs": needs,
        "dtype": value,
        "points_dtype": points,
        "heads": 8,
        "channels": channels,
        "points": (4, 4, 4, 4),
        "vec": min(lowest, 16 // value.itemsize),
        "wide": False,
    }
    return launch.Configuration(**{**fields, **changes})


@dataclass
class Code:
    """A compiled kernel, as text."""

    ptx: str
    sass: str
    registers: int
    local: int

    def count(self, pattern):
        return len(re.findall(pattern, self.ptx))


def compiled(arch, tmp_path, *arguments, **keywords):
    source = launch.source(configuration(*arguments, **keywords), "cuda", arch, 32)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    kernel = source.compile(target)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(tools / "cuobjdump"), "-res-usage", "-sass", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = re.search(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    assert usage, done.stdout
    return Code(kernel.asm["ptx"], done.stdout, *map(int, usage.groups()))


def assert_nothing_spills(code, registers):
    # A frame of a few bytes that nothing is kept in does occur on sm_100.
    assert not re.search(r"\b(?:LDL|STL)\b", code.sass)
    assert code.local == 0
    assert code.count(r"\b(?:ld|st)\.local") == 0
    assert code.registers <= registers


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("arch", sweep(ARCHITECTURES, "90"))
def test_forward_reads_corners_by_16_bytes(arch, dtype, tmp_path):
    unroll = launch.source(configuration(dtype), "cuda", arch, 32).constants["LAYOUT"].unroll
    code = compiled(arch, tmp_path, dtype)
    # 4 levels, 4 corners.
    assert code.count(r"ld\.global\.v4\.b32") == 4 * unroll * 4
    # Both coordinates of a location by one load of 8 or 4 bytes, and its weight.
    assert code.count(r"ld\.global(?!\.v4)") == 4 * unroll * 2
    assert code.count(r"st\.global\.v4\.b32") == 1
    assert code.count(r"bar\.sync|shared") == 0
    # 48: 42 warps of 64 that a multiprocessor of sm_90 has room for.
    assert_nothing_spills(code, 48)


@pytest.mark.parametrize("channels", [12, 24, 40, 64, 128])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_widths_read_no_channel_twice_and_none_too_many(dtype, channels, tmp_path):
    source = launch.source(configuration(dtype, channels), "cuda", 90, 32)
    layout = source.constants["LAYOUT"]
    assert layout.width * layout.chunks == channels
    code = compiled(90, tmp_path, dtype, channels)
    wide = (
        r"ld\.global\.v4\.b32"
        if layout.vec * TYPES[dtype][0].itemsize == 16
        else (r"ld\.global\.v2\.b32")
    )
    assert code.count(wide) == 4 * layout.unroll * 4 * layout.chunks
    assert code.count(r"bar\.sync|shared") == 0
    assert_nothing_spills(code, 128)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("arch", [90, 100])
def test_backward_adds_by_vector_reductions(arch, dtype, tmp_path):
    code = compiled(arch, tmp_path, dtype, needs=VALUE_LOCATIONS_WEIGHTS)
    # 4 levels, a point at a time, 4 corners. Some versions of triton write an atom without a use of
    # its result, which becomes the same instruction.
    assert code.count(r"(?:red|atom)\.global\.gpu\.relaxed\.add\.v4\.f32") == 4 * 4
    assert code.sass.count("REDG.E.ADD.F32x4") == 4 * 4
    assert "ATOMG" not in code.sass
    assert code.count(r"\b(?:red|atom)\.global") == 4 * 4
    assert code.count(r"bar\.sync|shared") == 0
    assert_nothing_spills(code, 80)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_backward_without_vector_reductions_adds_neighbouring_channels(dtype, tmp_path):
    source = launch.source(configuration(dtype, needs=VALUE_LOCATIONS_WEIGHTS), "cuda", 80, 32)
    layout = source.constants["LAYOUT"]
    assert (layout.vec, layout.width) == (1, 32)
    code = compiled(80, tmp_path, dtype, needs=VALUE_LOCATIONS_WEIGHTS)
    assert code.count(r"(?:red|atom)\.global\.gpu\.relaxed\.add\.f32") == 4 * 4
    assert code.count(r"\b(?:red|atom)\.global") == 4 * 4
    assert code.count(r"bar\.sync|shared") == 0
    assert_nothing_spills(code, 80)


@pytest.mark.parametrize(
    ("argument", "needs", "helper"),
    [("points", None, "load_pair"), ("grad_points", VALUE_LOCATIONS_WEIGHTS, "store_pair")],
)
@pytest.mark.parametrize("kind", ["*i16", "*i32", "*fp8e5"])
def test_points_of_an_unknown_dtype_do_not_compile(argument, needs, helper, kind):
    source = launch.source(configuration(needs=needs), "cuda", 90, 32)
    source = dataclasses.replace(source, signature={**source.signature, argument: kind})
    with pytest.raises(triton.CompilationError) as raised:
        source.compile(triton.backends.compiler.GPUTarget("cuda", 90, 32))
    causes = [str(raised.value)]
    error = raised.value
    while error := error.__cause__:
        causes.append(str(error))
    assert f"{helper}: expected fp64, fp32, fp16 or bf16" in causes[-1]


def test_fp64_compiles(tmp_path):
    for needs in (None, VALUE_LOCATIONS_WEIGHTS):
        code = compiled(90, tmp_path, "fp64", needs=needs)
        assert_nothing_spills(code, 128)


def test_only_what_is_needed_is_computed(tmp_path):
    value = compiled(90, tmp_path, needs=(True, False, False, False))
    # The gradient of the output is all that is read of channels.
    assert value.count(r"ld\.global\.v4\.b32") == 1
    assert value.count(r"shfl") == 0
    points = compiled(90, tmp_path, needs=(False, False, True, True))
    assert points.count(r"\b(?:red|atom)\.global") == 0
    assert points.count(r"st\.global") == 4 * 2


FUSED = {"reference": (0, 1, 0), "points_dtype": torch.bfloat16}


@pytest.mark.parametrize("arch", sweep(ARCHITECTURES, "90"))
def test_fused_forward(arch, tmp_path):
    unroll = (
        launch.source(configuration("bf16", **FUSED), "cuda", arch, 32).constants["LAYOUT"].unroll
    )
    code = compiled(arch, tmp_path, "bf16", **FUSED)
    assert code.count(r"ld\.global\.v4\.b32") == 4 * unroll * 4
    # The softmax is computed by the threads that sample: nothing is carried between warps.
    assert code.count(r"bar\.sync|shared") == 0
    assert_nothing_spills(code, 64)


@pytest.mark.parametrize("arch", sweep(ARCHITECTURES, "90"))
def test_fused_backward(arch, tmp_path):
    changes = {"reference": (1, 4, 1), "scaled": True, "padded": True, "softmax": True}
    for needs in (VALUE_LOCATIONS_WEIGHTS, EVERYTHING):
        code = compiled(arch, tmp_path, "bf16", needs=needs, **changes)
        # A row's gradients of logits leave together, once, through shared memory.
        assert code.count(r"bar\.sync") <= 2
        assert_nothing_spills(code, 96)


def test_wide_offsets_compile(tmp_path):
    for needs in (None, VALUE_LOCATIONS_WEIGHTS):
        code = compiled(90, tmp_path, needs=needs, wide=True)
        assert code.count(r"ld\.global\.v4\.b32") > 16
        assert_nothing_spills(code, 96)


@pytest.mark.parametrize("needs", [None, VALUE_LOCATIONS_WEIGHTS], ids=["forward", "backward"])
@pytest.mark.parametrize(("arch", "warp"), [("gfx942", 64), ("gfx1100", 32)])
def test_compiles_for_amd(arch, warp, needs):
    if "amd" not in triton.backends.backends:
        pytest.skip("this triton has no AMD backend")
    source = launch.source(configuration(needs=needs), "hip", arch, warp)
    kernel = source.compile(triton.backends.compiler.GPUTarget("hip", arch, warp))
    if warp == 64:
        assert "scratch_store" not in kernel.asm["amdgcn"]
    assert re.search(r"(?:global|buffer)_load_(?:dwordx4|b128)", kernel.asm["amdgcn"]) or needs
    if needs:
        assert re.search(r"(?:global|buffer)_atomic_\w+", kernel.asm["amdgcn"])


def test_lanes_cover_all_channels_and_pad_few():
    for groups in range(1, 1000):
        lanes, chunks = tuning.split(groups, 8)
        assert lanes & (lanes - 1) == 0
        assert lanes * chunks >= groups
        assert chunks <= 8
        # A power of two, as others pad to, wastes up to half.
        assert lanes * chunks <= 1 << (groups - 1).bit_length()


def test_the_most_specific_row_of_the_table_wins(monkeypatch):
    forward, backward = tuning.Knobs(2), tuning.Knobs(8)
    monkeypatch.setitem(tuning.TABLE, ("sm_90", "bf16", 24), (forward, backward))
    assert tuning.knobs("sm_90", "bf16", 24) == (forward, backward)
    assert tuning.knobs("sm_90", "bf16", 32) == tuning.TABLE["sm_90", None, None]
    assert tuning.knobs("gfx942", "fp32", 32) == tuning.TABLE[None, None, None]
    assert list(tuning.TABLE)[-2:] == [(None, None, None), ("sm_90", "bf16", 24)]
    assert tuning.family("cuda", 103) == "sm_100"
    assert tuning.family("cuda", 86) == "sm_80"
