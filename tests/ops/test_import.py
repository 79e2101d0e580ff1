# SPDX-License-Identifier: Apache-2.0
"""What importing the packages costs, which every process pays."""

import pytest
import torch

import children
from vitadapter_ops import _call_cache, _dispatch


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


def test_a_full_cache_of_calls_forgets(monkeypatch):
    monkeypatch.setattr(_call_cache, "MOST", 2)
    cache = _call_cache.CallCache()
    for kind in range(3):
        cache[kind] = str(kind)
    assert cache == {2: "2"}
