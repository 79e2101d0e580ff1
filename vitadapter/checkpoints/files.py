# SPDX-License-Identifier: Apache-2.0
"""Files, read by their contents' format; none of their code runs."""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .plain import STAND_INS

# torch.save's magic number, near the start of files from before torch 1.6.
_LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"
_AGAIN = "download it again"
_UNPACK = "unpack it and pass the file of weights in it"
# First bytes of files that are not weights: what they look like, and what to do.
_OTHERS = (
    (rb"\Z", "is empty", _AGAIN),
    (rb"version https://git-lfs", "is a git-lfs pointer", "fetch the file with `git lfs pull`"),
    (
        rb"(\xef\xbb\xbf)?\s*<",
        "looks like a web page",
        "that of an error or a login may have been saved: download the raw file",
    ),
    (
        rb"(\xef\xbb\xbf)?\s*[{\[]",
        "looks like JSON",
        "an index.json lists the files of a sharded checkpoint: pass one mapping of all their "
        "tensors",
    ),
    (
        rb"L1195470371460388013",  # torch.save's magic number as text
        "is of torch.save with pickle_protocol 0 or 1",
        "save it again with torch.save's defaults",
    ),
    (rb"[\s\x20-\x7e]+\Z", "looks like text", "download the raw file"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf", "is compressed", _UNPACK),
    (rb".{257}ustar", "is a tar archive", _UNPACK),
    (rb"\x93NUMPY", "is one array of numpy", "save all arrays by name, with numpy.savez"),
    (rb"\x89HDF", "is HDF5", "convert it to .npz or .safetensors"),
    (
        rb"\x80[\x02-\x05]",
        "is a pickle, which torch.save did not write",
        "reading it can run code: if you trust it, convert it to .npz or .safetensors",
    ),
    (rb"", "has an unknown format", "expected .pth, .safetensors or .npz"),
)


def read(source: str | os.PathLike[str] | IO[bytes]) -> Mapping[str, Any]:
    """Reads a file by its contents' format; runs none of its code.

    Objects of plain classes beside the weights, such as numpy's, are read as placeholders.

    Args:
        source: a path, or a file opened for reading bytes, which is read from where it is.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: source is neither a path nor a file of bytes.
        ValueError: it holds Python objects, is damaged, or is no checkpoint; the message tells
            what it looks like.
        ModuleNotFoundError: it is in the safetensors format, and safetensors is not installed.
    """
    if isinstance(source, str | os.PathLike):
        name = os.fsdecode(source)
        contents = _contents(_existing(name), name)
    elif hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        name = f"file {getattr(source, 'name', source)}"
        with _readers_errors(name):
            data = bytes(source.read())
        contents = _contents(data, name)
    else:
        raise TypeError(
            "checkpoint: expected a path, a file opened for reading bytes, or a mapping of "
            f"tensors such as model.state_dict(), got {type(source).__name__}"
        )
    if not isinstance(contents, Mapping):
        kind = type(contents).__name__
        raise _refusal(name, f"holds one object, a {kind}", "save a state_dict")
    return contents


def _refusal(name: str, what: str, remedy: str) -> ValueError:
    return ValueError(
        f"checkpoint: expected a file of tensors and plain values, got {name}, which {what}; "
        f"{remedy}"
    )


def _existing(name: str) -> Path:
    """Raises FileNotFoundError or ValueError unless there is a file of that name."""
    if re.match(r"[A-Za-z][\w+.-]+:/", name):  # pathlib makes one / of two
        raise _refusal(name, "is a URL", "pass the file that torch.hub.download_url_to_file writes")
    path = Path(name)
    if path.is_dir():
        endings = (".safetensors", ".bin", ".pth", ".pt", ".npz")
        files = [each.name for each in sorted(path.iterdir()) if each.name.endswith(endings)]
        raise _refusal(
            name,
            f"is a folder, as of a transformers or a sharded checkpoint, with "
            f"{', '.join(files[:3]) or 'no files of weights'}",
            "pass a file; of several shards, one mapping of all their tensors",
        )
    if not path.is_file():
        hint = "" if path.suffix else "; of a repository on a hub, download the file of weights"
        raise FileNotFoundError(f"checkpoint: there is no file {name}{hint}")
    return path


@contextmanager
def _readers_errors(name: str) -> Iterator[None]:
    """Makes ValueError of whatever a format's reader raises.

    Without the cause, in which torch advises to unpickle everything.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)|(Object arrays)", str(error))
        if found:
            raise _refusal(
                name,
                f"holds Python objects ({found[1] or 'arrays of dtype object'})",
                "reading them can run code: if you trust the file, load it where their class is "
                'installed, and save its weights alone: torch.save({"state_dict": contents'
                '["state_dict"]}, "weights.pth"), with whatever key or dict(...) gives them there, '
                "or model.state_dict() of a whole model",
            ) from None
        lines = str(error).replace("Weights only load failed. ", "").splitlines()
        own = [line for line in lines if line.strip() and "weights_only" not in line]
        reason = ": ".join([type(error).__name__, *own[:1]])
        remedy = f"{_AGAIN}, or save it again with torch.save's defaults"
        if "Unsupported operand" in reason:
            remedy = (
                "of the pickle_protocols only 2, torch.save's own, and 3 are read without running "
                f"code: save it again with torch.save's defaults, or {_AGAIN}"
            )
        raise _refusal(
            name, f"is cut off, damaged or written by other means ({reason})", remedy
        ) from None


def _contents(source: Path | bytes, name: str) -> Any:
    """What is in a file, or in the bytes of one."""

    def opened() -> IO[bytes]:
        return source.open("rb") if isinstance(source, Path) else io.BytesIO(source)

    with opened() as file:
        head = file.read(512)
    # The length of the header, at most 100 MB, and the header: JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        return _from_safetensors(source, name)
    if head.startswith(b"PK"):
        return _from_zip(opened, name)
    if _LEGACY in head[:32]:
        return _from_torch(opened, name)
    for start, what, remedy in _OTHERS:
        if re.match(start, head, re.DOTALL):
            begin = f" (its first bytes: {head[:20]!r})" if head else ""
            raise _refusal(name, what + begin, remedy)
    raise AssertionError("the last pattern matches every file")


def _from_safetensors(source: Path | bytes, name: str) -> Any:
    try:
        from safetensors.torch import load, load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"checkpoint: {name} is in the safetensors format, which needs `pip install "
            f"safetensors` ({error})"
        ) from error
    with _readers_errors(name):
        return load_file(source) if isinstance(source, Path) else load(source)


def _from_zip(opened: Callable[[], IO[bytes]], name: str) -> Any:
    """torch.save and numpy write zip files; released files are packed once more."""
    with _readers_errors(name), opened() as file, zipfile.ZipFile(file) as archive:
        names = [each for each in archive.namelist() if not each.startswith("__MACOSX/")]
        packed = [each for each in names if each.endswith((".pth", ".pth.tar"))]
        inner = archive.read(packed[0]) if len(packed) == 1 else None
    if inner is not None:
        return _contents(inner, f"{packed[0]} in {name}")
    if any(each.endswith(".npy") for each in names):
        with (
            _readers_errors(name),
            opened() as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            return {key: _tensor(arrays[key]) for key in arrays.files}
    if any(each.endswith("/constants.pkl") for each in names):
        raise _refusal(
            name, "is a TorchScript archive", "save torch.jit.load(file).state_dict() and pass that"
        )
    if any(each.endswith("data.pkl") for each in names):
        return _from_torch(opened, name)
    raise _refusal(name, f"is a zip archive of {', '.join(names[:3]) or 'no files'}", _UNPACK)


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    """Numbers as a tensor; others, such as strings, as they are."""
    if array.dtype.kind not in "biufc":
        return array
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


# Names that torch may read and filters of warnings are the process's, not the thread's.
_GLOBAL_STATE = threading.RLock()


def _from_torch(opened: Callable[[], IO[bytes]], name: str) -> Any:
    with (
        _readers_errors(name),
        opened() as file,
        _GLOBAL_STATE,
        torch.serialization.safe_globals(STAND_INS),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of weights_only, which is no choice here
        return torch.load(file, map_location="cpu", weights_only=True)
