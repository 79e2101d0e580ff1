# SPDX-License-Identifier: Apache-2.0
"""What is built once per session: by one of several processes, again after a failure."""

import multiprocessing
import time

import pytest

from once import once


class Factory:
    def __init__(self, base):
        self.base = base

    def getbasetemp(self):
        return self.base


def ask(session, worker):
    """As a process of pytest-xdist."""
    base = session / f"popen-gw{worker}"
    base.mkdir()

    def build(folder):
        (folder / f"by-{worker}").touch()
        time.sleep(0.5)
        (folder / "complete").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_XDIST_WORKER", f"gw{worker}")
        folder = once(Factory(base), "thing", build)
    assert folder == session / "thing"
    assert (folder / "complete").exists()


def test_one_of_several_processes_builds(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=ask, args=(tmp_path, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(list((tmp_path / "thing").glob("by-*"))) == 1


def test_a_failed_build_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def fail(folder):
        (folder / "half").touch()
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        once(Factory(tmp_path), "thing", fail)
    folder = once(Factory(tmp_path), "thing", lambda folder: (folder / "whole").touch())
    assert folder == tmp_path / "thing"
    assert [file.name for file in folder.iterdir()] == ["whole"]
