# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, on a CPU: the tests of every backend, in a child.

The interpreter takes a second or so for a case's forward and backward, so that not every test runs
with every dtype: the shapes do in fp32 and bf16, a few in all dtypes; what is left out is large.
"""

import children
import pytest

pytest.importorskip("triton")

# Each a part of the tests of all backends, in a process of its own: every kind once or twice.
PARTS = {
    "kernels": ("test_triton_kernels.py", ""),
    "shapes": (
        "test_backends.py",
        "test_small_shapes and (fp32 or bf16) and not points_fp32 and "
        "(one-of or odd-channels or one-point or permuted or overlapping)",
    ),
    "dtypes": ("test_backends.py", "test_small_shapes and row-map"),
    "edges": (
        "test_backends.py",
        "not test_small_shapes and not vit_adapter and not same_bits and not 1000 and "
        "(not non_finite or x-nan or y-inf or x-3000000000)",
    ),
    "infinities": ("test_infinities.py", "float32-20-True and (gradient-inf or value--inf)"),
    "gradients": (
        "test_registration.py",
        "triton-on-cpu and (not gradcheck or one-of-everything) and not threads",
    ),
    "empty": ("test_empty.py", "nothing or no-pixels-no-queries"),
    "fused shapes": (
        "test_from_offsets.py",
        "test_small_shapes and (fp32 or bf16) and not points_fp32 and "
        "(one-of or shared-boxes or a-level-without-points or permuted)",
    ),
    "fused dtypes": ("test_from_offsets.py", "test_small_shapes and row-map"),
    "fused edges": (
        "test_from_offsets.py",
        "triton-on-cpu and not small_shapes and not vit_adapter and not repeat_to_the_bit and "
        "(not gradcheck or one-of-everything) and "
        "(not non_finite or nan-offset or 1e+30-reference or -inf-box) and "
        "(not extreme_logits or 10000.0) and (not any_byte or 255)",
    ),
}
# The same without choosing among shapes and numbers.
SWEEPS = {
    "shapes": ("test_backends.py", "test_small_shapes and (fp32 or bf16) and not points_fp32"),
    "dtypes": ("test_backends.py", "test_small_shapes and channels-12"),
    "edges": ("test_backends.py", "non_finite"),
    "infinities": (
        "test_infinities.py",
        "float32-20-True and (gradient-inf or weights-nan or value--inf)",
    ),
    "fused shapes": (
        "test_from_offsets.py",
        "test_small_shapes and (fp32 or bf16) and not points_fp32",
    ),
    "fused dtypes": ("test_from_offsets.py", "test_small_shapes and scaled-boxes"),
    "fused edges": (
        "test_from_offsets.py",
        "triton-on-cpu and (test_non_finite or extreme_logits or any_byte)",
    ),
}


@pytest.mark.parametrize(
    ("file", "only"),
    [
        *(pytest.param(*part, id=name) for name, part in PARTS.items()),
        *(
            pytest.param(*part, id=f"every {name}", marks=pytest.mark.exhaustive)
            for name, part in SWEEPS.items()
        ),
    ],
)
def test_passes_the_tests_of_every_backend(file, only):
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-k", only, "--durations=5"]
    done = children.python(
        ["-m", "pytest", *options, str(children.ROOT / "tests" / "ops" / file)],
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
