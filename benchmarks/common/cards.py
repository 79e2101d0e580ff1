# SPDX-License-Identifier: Apache-2.0
"""The kinds of GPU that targets and predictions are kept for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One kind of GPU.

    Attributes:
        kind: as files and tables have it.
        title: for a person.
        name: as torch has it, in full: a MIG slice, a PCIe or an NVL card is another kind.
        memory: bandwidth of its memory by its data sheet, in bytes per second.
    """

    kind: str
    title: str
    name: str
    memory: float


CARDS = (
    Card("H100", "H100 80 GB", "NVIDIA H100 80GB HBM3", 3.35e12),
    Card("H200", "H200", "NVIDIA H200", 4.8e12),
)


def card_of(name: str) -> Card | None:
    """The kind of a GPU by the name that torch has for it, or None."""
    return next((each for each in CARDS if each.name == name), None)
