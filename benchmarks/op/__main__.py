# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.op`."""

import sys

from benchmarks.op.cli import main

if __name__ == "__main__":
    sys.exit(main())
