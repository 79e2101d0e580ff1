# SPDX-License-Identifier: Apache-2.0
"""The operator beside other implementations of it, and beside what the machine can do."""
