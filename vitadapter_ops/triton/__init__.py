# SPDX-License-Identifier: Apache-2.0
"""The operators as Triton kernels, for GPUs on machines without nvcc.

availability.py  whether they can run here, and why not
operators.py     the contract: schema, fake, autograd; registered without importing the kernels
launch.py        from tensors to a kernel's arguments; each configuration is prepared once
tuning.py        how a kernel is laid out, by architecture, dtype and width
kernels.py       the kernels
"""
