# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel compiles without a warning, a spill or a stack frame. Needs nvcc, no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from vitadapter_ops import _build, _extension

NVCC = shutil.which("nvcc") or (
    str(Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc") if cpp_extension.CUDA_HOME else None
)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiles_without_warnings_spills_or_stack(arch, tmp_path):
    report = ""
    for source in _build.SOURCES["cuda"]:
        command = [NVCC, "-c", "-std=c++17", f"-arch={arch}", "-Xcompiler", "-fPIC"]
        command += ["-Werror", "all-warnings", "-Xptxas", "-v", *_build.NVCC_FLAGS]
        # torch's own headers are not ours to keep free of warnings.
        command += [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
        command += [str(_extension.source_dir() / source), "-o", str(tmp_path / "kernels.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        report += done.stderr
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    # 6 pairs of dtypes, 2 operators: forward with packed and with scalar loads, backward.
    assert len(frames) >= 36
    assert set(frames) == {("0", "0", "0")}
