# SPDX-License-Identifier: Apache-2.0
"""The options that the benchmark commands share, by the same name with the same meaning."""

from __future__ import annotations

import argparse

import torch


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


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        help="where to measure: cpu, cuda, or cuda:N (default: the GPU if torch sees one)",
    )
    parser.add_argument(
        "--threads", type=positive, help="CPU threads for torch (default: torch's own choice)"
    )


def device_of(parser: argparse.ArgumentParser, asked: str) -> str:
    """The device that --device means; ends the program where torch has none of that name."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {asked!r}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {asked!r}")
    if device.type == "cuda":
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= seen:
            parser.error(f"--device {asked}: torch {torch.__version__} sees {seen} CUDA GPUs")
    return asked
