# SPDX-License-Identifier: Apache-2.0
"""Whether the Triton kernels can run here. Imports triton only where they might."""

from __future__ import annotations

import functools
import importlib
import os

# The first with all that the kernels use: tuples, functions of constants, reductions of vectors.
_OLDEST = (3, 6)


@functools.cache
def why_not(device: str) -> str | None:
    """None, or the reason why the kernels cannot run on tensors of a type of device.

    Asked once per process: what is missing does not appear later.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if device not in ("cuda", "xpu") and not (interpreted and device == "cpu"):
        return f"it needs tensors on a GPU (cuda or xpu), these are on {device}"
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); torch for GPUs brings it"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return f"it needs triton {oldest} or newer, this is {triton.__version__}"
    if not interpreted:
        try:
            # Compiles a small C file if it is not cached, which needs no nvcc but a C compiler.
            triton.runtime.driver.active.get_current_target()
        except Exception as error:  # whatever a driver raises
            return f"triton has no driver for this machine: {error}"
    return None
