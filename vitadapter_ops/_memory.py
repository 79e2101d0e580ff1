# SPDX-License-Identifier: Apache-2.0
"""Out of memory in a native kernel: torch's own class of error.

What csrc/ throws reaches Python as a RuntimeError. On a CPU that is torch's own class too; on a GPU
torch has a class of its own, which people's handlers look for.
"""

from __future__ import annotations

import torch

# How torch's allocators for GPUs begin, and csrc/allocation.h where torch does not tell its text.
_PHRASES = ("CUDA out of memory", "HIP out of memory")


def explained(error: RuntimeError) -> torch.OutOfMemoryError | None:
    """The error that torch itself would have raised in the place of one from a native operator.

    Args:
        error: what an operator of the native libraries raised.

    Returns:
        What to raise instead, with the same text; None where `error` is right as it is.
    """
    if type(error) is RuntimeError and str(error).startswith(_PHRASES):
        return torch.OutOfMemoryError(str(error))
    return None
