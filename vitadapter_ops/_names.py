# SPDX-License-Identifier: Apache-2.0
"""Errors of a function in the words of the one that the user called."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")

# How all errors of this package begin: `spatial_shapes[0]: expected ...`.
_OURS = re.compile(r"[A-Za-z_]\w*(\[\w+\])*: expected ")


def rename(error: Exception, names: Mapping[str, str]) -> None:
    """Gives the arguments that an error speaks of the names that they have for the user.

    For a function that hands its own arguments on under other names. Nothing is paid where nothing
    is wrong:

        try:
            return ms_deform_attn(value, shapes, ...)
        except (TypeError, ValueError) as error:
            rename(error, {"spatial_shapes": "shapes"})
            raise

    Args:
        error: what the function raised; if it is an error of ours, its message is changed in place.
        names: of each argument that has another name there, that name and the user's.
    """
    if torch.compiler.is_compiling():
        return  # Dynamo lets nobody change an error, and would say that instead
    message = str(error)
    if _OURS.match(message):
        words = re.compile(rf"\b(?:{'|'.join(names)})\b")
        error.args = (words.sub(lambda match: names[match[0]], message),)


def renamed(**names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """`rename` for all that the decorated function raises: `@renamed(spatial_shapes="shapes")`."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError) as error:
                rename(error, names)
                raise

        return call

    return decorate
