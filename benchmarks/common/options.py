# SPDX-License-Identifier: Apache-2.0
"""The options that the benchmark commands share, by the same name with the same meaning."""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from benchmarks.common import report
from vitadapter_ops.testing.cases import DTYPES


class Named(Protocol):
    @property
    def name(self) -> str: ...


NamedCase = TypeVar("NamedCase", bound=Named)


def positive(text: str) -> int:
    value = int(text) if text.lstrip("-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def natural(text: str) -> int:
    return 0 if text == "0" else positive(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def device(text: str) -> str:
    """The device that --device means; refused where torch has none of that name."""
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    wrong = argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    try:
        found = torch.device(text)
    except RuntimeError:
        raise wrong from None
    if found.type not in ("cpu", "cuda"):
        raise wrong
    if found.type == "cuda":
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= seen:
            raise argparse.ArgumentTypeError(
                f"torch {torch.__version__} sees {seen} CUDA GPUs, got {text!r}"
            )
    return text


# Beyond any machine; OpenMP ends the process where it gets too many.
MOST_THREADS = 4096


def threads(text: str) -> int:
    value = positive(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS}, got {text!r}")
    return value


def folder(text: str) -> Path:
    """A folder that can be written to, made where there is none: known before hours of work."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a folder")
    if path.resolve() == report.RESULTS:
        raise argparse.ArgumentTypeError(f"{path} holds what is published: expected --publish")
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {path}: {error.strerror}") from None
    return path


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --threads: `args.device` is one that torch has, `args.threads` a number."""
    parser.add_argument(
        "--device",
        type=device,
        default="auto",
        help="where to measure: cpu, cuda, or cuda:N (default: the GPU if torch sees one)",
    )
    add_threads(parser)


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=threads,
        default=torch.get_num_threads(),
        help="CPU threads for torch (default: torch's own choice)",
    )


def add_dtypes(
    parser: argparse.ArgumentParser,
    names: Iterable[str] = DTYPES,
    *,
    default: Sequence[str] | None = None,
    help: str,
) -> None:
    """--dtype, of `names`, which are some of DTYPES."""
    parser.add_argument("--dtype", nargs="+", choices=list(names), default=default, help=help)


def add_cases(parser: argparse.ArgumentParser, names: Iterable[str], default: str = "all") -> None:
    """--cases: patterns, of which each names some of `names`; see `matching`."""
    known = list(names)

    def pattern(text: str) -> str:
        if not fnmatch.filter(known, text):
            raise argparse.ArgumentTypeError(f"{text!r} names none of {', '.join(known)}")
        return text

    parser.add_argument(
        "--cases",
        nargs="+",
        type=pattern,
        metavar="PATTERN",
        help=f"which, by name, with * and ? as in a shell (default: {default}): "
        + ", ".join(known),
    )


def matching(cases: Iterable[NamedCase], patterns: Sequence[str] | None) -> tuple[NamedCase, ...]:
    """Those of `cases` that --cases names; all where it was not given."""
    return tuple(
        case
        for case in cases
        if patterns is None or any(fnmatch.fnmatch(case.name, each) for each in patterns)
    )


def add_rounds(
    parser: argparse.ArgumentParser, default: int | None, shown: str = "%(default)s"
) -> None:
    """--rounds; `shown` says what the default is where it is None, as it depends on others."""
    parser.add_argument(
        "--rounds",
        type=positive,
        default=default,
        help=f"how often each is timed at most (default: {shown})",
    )


def add_warmup(
    parser: argparse.ArgumentParser, default: int | None, shown: str = "%(default)s"
) -> None:
    """--warmup; `shown` as for `add_rounds`."""
    parser.add_argument(
        "--warmup",
        type=natural,
        default=default,
        help=f"untimed rounds before that (default: {shown})",
    )


def add_seconds(
    parser: argparse.ArgumentParser,
    default: float,
    meaning: str = "time after which one that is slow is not timed again",
) -> None:
    parser.add_argument(
        "--seconds", type=positive_float, default=default, help=f"{meaning} (default: %(default)s)"
    )


class _Publish(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, *_: Any) -> None:
        state = report.git_state()
        if state["commit"] is None:
            parser.error(f"--publish: {report.REPOSITORY} is no git checkout, so has no commit")
        if state["uncommitted_changes"]:
            parser.error(
                "--publish: expected a checkout whose only changes are in benchmarks/results; "
                "commit the others first (git status shows them)"
            )
        namespace.out = report.RESULTS


def add_output(parser: argparse.ArgumentParser, what: str = "the results") -> None:
    """--out and --publish: `args.out` is the folder that either means, made by who writes to it."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--out",
        type=folder,
        default=report.OUT,
        metavar="FOLDER",
        help=f"where {what} go (default: benchmarks/out)",
    )
    where.add_argument(
        "--publish",
        action=_Publish,
        nargs=0,
        help=f"{what} go to benchmarks/results, which git tracks; from a clean checkout only",
    )
