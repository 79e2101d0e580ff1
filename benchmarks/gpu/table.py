# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/gpu.md: predicted times, what was measured, and targets.

    python -m benchmarks.gpu.table            # after a run, or after new predictions
    python -m benchmarks.gpu.table --check    # exit status 1 if docs/gpu.md is not up to date

Predictions come from predictions.json, measurements from every results/times-<card>.json, targets
from op/targets.py. What stands between the markers is replaced, and edited by nobody.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.common.cards import CARDS, Card, card_of
from benchmarks.gpu import predictions
from benchmarks.gpu.times_shown import FIELDS
from benchmarks.op import targets
from benchmarks.op.implementations import DETERMINISTIC, OURS, TRITON, is_rival
from benchmarks.op.traffic import BOTH, PASSES

DOCUMENT = report.REPOSITORY / "docs" / "gpu.md"
RESULTS = report.RESULTS
FILES = "times-*.json"
BLOCKS = ("times", "targets")
NOT_YET = "not yet"

PARTS = tuple(part for part in predictions.PARTS if part not in PASSES)
# What a row may be of: "both" of the fused operator and its chain; "" where nothing was timed.
VALID = (*predictions.PARTS, BOTH, "")

Key = tuple[str, str, str]  # case, dtype, pass or part
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One file of results.

    Attributes:
        name: of the file.
        record: all of it.
        timed: its rows, with one spelling of the deterministic backward.
        card: the kind of its GPU, or None where there are no targets for it.
    """

    name: str
    record: Mapping[str, Any]
    timed: Sequence[Row]
    card: Card | None

    @property
    def gpu(self) -> str:
        return str(self.record["machine"]["gpu"]["name"])

    def rows(self, key: Key) -> list[Row]:
        """All implementations of a shape, dtype and pass that were timed."""
        return [row for row in self.timed if key_of(row) == key and row["us"] is not None]

    def row(self, key: Key, name: str = OURS.name) -> Row | None:
        if key[2] == "deterministic":
            key, name = (*key[:2], "backward"), DETERMINISTIC.name
        return next((row for row in self.rows(key) if row["implementation"] == name), None)

    def best_rival(self, key: Key) -> Row | None:
        rivals = [row for row in self.rows(key) if is_rival(row["implementation"])]
        return min(rivals, key=lambda row: row["us"], default=None)


def key_of(row: Row) -> Key:
    return row["case"], row["dtype"], row["pass"]


def read(path: Path) -> Run:
    """A file of results.

    Raises:
        ValueError: it is no such file, and why.
    """
    try:
        return _run_of(path.name, json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a result of gpu-times, got none: {error!r}") from error


def _run_of(name: str, record: Mapping[str, Any]) -> Run:
    kind = record.get("schema"), record.get("benchmark")
    if kind != (1, "gpu-times"):
        raise ValueError(f"expected schema 1 of gpu-times, got {kind[0]} of {kind[1]}")
    gpu = record["machine"]["gpu"]
    if gpu is None:
        raise ValueError("these are times of no GPU")
    for field in ("date", "versions", "git", "complete"):
        record[field]
    for row in record["rows"]:
        if set(row) != FIELDS:
            raise ValueError(f"a row differs in {', '.join(sorted(FIELDS ^ set(row)))}")
        if row["pass"] not in VALID:
            valid = ", ".join(filter(None, VALID))
            raise ValueError(f"expected a pass of {valid}, got {row['pass']!r}")
        if "<!--" in row["note"]:
            raise ValueError(f"a note may hold no comment, got {row['note']!r}")
        times = [row[name] for name in ("us", "p20_us", "p80_us")]
        if times[0] is not None and not (times[0] > 0 and 0 <= min(times) <= max(times) < inf):
            raise ValueError(f"expected times above 0, got {times}")
    return Run(name, record, targets.rows_of(record), card_of(gpu["name"]))


def read_all(folder: Path) -> list[Run]:
    return [read(path) for path in sorted(folder.glob(FILES))]


# --- times --------------------------------------------------------------------------------------


def microseconds(value: float) -> str:
    """Three digits, more or less."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def expected(row: Row) -> str:
    """A prediction, with no more digits than it deserves."""
    return f"{row['us']:.{0 if row['us'] >= 100 else 1}f}"


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [headers, ["---"] * len(headers), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def times_of(card: Card | None, run: Run | None, predicted: Mapping[Key, Row]) -> list[str]:
    """The tables of one kind of card, as measured in one run if there is one."""
    shapes = dict.fromkeys((case, dtype) for case, dtype, _ in predicted)
    if run is not None:
        shapes |= dict.fromkeys((row["case"], row["dtype"]) for row in run.timed)
    title = card.title if card is not None else (run.gpu if run is not None else "")
    lines = [f"### {title}", ""]
    keys = [(*shape, which) for shape in shapes for which in PASSES]
    names = ("shape", "dtype", "pass", "predicted", "by", "measured", "ratio")
    rival_names = ("our Triton", "to CUDA", "best rival", "to ours")
    table = (_row_of(key, predicted.get(key), run) for key in keys)
    lines += markdown((*names, *rival_names), table)
    lines += ["", *(_below(run, keys) if run is not None else ["No rival was timed yet."]), ""]
    table = (
        (*shape, *(_part(predicted.get((*shape, part)), run, (*shape, part)) for part in PARTS))
        for shape in shapes
    )
    lines += markdown(("shape", "dtype", *PARTS), table)
    return [*lines, "", caption(run) if run is not None else f"Not measured on an {title} yet."]


def _row_of(key: Key, prediction: Row | None, run: Run | None) -> list[str]:
    ours = None if run is None else run.row(key)
    cells = [*key]
    cells += ["-"] * 2 if prediction is None else [expected(prediction), prediction["basis"]]
    if run is None or ours is None:
        return [*cells, NOT_YET, *["-"] * 5]
    spread = f"{microseconds(ours['p20_us'])}-{microseconds(ours['p80_us'])}"
    cells += [f"{microseconds(ours['us'])} ({spread})", _times(ours, prediction)]
    triton, rival = run.row(key, TRITON.name), run.best_rival(key)
    cells += ["-" if triton is None else microseconds(triton["us"]), _times(triton, ours)]
    name = "-" if rival is None else f"{rival['implementation']} {microseconds(rival['us'])}"
    return [*cells, name, _times(rival, ours)]


def _times(row: Row | None, base: Row | None) -> str:
    return "-" if row is None or base is None else f"{row['us'] / base['us']:.2f}x"


def _part(prediction: Row | None, run: Run | None, key: Key) -> str:
    ours = None if run is None else run.row(key)
    if prediction is None and ours is None:
        return "-"
    before = "-" if prediction is None else expected(prediction)
    found = NOT_YET if ours is None else f"{microseconds(ours['us'])} ({_times(ours, prediction)})"
    return f"{before} / {found}"


def _below(run: Run, keys: Sequence[Key]) -> list[str]:
    """Where a rival wins, first of all; and who could not run, or gives other results."""
    compared, lost = 0, []
    for key in keys:
        ours = run.row(key)
        rivals = (
            []
            if ours is None
            else [row for row in run.rows(key) if is_rival(row["implementation"])]
        )
        compared += len(rivals)
        lost += [
            (row["us"] / ours["us"], f"{row['implementation']} ({', '.join(key)})")
            for row in rivals
            if ours is not None and row["us"] < ours["us"]
        ]
    if lost:
        text = "; ".join(f"{who} {times:.2f}x" for times, who in sorted(lost))
    else:
        text = f"nowhere in this run ({compared} comparisons)" if compared else "none was timed"
    lines = [f"Where a rival wins: {text}."]
    remarks = {
        f"{row['implementation']}, {row['dtype']}: {' '.join(row['note'].split())}": None
        for row in run.timed
        if row["note"]
    }
    if remarks:
        lines += ["", f"Remarks: {'; '.join(remarks)}."]
    return lines


def caption(run: Run) -> str:
    """Card, date, versions and commit."""
    record = run.record
    versions = ", ".join(f"{name} {each}" for name, each in record["versions"].items() if each)
    commit = record["git"]["commit"] or "unknown"
    changed = " with changes" if record["git"]["uncommitted_changes"] else ""
    whole = "" if record["complete"] else ", ended before it was complete"
    parts = (run.gpu, record["date"][:10], versions, f"commit {commit[:9]}{changed}")
    return f"`{run.name}`{whole}: {', '.join(parts)}."


def times_block(runs: Sequence[Run], record: Mapping[str, Any]) -> list[str]:
    lines = [
        "Microseconds on the device with warm caches; measured: median (p20-p80). A ratio is "
        "measured to predicted, or the other's time to ours in the same run. By: what the "
        "prediction rests on, below. What the backward is made of: predicted / measured.",
    ]
    for card in CARDS:
        predicted = {
            (row["case"], row["dtype"], row["part"]): row
            for row in record["rows"]
            if row["card"] == card.kind
        }
        own: list[Run | None] = [run for run in runs if run.card == card]
        for run in own or [None]:
            lines += ["", *times_of(card, run, predicted)]
    for run in runs:
        if run.card is None:
            lines += ["", *times_of(None, run, {})]
    basis = (f"* {name}: {text}" for name, text in record["basis"].items())
    return [*lines, "", "Predictions rest on:", "", *basis]


# --- targets ------------------------------------------------------------------------------------


def targets_block(runs: Sequence[Run]) -> list[str]:
    """Every target and, of each kind of card, the newest run's worst case."""
    newest: dict[str, Run] = {}
    for run in sorted(runs, key=lambda each: each.record["date"]):
        if run.card is not None:
            newest[run.card.kind] = run
    several = dict.fromkeys(target for each in targets.GPU_TARGETS.values() for target in each)
    rows = []
    for target in several:
        cells = [targets.TITLES.get(target.cases, target.cases), target.which, target.dtypes]
        cells = ["all" if cell == "*" else cell for cell in cells]
        for card in CARDS:
            if target not in targets.GPU_TARGETS[card.kind]:
                cells.append("-")
            else:
                cells.append(verdict(target, newest.get(card.kind)))
        rows.append([*cells[:3], target.what, target.text, *cells[3:]])
    names = ("shapes", "pass", "dtype", "other", "target", *(card.title for card in CARDS))
    return [
        "With warm caches; at least (>=) the other's time or memory to ours, at most (<=) ours to "
        "the other's, or microseconds. The worst case of one run decides.",
        "",
        *markdown(names, rows),
    ]


def verdict(target: targets.Target, run: Run | None) -> str:
    worst = None if run is None else target.worst(targets.of_times(run.record))
    if worst is None:
        return NOT_YET
    value, each = worst
    word = "met" if target.met(value) else "**missed**"
    return f"{word} {target.show(value)} ({each.case}, {each.dtype})"


# --- written ------------------------------------------------------------------------------------


def markers(block: str) -> tuple[str, str]:
    return f"<!-- {block}: written by benchmarks/gpu/table.py -->", f"<!-- end of {block} -->"


def render(text: str, blocks: Mapping[str, Sequence[str]]) -> str:
    """The document with what is between its markers replaced.

    Raises:
        ValueError: a marker is missing, or there more than once.
    """
    for name, lines in blocks.items():
        begin, end = markers(name)
        for marker in (begin, end):
            if text.count(marker) != 1:
                raise ValueError(f"expected the line {marker} once, got it {text.count(marker)}x")
        before, rest = text.split(begin)
        if end not in rest:
            raise ValueError(f"expected the line {end} after {begin}")
        after = rest.split(end)[1]
        text = before + "\n".join((begin, *lines, end)) + after
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.table", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would change")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="default: docs/gpu.md")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder (default: benchmarks/results)"
    )
    args = parser.parse_args(argv)
    record = json.loads(predictions.FILE.read_text())
    try:
        runs = read_all(args.results)
        old = args.document.read_text()
        blocks = {"times": times_block(runs, record), "targets": targets_block(runs)}
        new = render(old, blocks)
    except (OSError, ValueError) as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    if new == old:
        return 0
    if args.check:
        print(f"{args.document} is not up to date: run python -m benchmarks.gpu.table")
        return 1
    args.document.write_text(new)
    print(f"Written: {args.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
