# SPDX-License-Identifier: Apache-2.0
"""The parts that turn a plain ViT into a ViT-Adapter."""
