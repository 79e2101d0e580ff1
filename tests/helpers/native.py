# SPDX-License-Identifier: Apache-2.0
"""The lists that csrc holds once, read from its source."""

from __future__ import annotations

import re

import torch

from vitadapter_ops import _extension

# torch's names of what C++ calls its ScalarType.
_SCALAR_TYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
}


def dtype_pairs() -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """Dtype of value and of its points, by the name of the pair (csrc/dtypes.h)."""
    text = (_extension.source_dir() / "dtypes.h").read_text()
    (rows,) = re.findall(r"#define VITADAPTER_DTYPE_PAIRS\(X\)((?:.*\\\n)+.*\n)", text)
    pairs = re.findall(r"X\((\w+), \w+, \w+, (\w+), (\w+)\)", rows)
    assert len(pairs) == rows.count("X(") > 0
    return {name: (_SCALAR_TYPES[value], _SCALAR_TYPES[points]) for name, value, points in pairs}


def head_dims() -> list[int]:
    """The head widths with CUDA kernels of their own (csrc/head_dims.h)."""
    text = (_extension.source_dir() / "head_dims.h").read_text()
    (numbers,) = re.findall(r"kHeadDims\[\] = \{([\d, ]+)\};", text)
    return [int(number) for number in numbers.split(",")]


def max_levels() -> int:
    """How many levels a kernel takes (csrc/params.h)."""
    text = (_extension.source_dir() / "params.h").read_text()
    (number,) = re.findall(r"kMaxLevels = (\d+);", text)
    return int(number)
