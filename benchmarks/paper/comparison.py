# SPDX-License-Identifier: Apache-2.0
"""Published figures beside counted ones."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.paper.costs import HEADS, SIZES, Cost, backbone_cost, head_cost
from benchmarks.paper.tables import BARE, PUBLISHED, Published


class Compared(NamedTuple):
    """One published figure as text; `full` for FLOPs and `reason` for differences only."""

    source: str
    model: str
    figure: str
    published: str
    counted: str
    diff: str
    full: str
    reason: str


def cost_of(row: Published) -> Cost:
    """Counts what the row describes."""
    task = HEADS[row.head].task if row.head else "detection"
    side = dict(row.options).get("img_size")
    size = (side, side) if side else SIZES[task]
    embed_dim, cost = backbone_cost(row.model, task, row.options, row.part == "vit", size)
    if row.part == "adapter":  # printed is the difference of the two other printed columns
        vit = backbone_cost(row.model, task, BARE, True, size)[1]
        params = round(cost.params, -5) - round(vit.params, -5)
        cost = Cost(params, cost.paper - vit.paper, cost.full - vit.full)
    return cost + head_cost(row.head, embed_dim, size) if row.head else cost


def rounded(number: int, unit: float, printed: str) -> str:
    """`number` / `unit` with as many decimals as `printed` has."""
    decimals = len(printed.partition(".")[2])
    return f"{number / unit:.{decimals}f}"


def comparison() -> list[Compared]:
    """Every published figure."""
    rows = []
    for row in PUBLISHED:
        cost = cost_of(row)
        for figure, printed, number, unit, full in (
            ("params [M]", row.params, cost.params, 1e6, ""),
            ("FLOPs [G]", row.flops, cost.paper, 1e9, f"{cost.full / 1e9:.1f}"),
        ):
            if printed is None:
                continue
            exact = rounded(number, unit, printed) == printed
            difference = "0" if exact else f"{number / unit - float(printed):+.2f}"
            counted = f"{number / unit:.2f}"
            reason = "" if exact else row.reason or "unexplained"
            rows.append(
                Compared(
                    row.source, row.title(), figure, printed, counted, difference, full, reason
                )
            )
    return rows
