# SPDX-License-Identifier: Apache-2.0
"""Models: kinds of attention, adapter against plain ViT, the operator in other projects."""
