# SPDX-License-Identifier: Apache-2.0
"""What papers print of ViT-Adapter, and the same counted: `python -m benchmarks.paper`."""
