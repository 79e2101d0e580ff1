# SPDX-License-Identifier: Apache-2.0
"""Every test that needs a GPU is one that `make gpu-check` runs, and fails there without one."""

import re

import children
import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_tests_fail_where_a_gpu_must_be():
    arguments = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=line"]
    only = ["tests/ops/test_on_gpu.py", "tests/benchmarks/test_bench_timing.py"]
    done = children.python([*arguments, *only], FAIL_WITHOUT_CUDA="1")
    assert done.returncode == 1, done.stdout
    assert "torch sees no GPU" in done.stdout
    assert not re.search(r"\d+ (skipped|passed)", done.stdout), done.stdout


def test_every_test_that_requires_a_gpu_is_marked():
    this = __name__.split(".")[-1]
    for path in sorted((children.ROOT / "tests").rglob("test_*.py")):
        if path.stem == this:
            continue
        text = path.read_text()
        if "import require_cuda" in text:
            assert "mark.gpu" in text, path
