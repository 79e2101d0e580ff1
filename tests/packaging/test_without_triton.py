# SPDX-License-Identifier: Apache-2.0
"""Without triton, or with one that is too old, the package works and says what is missing."""

import children

TRAIN = """
import sys
import torch, vitadapter_ops as v
points = torch.full((1, 1, 1, 1, 1, 2), 0.5, requires_grad=True)
v.ms_deform_attn(torch.ones(1, 1, 1, 1), [(1, 1)], points, points[..., 0]).sum().backward()
assert points.grad is not None
print(v.explain_backend("cuda"))
print("loaded:", "vitadapter_ops.triton.kernels" in sys.modules)
"""
ABSENT = "import sys; sys.modules['triton'] = None\n"
OLD = (
    "import sys, types; sys.modules['triton'] = types.ModuleType('triton')\n"
    "sys.modules['triton'].__version__ = '3.5.1'\n"
    "import torch.utils._triton as t; t.has_triton_package = lambda: False\n"
)


def output(code):
    done = children.python(["-c", code])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton():
    printed = output(ABSENT + TRAIN)
    assert "triton     cannot run: triton cannot be imported" in printed


def test_with_a_triton_that_is_too_old():
    printed = output(OLD + TRAIN)
    assert "triton     cannot run: it needs triton 3.6 or newer, this is 3.5.1" in printed


def test_importing_the_package_and_using_a_cpu_imports_no_kernels():
    quiet = TRAIN.replace('print(v.explain_backend("cuda"))\n', "")
    assert "loaded: False" in output(quiet)
