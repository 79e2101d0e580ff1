# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel compiles without a warning, a spill or a stack frame, to the code meant.

Needs nvcc, no GPU.
"""

import collections
import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils import cpp_extension

from once import once
from vitadapter_ops import _build, _extension

NVCC = shutil.which("nvcc") or (
    str(Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc") if cpp_extension.CUDA_HOME else None
)


pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")

# Registers that the launch bounds leave a thread: kForwardBlocks, kBackwardBlocks of csrc/cuda.
REGISTERS = {
    "forward": {"special": 80, "general": 128},
    "backward": {"special": 128, "double": 255},
}


class Compiled(NamedTuple):
    """The kernels of one architecture."""

    arch: str
    pairs: int  # of dtypes; the sixth is fp64 with itself, which has no specialised kernels
    report: str  # of ptxas
    objects: tuple[Path, ...]  # of the units


# Two units of each direction, for one architecture: a sixth of all that is compiled.
QUICK = (
    "backward_fp32",
    "backward_bf16_points_fp32",
    "forward_fp32",
    "forward_bf16_points_fp32",
)


@pytest.fixture(
    scope="module",
    params=[
        "sm_90-quick",
        pytest.param("sm_80", marks=pytest.mark.exhaustive),
        pytest.param("sm_90", marks=pytest.mark.exhaustive),
    ],
)
def compiled(request, tmp_path_factory):
    """Of each unit by itself: no header of torch is in reach."""
    arch, _, quick = request.param.partition("-")
    command = [NVCC, "-c", "-std=c++17", f"-arch={arch}", "-Xcompiler", "-fPIC"]
    command += ["-Werror", "all-warnings", "-Xptxas", "-v", *_build.NVCC_FLAGS]
    sources = [_extension.source_dir() / file for file in _build.SOURCES["cuda"]]
    units = [source for source in sources if source.suffix == ".cu"]
    if quick:
        units = [unit for unit in units if unit.stem in QUICK]
        assert len(units) == len(QUICK)

    def build(folder):
        def compile(unit):
            output = str(folder / f"{unit.stem}.o")
            return subprocess.run(
                [*command, str(unit), "-o", output], capture_output=True, text=True
            )

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            done = list(pool.map(compile, units))
        for one in done:
            assert one.returncode == 0, one.stderr
        (folder / "report").write_text("".join(one.stderr for one in done))

    folder = once(tmp_path_factory, f"cuda-{request.param}", build)
    pairs = 2 if quick else 6
    return Compiled(arch, pairs, (folder / "report").read_text(), tuple(sorted(folder.glob("*.o"))))


def test_what_torch_calls_compiles_without_warnings(tmp_path):
    (source,) = (file for file in _build.SOURCES["cuda"] if file.endswith(".cpp"))
    # The headers of torch and of CUDA are not ours to keep free of warnings.
    include = [
        *cpp_extension.include_paths(),
        *_build.cuda_include_dirs(str(Path(NVCC).parents[1])),
    ]
    command = [os.environ.get("CXX", "c++"), "-c", "-std=c++17", "-fPIC", "-Wall", "-Wextra"]
    command += ["-Werror", *_build.CUDA_CXX_FLAGS, _build.archs_flag(["sm_90"])]
    command += [flag for path in include for flag in ("-isystem", path)]
    command += [str(_extension.source_dir() / source), "-o", str(tmp_path / "torch.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def main_kernels(pairs):
    """Each pair of dtypes with 7 numbers of channels and in general; 2 operators, 2 directions."""
    return 4 * (7 * min(pairs, 5) + pairs)


def test_every_kernel_is_compiled_once(compiled):
    kernels = collections.Counter(re.findall(r"Compiling entry function '(\S+)'", compiled.report))
    assert [name for name, times in kernels.items() if times > 1] == []
    # One kernel to measure for each pair, and in fp64's unit one to finish.
    finish = int(compiled.pairs == 6)
    assert len(kernels) >= main_kernels(compiled.pairs) + compiled.pairs + finish


def test_compiles_without_warnings_spills_or_stack(compiled):
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        compiled.report,
    )
    assert len(frames) >= main_kernels(compiled.pairs)
    assert set(frames) == {("0", "0", "0")}


def test_registers_stay_within_the_plan(compiled):
    used = re.findall(
        r"Compiling entry function '\S*ms_deform_attn_(forward|backward)_kernelI(\S+?)' for"
        r"[\s\S]*?Used (\d+) registers",
        compiled.report,
    )
    assert len(used) >= main_kernels(compiled.pairs)
    for direction, arguments, registers in used:
        plan = REGISTERS[direction]
        if direction == "forward":
            bound = plan["general" if "Li0E" in arguments else "special"]
        else:
            bound = plan["double" if arguments.startswith("d") else "special"]
        assert int(registers) <= bound, (direction, arguments)


@functools.cache
def sass(compiled):
    """The machine code of each kernel, by its mangled name."""
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="needs triton's disassembler")
    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    text = "".join(
        subprocess.run(
            [str(tool), "-sass", str(path)], capture_output=True, text=True, check=True
        ).stdout
        for path in compiled.objects
    )
    parts = re.split(r"Function : (\S+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def loops(code):
    """The instructions of each loop, inner ones again as a part of outer ones."""
    instructions = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", code)
    ]
    for address, text in instructions:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            start = int(target[1], 16)
            yield [text for at, text in instructions if start <= at <= address]


# Of a lane for two points. fp32, 4 channels: 32 multiply-adds, 8 loads and their addresses, 4 loads
# from shared memory. bf16, 8 channels: twice the multiply-adds, and as many conversions.
LONGEST = {"f": 64, "13__nv_bfloat16": 164}


def test_the_loop_over_points_has_no_more_instructions_than_it_needs(compiled):
    for value, most in LONGEST.items():
        name = f"ms_deform_attn_forward_kernelI{value}NS_7LocatedIfEELi32E"
        (code,) = [code for kernel, code in sass(compiled).items() if name in kernel]
        lengths = [
            len(loop)
            for loop in loops(code)
            if sum("LDG.E.128" in instruction for instruction in loop) == 8
        ]
        assert 0 < min(lengths) <= most, (value, lengths)


def test_machine_code_moves_sixteen_bytes_and_adds_vectors(compiled):
    kernels = {name: code for name, code in sass(compiled).items() if "ms_deform_attn_" in name}
    assert not any(re.search(r"\b(LDL|STL)\b", code) for code in kernels.values())
    checked = 0
    for name, code in kernels.items():
        # Of fp32 and bf16, 32 channels.
        if not re.search(r"kernelI(f|13__nv_bfloat16)NS_7Located", name) or "Li32E" not in name:
            continue
        checked += 1
        if "forward" in name:
            # Four corners of two points, and of the odd one.
            assert len(re.findall(r"LDG\.E\.128", code)) >= 12
            assert re.search(r"STG\.E\.128", code)
        else:
            assert len(re.findall(r"LDG\.E\.128", code)) >= 4
            vectors = len(re.findall(r"REDG?\.E\.ADD\.F32x4", code))
            assert (vectors >= 4) == (compiled.arch == "sm_90")
            # The deterministic way.
            assert re.search(r"REDG?\.E\.ADD\.64", code)
    assert checked == 2 * min(compiled.pairs, 3)
