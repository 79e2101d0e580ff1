# SPDX-License-Identifier: Apache-2.0
"""What correct means: cases, a gate, independent definitions and tolerances, for any backend.

Whoever writes a backend holds it to what ours are held to. With `attention`, a differentiable
function of (value, spatial_shapes, locations, weights, level_start_index):

    from vitadapter_ops.testing import cases, gate

    def compute(inputs, cotangent):
        return gate.run(attention, inputs, cotangent)  # or inputs.to(dtype, "cuda", points)

    for case in cases.SMALL:
        gate.check(case, "fp32", compute)

passes, or raises an AssertionError that names the output or gradient that is wrong.

    with force_backend("reference"):
        model(images)  # as every call with backend="auto"
"""

from .._dispatch import force_backend
from . import cases, gate, oracles, tolerances

__all__ = ["cases", "force_backend", "gate", "oracles", "tolerances"]
