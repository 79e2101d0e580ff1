# SPDX-License-Identifier: Apache-2.0
"""Deformable attention beside dense, CSwin and Pale attention: benchmarks/models/attention.py.

python benchmarks/attn.py --help
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run by its path, Python looks for modules in this folder instead of the checkout's.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from benchmarks.models import INSTALL, named_if_missing

    with named_if_missing(INSTALL):
        from benchmarks.models.attention import main

    sys.exit(main())
