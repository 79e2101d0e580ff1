# SPDX-License-Identifier: Apache-2.0
"""What importing the packages costs, which every process pays."""

import pytest
import torch

import children
from vitadapter_ops import _call_cache, _dispatch, functional, ms_deform_attn


def test_importing_leaves_torchs_compiler_alone():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import vitadapter, vitadapter_ops\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'timm', 'transformers')\n"
        "print([name for name in heavy if name in set(sys.modules) - before])\n"
    )
    done = children.python(["-c", code])
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr


@pytest.mark.parametrize("marked", [_dispatch.wanted, _dispatch.choose])
def test_the_choice_is_marked_as_torch_marks_constants(marked):
    def function():
        pass

    torch.compiler.assume_constant_result(function)
    assert vars(function).items() <= vars(marked).items()


def test_calls_of_ever_new_sizes_are_not_all_remembered(monkeypatch):
    monkeypatch.setattr(_call_cache, "MOST", 2)
    for queries in range(1, 8):
        points = torch.rand(1, queries, 1, 1, 1, 2)
        ms_deform_attn(torch.ones(1, 4, 1, 4), [(2, 2)], points, points[..., 0])
        assert len(functional._plans) <= 2
