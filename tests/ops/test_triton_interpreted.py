# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, on a CPU: the tests of every backend, in a child.

The interpreter takes a second or so for a case's forward and backward, so that not every test runs
with every dtype: the shapes do in fp32 and bf16, a few in all dtypes; what is left out is large.
"""

import pytest

import children

pytest.importorskip("triton")

LARGE = "not vit_adapter and not 1000 and not same_bits and not repeat_to_the_bit and not threads"
SAME = "(fp32 or bf16) and not points_fp32"
# Each a part of the tests of all backends, in a process of its own: every kind once or twice.
PARTS = {
    "kernels": (
        ["test_triton_kernels.py"],
        "not (opcheck and permuted) and not (misaligned and bf16)",
    ),
    "located": (
        ["test_backends.py"],
        f"{LARGE} and (not small_shapes or row-map or {SAME} and "
        "(one-of or odd-channels or one-point or permuted or overlapping))"
        " and (not non_finite or x-nan or y-inf or x-3000000000)",
    ),
    "fused": (
        ["test_from_offsets.py"],
        f"triton-on-cpu and {LARGE} and (not small_shapes or row-map or {SAME} and "
        "(one-of or shared-boxes or a-level-without-points))"
        " and (not gradcheck or one-of)"
        " and (not non_finite or nan-offset or 1e+30-reference or -inf-box)"
        " and (not extreme_logits or 10000.0) and (not any_byte or 255)"
        " and (not one_projection or three-levels)",
    ),
    "others": (
        ["test_infinities.py", "test_registration.py", "test_empty.py"],
        "(test_infinities and float32-20-True and (gradient-inf or value--inf)) or "
        f"(test_registration and triton-on-cpu and {LARGE} and (not gradcheck or one-of)) or "
        "(test_empty and (nothing or no-pixels-no-queries))",
    ),
}
# Those of more shapes, dtypes and numbers.
SWEEPS = {
    "kernels": (["test_triton_kernels.py"], "opcheck or misaligned"),
    "shapes": (["test_backends.py"], f"small_shapes and {SAME}"),
    "dtypes": (["test_backends.py"], "small_shapes and channels-12"),
    "locations": (["test_backends.py"], "non_finite"),
    "infinities": (
        ["test_infinities.py"],
        "float32-20-True and (gradient-inf or weights-nan or value--inf)",
    ),
    "fused shapes": (["test_from_offsets.py"], f"small_shapes and {SAME}"),
    "fused dtypes": (["test_from_offsets.py"], "small_shapes and scaled-boxes"),
    "fused numbers": (
        ["test_from_offsets.py"],
        "triton-on-cpu and (non_finite or extreme_logits or any_byte or one_projection)",
    ),
}


@pytest.mark.parametrize(
    ("files", "only"),
    [
        *(pytest.param(*part, id=name) for name, part in PARTS.items()),
        *(
            pytest.param(*part, id=f"every {name}", marks=pytest.mark.exhaustive)
            for name, part in SWEEPS.items()
        ),
    ],
)
def test_passes_the_tests_of_every_backend(files, only):
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-k", only, "--durations=5"]
    paths = [str(children.ROOT / "tests" / "ops" / file) for file in files]
    done = children.python(["-m", "pytest", *options, *paths], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
