# SPDX-License-Identifier: Apache-2.0
"""Files, read by their contents' format; none of their code runs."""

from __future__ import annotations

import argparse
import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_SAFE: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
]


def read(path: str | Path) -> Mapping[str, Any]:
    """Reads a file by its contents' format; runs none of its code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds Python objects, or is no checkpoint.
        ModuleNotFoundError: it is a .safetensors file and safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    source: Path | io.BytesIO = path
    if zipfile.is_zipfile(path):  # as torch.save writes them; released files are packed once more
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith((".pth", ".pth.tar"))]
            if len(names) == 1:
                source = io.BytesIO(archive.read(names[0]))
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        found = re.search(r"Unsupported \w+: .*? (\S+) was not", str(error))
        reason = f"it holds {found[1]}" if found else str(error).partition("\n")[0]
        raise ValueError(
            f"checkpoint: expected a file of tensors and plain values, got {path}: {reason}"
        ) from error
