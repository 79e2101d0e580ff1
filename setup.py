# SPDX-License-Identifier: Apache-2.0
"""Builds the native libraries when torch can be imported here, and a pure wheel otherwise.

    pip install .                       pure wheel, kernels are compiled at their first use (JIT)
    pip install --no-build-isolation .  prebuilt: needs torch, setuptools, ninja and a C++ compiler

With torch's CUDA build and a matching nvcc, the CUDA library is built too (TORCH_CUDA_ARCH_LIST is
respected). Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import runpy
from typing import Any

from setuptools import find_packages, setup

build = runpy.run_path("vitadapter_ops/_build.py")


def native_libraries() -> dict[str, Any]:
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        print("vitadapter: torch is not importable here, so the kernels are left to JIT")
        return {}

    class BuildLibraries(cpp_extension.BuildExtension):
        """The libraries register operators and hold no Python symbol, so they have no PyInit."""

        def get_export_symbols(self, ext: Any) -> list[str]:
            return []

    library_dirs = cpp_extension.library_paths()

    def extension(device: str, libraries: list[str], compile_args: dict[str, list[str]]) -> Any:
        from setuptools import Extension

        return Extension(
            f"vitadapter_ops._{device}",
            sources=[f"csrc/{source}" for source in build["SOURCES"][device]],
            include_dirs=cpp_extension.include_paths(device_type=device),
            library_dirs=library_dirs,
            libraries=libraries,
            extra_compile_args=compile_args,
            language="c++",
            py_limited_api=True,
        )

    extensions = [extension("cpu", ["c10", "torch_cpu"], {"cxx": build["CXX_FLAGS"]})]
    why_not = build["why_no_cuda_build"](torch.version.cuda, cpp_extension.CUDA_HOME)
    if why_not is None:
        nvcc = build["nvcc_version"](cpp_extension.CUDA_HOME)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", build["default_arch_list"](nvcc))
        archs = build["archs_of"](cpp_extension._get_cuda_arch_flags())
        cuda = extension(
            "cuda",
            ["c10", "torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"],
            {
                "cxx": [*build["CUDA_CXX_FLAGS"], build["archs_flag"](archs)],
                "nvcc": build["NVCC_FLAGS"],
            },
        )
        cuda.include_dirs += build["cuda_include_dirs"](cpp_extension.CUDA_HOME)
        cuda.library_dirs = [*library_dirs, *build["cuda_library_dirs"](cpp_extension.CUDA_HOME)]
        extensions.append(cuda)
    else:
        print(f"vitadapter: the CUDA library is not built: {why_not}")
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildLibraries},
        # No Python symbol inside: one wheel serves every Python from 3.10 on.
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


packages = find_packages(
    include=["vitadapter", "vitadapter.*", "vitadapter_ops", "vitadapter_ops.*"]
)
setup(packages=[*packages, "vitadapter_ops.csrc"], **native_libraries())
