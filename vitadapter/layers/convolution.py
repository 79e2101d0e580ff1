# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution."""

from __future__ import annotations

from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d for depthwise kernels over maps that are channels last in memory.

    The gradient of such a weight [C, 1, 3, 3] is channels last too: the same memory as the weight's
    but for the stride of the size of one, of which DistributedDataParallel warns in every run. Here
    it has the weight's strides.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The gradient of a view is reshaped, which gives it the usual strides.
        return super()._conv_forward(input, weight.flatten(1).view(weight.shape), bias)
