# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/smoke.py: checks, and the processes that run them and may die."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from benchmarks.gpu import smoke, smoke_checks, smoke_shards
from vitadapter_ops.testing import gate

# A child as the smoke stage starts it, whose checks end in each way that there is.
CHILD = """
import json, os, sys
start = int(sys.argv[sys.argv.index("--start") + 1])
ways = {ways!r}
for number, way in enumerate(ways):
    if number < start:
        continue
    print(json.dumps({{"begins": number, "name": f"check {{number}}"}}), flush=True)
    if way == "dies":
        print("CUDA error: an illegal memory access", flush=True)
        os.abort()
    if way == "hangs":
        import time
        time.sleep(60)
    error = None if way == "passes" else "differs"
    found = {{"ends": number, "error": error, "near": way == "near", "s": 0.5}}
    print(json.dumps(found), flush=True)
    if way == "breaks":
        raise SystemExit({broken})
"""


def shard_of(tmp_path, *ways):
    code = CHILD.format(ways=ways, broken=smoke_shards.BROKEN)
    return smoke_shards.Shard("located fp32", (sys.executable, "-c", code), tmp_path)


def run_shard(shard, seconds=20.0):
    shard.start()
    until = time.monotonic() + seconds
    while not shard.finished and time.monotonic() < until:
        shard.poll()
        time.sleep(0.01)
    shard.end()


def test_a_check_that_ends_its_process_does_not_end_its_shard(tmp_path):
    shard = shard_of(tmp_path, "passes", "dies", "passes", "breaks", "passes", "near", "fails")
    run_shard(shard)
    assert shard.finished
    assert shard.done == 6
    assert [each.check for each in shard.failures] == ["check 1", "check 3", "check 5", "check 6"]
    assert "illegal memory access" in shard.failures[0].error
    assert [each.near for each in shard.failures] == [False, False, True, False]
    assert shard.seconds == 3.0


def test_a_shard_that_always_dies_is_given_up(tmp_path):
    shard = shard_of(tmp_path, *["dies"] * 20)
    run_shard(shard)
    assert shard.failures[-1].error == f"given up after {smoke_shards.MOST_RESTARTS + 1} processes"
    assert len(shard.failures) == smoke_shards.MOST_RESTARTS + 2


def test_a_shard_out_of_time_keeps_what_it_found(tmp_path):
    shard = shard_of(tmp_path, "passes", "fails", "hangs")
    run_shard(shard, seconds=2)
    assert shard.done == 2
    assert [each.check for each in shard.failures] == ["check 1", "check 2"]
    assert shard.failures[1].error == "out of time here"


def test_a_shard_that_cannot_start_says_why(tmp_path):
    shard = smoke_shards.Shard("located fp32", (sys.executable, "-c", "import no_such"), tmp_path)
    run_shard(shard)
    ((failure,), done) = shard.failures, shard.done
    assert done == 0
    assert "no_such" in failure.error


def test_an_error_near_the_bound_is_told_from_a_mistake(capsys):
    exact = torch.ones(3, dtype=torch.float64)

    def check(error):
        def run():
            gate.assert_as_accurate_as_eager("output", (exact + error).float(), exact, exact)

        return run

    checks = [("right", check(0)), ("near", check(6e-7)), ("far", check(1e-3))]
    assert smoke_shards.run_checks(checks, "cpu") == 0
    ends = [json.loads(line) for line in capsys.readouterr().out.splitlines()[1::2]]
    assert [each["error"] is None for each in ends] == [True, False, False]
    assert [each["near"] for each in ends] == [False, True, False]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_checks_cover_widths_operators_and_dtypes(backend):
    names = []
    for shard in smoke.shards_of(backend, False):
        names += [name for name, _ in smoke_checks.checks_of(shard, backend, "cuda")]
    assert len(names) == len(set(names))
    assert len(names) >= {"cuda": 300, "triton": 150}[backend]
    for width in smoke_checks.WIDTHS:
        for operator in ("located", "offsets"):
            for dtypes in ("fp32", "bf16", "fp16_points_fp32"):
                prefix = f"{operator} {dtypes} D={width}"
                assert any(name.startswith((f"{prefix},", prefix)) for name in names), prefix
    assert ("located fp32 D=32, deterministic" in names) == (backend == "cuda")
    for special in smoke_checks.SPECIALS:
        assert special in names
