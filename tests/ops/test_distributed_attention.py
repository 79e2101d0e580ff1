# SPDX-License-Identifier: Apache-2.0
"""MSDeformAttn trains on one and on two processes as without them, in every form of parallelism."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import attention_steps
import children

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo"
)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_one_process_steps_as_without_parallelism(tmp_path, threads):
    torch.set_num_threads(1)
    with children.process_group(tmp_path):
        attention_steps.run(0)


def test_two_processes_step_like_one():
    children.spawn(attention_steps.run, 2)
