# SPDX-License-Identifier: Apache-2.0
"""Errors in the words of the function that the user called."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

# How all errors of this package begin: `spatial_shapes[0]: expected ...`.
_OURS = re.compile(r"[A-Za-z_]\w*(\[\w+\])*: expected ")


def renamed(**names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Says in errors what the decorated function calls the arguments that it hands on.

        @renamed(value="input_flatten", padding_mask="input_padding_mask")

    Args:
        names: for arguments of the functions below, the decorated function's own.
    """
    words = re.compile(rf"\b(?:{'|'.join(names)})\b")

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError) as error:
                message = str(error)
                if _OURS.match(message):
                    error.args = (words.sub(lambda found: names[found[0]], message),)
                raise

        return call

    return decorate
