# SPDX-License-Identifier: Apache-2.0
"""Errors of a function in the words of the one that the user called."""

from __future__ import annotations

import re
from collections.abc import Mapping


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
        error: what the function raised; its message is changed in place.
        names: of each argument that has another name there, that name and the user's.
    """
    words = re.compile(rf"\b(?:{'|'.join(names)})\b")
    error.args = (words.sub(lambda match: names[match[0]], str(error)),)
