# SPDX-License-Identifier: Apache-2.0
"""What the kernels and the models cost: `python -m benchmarks.op`, `python benchmarks/attn.py`."""
