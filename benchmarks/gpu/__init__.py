# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can tell."""
