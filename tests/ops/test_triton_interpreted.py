# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, on a CPU: the tests of every backend, in a child.

The interpreter takes a second or so for a case's forward and backward, so that not every test runs
with every dtype: the shapes do in fp32 and bf16, a few in all dtypes; what is left out is large.
"""

import pytest

import children

pytest.importorskip("triton")

# Each a part of the tests of all backends, in a process of its own.
PARTS = {
    "kernels": ("test_triton_kernels.py", ""),
    "shapes": ("test_backends.py", "test_small_shapes and (fp32 or bf16) and not points_fp32"),
    "dtypes": ("test_backends.py", "test_small_shapes and (channels-12 or row-map)"),
    "edges": (
        "test_backends.py",
        "not test_small_shapes and not vit_adapter and not 1000 and not same_bits",
    ),
    "gradients": (
        "test_registration.py",
        "triton-on-cpu and (not gradcheck or one-of-everything) and not threads",
    ),
    "empty": ("test_empty.py", "nothing or no-pixels-no-queries"),
    "fused shapes": (
        "test_from_offsets.py",
        "test_small_shapes and (fp32 or bf16) and not points_fp32",
    ),
    "fused dtypes": ("test_from_offsets.py", "test_small_shapes and (scaled-boxes or row-map)"),
    "fused edges": (
        "test_from_offsets.py",
        "triton-on-cpu and not small_shapes and not vit_adapter and not repeat_to_the_bit "
        "and (not gradcheck or one-of-everything)",
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_passes_the_tests_of_every_backend(part):
    file, only = PARTS[part]
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-k", only, "--durations=5"]
    done = children.python(
        ["-m", "pytest", *options, str(children.ROOT / "tests" / "ops" / file)],
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
