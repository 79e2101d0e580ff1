# SPDX-License-Identifier: Apache-2.0
"""The last line of checks for raw operators whose kernel is Python, as csrc/arguments.h is for C++.

Torch sends a call to the kernel of one of its tensors: of a meta tensor beside others to the
operator's fake, which would hand out memory that nothing has written.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from . import _checks


def checked(schema: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that only sees dense tensors on the device of value.

    Args:
        schema: of the operator, "(Tensor value, ...) -> ...".
        kernel: of the operator.

    Raises:
        ValueError: a tensor is not dense or lies elsewhere; names it.
    """
    arguments = re.split(r",\s*", schema.partition(")")[0].strip("( "))
    names = {
        index: argument.split()[-1]
        for index, argument in enumerate(arguments)
        if argument.startswith("Tensor")
    }
    first = next(index for index, name in names.items() if name == "value")

    @functools.wraps(kernel)
    def check(*given: Any) -> Any:
        device = given[first].device
        for index, name in names.items():
            if given[index] is not None:
                _checks.device(name, given[index], device, "value")
                _checks.dense(name, given[index])
        return kernel(*given)

    return check
