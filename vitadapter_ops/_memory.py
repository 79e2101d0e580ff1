# SPDX-License-Identifier: Apache-2.0
"""Out of memory in a native kernel: torch's own class of error.

What csrc/ throws reaches Python as a RuntimeError. On a CPU that is torch's own class too; on a GPU
torch has a class of its own, which people's handlers look for.
"""

from __future__ import annotations

from typing import NoReturn

import torch

# How torch's allocators for GPUs begin, and csrc/allocation.h where torch does not tell its text.
_PHRASES = ("CUDA out of memory", "HIP out of memory")


def explain(error: RuntimeError) -> NoReturn:
    """Raises, with the same text, what torch itself would have raised in the place of an error.

    Args:
        error: what an operator of the native libraries raised.

    Raises:
        torch.OutOfMemoryError: it tells that a GPU has no memory left.
        RuntimeError: it tells anything else, and is right as it is.
    """
    if type(error) is RuntimeError and str(error).startswith(_PHRASES):
        raise torch.OutOfMemoryError(str(error)) from error
    raise error
