# SPDX-License-Identifier: Apache-2.0
"""Plain classes of training files, read as placeholders that run nothing."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any


class _Plain:
    """Stands in for an object of a plain class, of which nothing is looked up or called."""

    def __new__(cls, *args: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict:
    """Unpickled, a class of mappings without its behaviour."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


class _List:
    """Unpickled, a class of sequences without its behaviour."""

    def __new__(cls, *args: Any) -> Any:
        return []


_PATHS = "PosixPath PurePosixPath PureWindowsPath WindowsPath"
# What training files keep beside their weights and torch.load refuses, by module. torch.load calls
# stand-ins in their place: numpy's own functions, for one, can be given states that corrupt memory.
_NAMES = {
    _Plain: {
        "argparse": "Namespace",
        "builtins": "bool dict float frozenset int list range slice str tuple",
        "datetime": "date datetime time timedelta timezone",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "_reconstruct scalar",  # numpy 1
        "numpy._core.multiarray": "_reconstruct scalar",  # numpy 2
        "pathlib": _PATHS,
        "pathlib._local": _PATHS,  # Python 3.13
        "types": "SimpleNamespace",
    },
    _List: {"collections": "deque"},
    _Dict: {
        "collections": "defaultdict",
        "lightning.fabric.utilities.data": "AttributeDict",
        "lightning_fabric.utilities.data": "AttributeDict",
        "pytorch_lightning.utilities.parsing": "AttributeDict",
        "yacs.config": "CfgNode",
    },
}
STAND_INS: list[Any] = [
    (stand_in, f"{module}.{name}")
    for stand_in, modules in _NAMES.items()
    for module, names in modules.items()
    for name in names.split()
]
