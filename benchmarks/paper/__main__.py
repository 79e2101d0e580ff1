# SPDX-License-Identifier: Apache-2.0
"""Prints every published parameter and FLOP count beside the counted one."""

import argparse

from benchmarks.paper.comparison import comparison

NOTE = """
counted: the published convention, where G means 1e9 multiply-adds; diff 0: equal to the
printed digit. full: the same pass with nothing left out (sampling, softmax, norms,
resizing). Cells for which no configuration was published are not listed."""

if __name__ == "__main__":
    argparse.ArgumentParser(prog="benchmarks.paper", description=__doc__).parse_args()
    rows = comparison()
    table = [rows[0]._fields, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print(NOTE)
