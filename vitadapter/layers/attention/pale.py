# SPDX-License-Identifier: Apache-2.0
"""Pale-shaped attention between two token sets."""

from __future__ import annotations

from .cswin import CSwinAttention


class PaleAttention(CSwinAttention):
    """Half of the heads attend inside groups of interlaced rows, half of interlaced columns.

    The paper's table 7 names pale attention (Wu et al., AAAI 2022) but its authors published no
    code for it, so this is our reading. Assumed, beyond what `CSwinAttention` assumes: a group is
    made of evenly spaced rows instead of adjacent ones. On every level of both token sets, the rows
    congruent modulo G form a group, where G is the height of the coarsest level, half the height
    at stride 16; columns likewise. The operations counted are those of `CSwinAttention`, 456 G,
    against 458 G published; what makes the difference is not known.
    """

    def _cut(
        self, h: int, w: int, groups: int, is_vertical: bool
    ) -> tuple[tuple[int, int, int], int]:
        if is_vertical:
            return (h, w // groups, groups), 4
        return (h // groups, groups, w), 3
