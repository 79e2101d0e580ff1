# SPDX-License-Identifier: Apache-2.0
"""Tools that look at a model: parameter and operation counts."""
