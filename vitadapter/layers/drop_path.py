# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops a residual branch per sample while training (Huang et al., ECCV 2016).

    Args:
        rate: probability of dropping, in [0, 1); what is kept is scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, ...] to the same shape and dtype."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        """The constructor's argument."""
        return f"rate={self.rate}"


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The rate of each block: none for the first, `last` for the last, linear between."""
    return [last * index / max(depth - 1, 1) for index in range(depth)]
