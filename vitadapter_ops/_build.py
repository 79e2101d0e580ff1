# SPDX-License-Identifier: Apache-2.0
"""What the native libraries are made of: sources and flags, once, for setup.py and for JIT builds.

setup.py runs this file by path, so it imports nothing of the package.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SOURCES: dict[str, list[str]] = {
    "cpu": [
        "cpu/ms_deform_attn.cpp",
        "cpu/isa.cpp",
        "cpu/kernels_baseline.cpp",
        "cpu/kernels_avx2.cpp",
        "cpu/kernels_avx512.cpp",
    ],
    "cuda": ["cuda/ms_deform_attn.cu"],
}

# torch 2.11's stable ABI: the library runs on that release and on every later one.
_DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]

# No -std: torch's build helper passes the one its headers need (17 or 20); the sources are C++17.
CXX_FLAGS = [
    "-O3",
    "-ffp-contract=off",  # fused where the source says so: the same bits from every compiler
    "-fvisibility=hidden",
    *_DEFINES,
]
NVCC_FLAGS = [
    "-O3",
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
    """Where the CUDA runtime's libraries are.

    Asked of nvcc itself: what torch takes for CUDA_HOME is only the folder of an nvcc on the PATH,
    which may be a wrapper or a link to a toolkit elsewhere.
    """
    text = subprocess.run(
        [str(Path(cuda_home) / "bin" / "nvcc"), "--dryrun", "-c", "unused.cu"],
        capture_output=True,
        text=True,
    ).stderr
    match = re.search(r"_HERE_=(\S+)", text)
    roots = [Path(match[1]).parent] if match else []
    folders = [
        folder
        for root in [*roots, Path(cuda_home)]
        for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib"))
    ]
    return [str(folder) for folder in folders if any(folder.glob("libcudart*"))]


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
    """TORCH_CUDA_ARCH_LIST for a library that runs on every GPU from Ampere on."""
    archs = ["8.0", "8.6", "8.9", "9.0"]
    if nvcc >= (12, 8):
        archs += ["10.0", "12.0"]
    return ";".join(archs) + "+PTX"
