# SPDX-License-Identifier: Apache-2.0
"""Models: kinds of attention, adapter against plain ViT, the operator in other projects."""

from benchmarks.common.packages import named_if_missing

INSTALL = (
    "Run `make bench`, which installs all that is needed; or `pip install '.[bench]'` in the "
    "checkout."
)

with named_if_missing(INSTALL):  # once for all commands of this folder
    import rich as rich
    import torch as torch
