# SPDX-License-Identifier: Apache-2.0
"""What correct means: cases, a gate, independent definitions and tolerances, for any backend."""
