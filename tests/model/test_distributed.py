# SPDX-License-Identifier: Apache-2.0
"""Training on several processes gives what one process gives on the same global batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import children
import distributed_steps

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo"
)


@pytest.mark.parametrize(
    "run", [distributed_steps.data_parallel, distributed_steps.fully_sharded], ids=["ddp", "fsdp2"]
)
def test_two_processes_step_like_one(tmp_path, run):
    children.spawn(run, distributed_steps.RANKS, tmp_path)
    got = torch.load(tmp_path / "state.pth")
    model = distributed_steps.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    distributed_steps.step(model, distributed_steps.global_batch())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(not torch.equal(got[name], value) for name, value in before.items()) > 150


def test_data_parallel_training_tells_of_no_warnings(tmp_path):
    children.spawn(distributed_steps.data_parallel_warnings, distributed_steps.RANKS, tmp_path)
    assert torch.load(tmp_path / "warnings.pth") == []


@pytest.mark.exhaustive
def test_any_part_may_be_sharded_alone(tmp_path):
    children.spawn(distributed_steps.each_part_sharded, distributed_steps.RANKS, tmp_path)
    results = torch.load(tmp_path / "results.pth")
    expected = results.pop(None)
    assert results.keys() == {*distributed_steps.PARTS}
    for part, got in results.items():
        torch.testing.assert_close(got, expected, msg=lambda m, part=part: f"{part}: {m}")


@pytest.mark.exhaustive
def test_processes_that_hang_are_ended():
    with pytest.warns(UserWarning, match="over 3 s"), pytest.raises(TimeoutError):
        children.spawn(distributed_steps.wait, distributed_steps.RANKS, limit=3)
    assert not torch.multiprocessing.active_children()


@pytest.mark.parametrize(
    "fail", [distributed_steps.fail, distributed_steps.fail_beside_a_collective]
)
def test_an_error_of_one_process_is_told_and_ends_all(fail):
    with pytest.raises(
        torch.multiprocessing.ProcessRaisedException, match=r"(?s)Process 1 .*: 1 wrong"
    ):
        children.spawn(fail, distributed_steps.RANKS)
    assert not torch.multiprocessing.active_children()


@pytest.mark.exhaustive
def test_where_torch_fails_too_a_test_is_skipped(monkeypatch):
    monkeypatch.setattr(children, "_train_torchs_own", distributed_steps.fail)
    with pytest.raises(pytest.skip.Exception, match=r"(?s)cannot train .*: 1 wrong"):
        children.spawn(distributed_steps.fail, distributed_steps.RANKS)
