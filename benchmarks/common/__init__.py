# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: options, gate, timing, memory, machine and versions, tables."""

if not __debug__:
    raise SystemExit("python -O removes the checks of the correctness gate; run without it")
