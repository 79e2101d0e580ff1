# SPDX-License-Identifier: Apache-2.0
"""What the native libraries are made of: sources and flags, once, for setup.py and for JIT builds.

setup.py runs this file by path, so it imports nothing of the package.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

# The pairs of csrc/dtypes.h; fp64 has few kernels, and so one unit.
_PAIRS = ("fp32", "fp16", "bf16", "fp16_points_fp32", "bf16_points_fp32")

SOURCES: dict[str, list[str]] = {
    "cpu": [
        "cpu/ms_deform_attn.cpp",
        "cpu/isa.cpp",
        "cpu/kernels_baseline.cpp",
        "cpu/kernels_avx2.cpp",
        "cpu/kernels_avx512.cpp",
    ],
    # In the order in which a build starts them: what takes longest first. The last one has torch's
    # headers and no kernel, the others are units of kernels (csrc/cuda/launchers.h).
    "cuda": [
        *(f"cuda/backward_{pair}.cu" for pair in _PAIRS),
        *(f"cuda/forward_{pair}.cu" for pair in _PAIRS),
        "cuda/fp64.cu",
        "cuda/ms_deform_attn.cpp",
    ],
}

# torch 2.11's stable ABI: the library runs on that release and on every later one.
_DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]

# No -std: torch's build helper passes the one its headers need (17 or 20); the sources are C++17.
CXX_FLAGS = [
    "-O3",
    "-g0",  # setuptools passes the -g of Python's own build: 18 MB of it
    "-ffp-contract=off",  # fused where the source says so: the same bits from every compiler
    "-fvisibility=hidden",
    *_DEFINES,
]
# Of the C++ files of the CUDA library.
CUDA_CXX_FLAGS = [*CXX_FLAGS, "-DUSE_CUDA"]
NVCC_FLAGS = [
    "-O3",
    "-Xcompiler=-fvisibility=hidden",
    "-Xfatbin=-compress-all",  # by default only large files are: 3 MB in place of 16
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "--extended-lambda",
    "-DUSE_CUDA",
    *_DEFINES,
]


def nvcc_version(cuda_home: str | None) -> tuple[int, int] | None:
    """(major, minor) of the CUDA compiler under `cuda_home`, or None when there is none."""
    if cuda_home is None:
        return None
    try:
        text = subprocess.run(
            [str(Path(cuda_home) / "bin" / "nvcc"), "--version"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def cuda_library_dirs(cuda_home: str) -> list[str]:
    """Where the CUDA runtime's libraries are."""
    return _toolkit_folders(cuda_home, ("lib64", "lib", "targets/*/lib"), "libcudart*")


def cuda_include_dirs(cuda_home: str) -> list[str]:
    """Where the CUDA runtime's headers are; nvcc finds them itself, the C++ compiler does not."""
    return _toolkit_folders(cuda_home, ("include", "targets/*/include"), "cuda_runtime.h")


def _toolkit_folders(cuda_home: str, folders: tuple[str, ...], file: str) -> list[str]:
    """The folders of the CUDA toolkit that hold a file.

    Asked of nvcc itself: what torch takes for CUDA_HOME is only the folder of an nvcc on the PATH,
    which may be a wrapper or a link to a toolkit elsewhere.
    """
    text = subprocess.run(
        [str(Path(cuda_home) / "bin" / "nvcc"), "--dryrun", "-c", "unused.cu"],
        capture_output=True,
        text=True,
    ).stderr
    match = re.search(r"_HERE_=(\S+)", text)
    roots = [*([Path(match[1]).parent] if match else []), Path(cuda_home)]
    found = [folder for root in roots for pattern in folders for folder in root.glob(pattern)]
    return [str(folder) for folder in found if any(folder.glob(file))]


def why_no_cuda_build(torch_cuda: str | None, cuda_home: str | None) -> str | None:
    """None when the CUDA library can be built for this torch, or else the reason why not."""
    if torch_cuda is None:
        return "this torch is a CPU build"
    nvcc = nvcc_version(cuda_home)
    if nvcc is None:
        return "no CUDA compiler (nvcc) was found; set CUDA_HOME"
    if nvcc[0] != int(torch_cuda.split(".")[0]):
        return f"nvcc is CUDA {nvcc[0]}.{nvcc[1]}, torch was built with CUDA {torch_cuda}"
    return None


def default_arch_list(nvcc: tuple[int, int]) -> str:
    """TORCH_CUDA_ARCH_LIST for a library that runs on every GPU from Ampere on.

    PTX, which a driver compiles for newer GPUs, of the newest architecture and of 9.0: what comes
    between two others (11.0 after 10.0 and before 12.0) takes PTX of an older one only.
    """
    archs = ["8.0", "8.6", "8.9", "9.0+PTX"]
    if nvcc >= (12, 8):
        archs += ["10.0", "12.0+PTX"]
    return ";".join(archs)


def archs_of(gencode: Iterable[str]) -> list[str]:
    """What nvcc makes for -gencode flags: "sm_90" is machine code, "compute_90" is PTX."""
    return [code for flag in gencode for code in re.findall(r"\bcode=(\w+)", flag)]


def archs_flag(archs: Iterable[str]) -> str:
    """The flag of the C++ compiler by which a library knows its architectures."""
    return f"-DVITADAPTER_CUDA_ARCHS={','.join(archs)}"


def why_no_code(archs: Iterable[str], gpus: Mapping[str, tuple[int, int]]) -> str | None:
    """None when a library of these architectures runs on one of the GPUs, or else both by name.

    Args:
        archs: as archs_of returns them; none: not known, which is no reason.
        gpus: compute capability of each, by name.
    """
    codes = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch) for arch in archs]
    known = [code.groups() for code in codes if code is not None]
    if not known or not gpus:
        return None

    def runs(code: tuple[str, ...], capability: tuple[int, int]) -> bool:
        kind, *numbers, variant = code
        own = (int(numbers[0]), int(numbers[1]))
        if variant == "a":
            return capability == own
        if kind == "sm" or variant == "f":
            return capability[0] == own[0] and capability[1] >= own[1]
        return capability >= own

    if any(runs(code, capability) for code in known for capability in gpus.values()):
        return None
    have = ", ".join(
        f"{'PTX ' * (kind == 'compute')}{major}.{minor}{variant}"
        for kind, major, minor, variant in known
    )
    need = ", ".join(f"{major}.{minor} ({name})" for name, (major, minor) in gpus.items())
    return f"it has code for compute capability {have}, the GPU here is {need}"
