# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention for PyTorch.

Functions `ms_deform_attn` and `ms_deform_attn_from_offsets`, module `MSDeformAttn`.
"""

from . import _extension
from . import _ops as _ops  # registers the operators
from . import flops as flops  # registers their FLOPs
from ._dispatch import BackendUnavailable, available_backends, explain_backend
from ._version import __version__
from .functional import ms_deform_attn, ms_deform_attn_from_offsets
from .modules import MSDeformAttn
from .triton import operators as operators  # registers them

__all__ = [
    "BackendUnavailable",
    "MSDeformAttn",
    "__version__",
    "available_backends",
    "explain_backend",
    "ms_deform_attn",
    "ms_deform_attn_from_offsets",
]

_extension.load_prebuilt()
