# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: options, timing, memory, records of machine and versions, tables."""
