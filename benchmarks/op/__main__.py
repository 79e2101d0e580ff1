# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.op`."""

import sys

from benchmarks.common.packages import named_if_missing

with named_if_missing(
    "Run `make bench-op`, which installs all that is needed; or `pip install '.[bench]'` in the "
    "checkout."
):
    from benchmarks.op.cli import main

if __name__ == "__main__":
    sys.exit(main())
