# SPDX-License-Identifier: Apache-2.0
"""What the child process of test_mutants.py does: asks the checks about each mistake, and none.

    python mutant_steps.py FOLDER    that of the kernels, where the verdicts go

Each has a process of its own, forked off after torch was imported: kernels with a mistake may
crash, and which one a library makes is settled as it is loaded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

import emulation
from mutants import CHOICE, EMULATED, TOO_SMALL


def judge(folder: Path, name: str | None, verdict: Path) -> None:
    if name is not None:
        os.environ[CHOICE] = name
    kernels = emulation.load(folder)
    found = {}
    if name not in TOO_SMALL:
        found["first error"] = emulation.first_error(kernels)
    if name not in EMULATED:
        found["full blocks"] = list(emulation.errors_of_full_blocks(kernels))
    verdict.write_text(json.dumps(found))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    verdicts = {}
    for name in [None, *EMULATED, *TOO_SMALL]:
        verdict = folder / "verdict.json"
        child = os.fork()
        if child == 0:
            judge(folder, name, verdict)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = json.loads(verdict.read_text()) if status == 0 else {}
        verdicts[str(name)] = {"status": status, **found}
        verdict.unlink(missing_ok=True)
    (folder / "verdicts.json").write_text(json.dumps(verdicts))


if __name__ == "__main__":
    main()
