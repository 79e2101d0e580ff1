# SPDX-License-Identifier: Apache-2.0
"""Reading of files: formats known by content, plain values beside the weights, refusals."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import re
import sys
import tarfile
import traceback
import types
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import vitadapter
from optional import require_integration
from vitadapter import load_checkpoint
from vitadapter.checkpoints.files import read

WEIGHTS = {"up.bias": torch.arange(3.0), "up.weight": torch.ones(2, 3, dtype=torch.bfloat16)}


def _torch_bytes(contents, **options) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file, **options)
    return file.getvalue()


def _legacy_bytes(contents) -> bytes:
    return _torch_bytes(contents, _use_new_zipfile_serialization=False)


def _npz_bytes(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _zip_bytes(files) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def _tar_bytes() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    return file.getvalue()


def _npy_bytes(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _safetensors_bytes(tensors) -> bytes:
    return require_integration("safetensors.torch").save(tensors)


def _torchscript_bytes() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file)
    return file.getvalue()


def _write(tmp_path, data: bytes, name="model.pth"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def _assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value)


FORMATS = {
    "torch": lambda: _torch_bytes(WEIGHTS),
    "legacy torch": lambda: _legacy_bytes(WEIGHTS),
    "safetensors": lambda: _safetensors_bytes(WEIGHTS),
    "zip of torch": lambda: _zip_bytes({"a.pth.tar": _torch_bytes(WEIGHTS), "__MACOSX/a.pth": b""}),
    "zip of legacy torch": lambda: _zip_bytes({"a.pth": _legacy_bytes(WEIGHTS)}),
    "zip of safetensors": lambda: _zip_bytes({"a.pth": _safetensors_bytes(WEIGHTS)}),
}


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model.npz", "model"])
def test_format_is_known_by_content(tmp_path, make, name):
    path = _write(tmp_path, make(), name)
    _assert_equal(read(path), WEIGHTS)
    _assert_equal(read(str(path)), WEIGHTS)


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_open_files_are_taken(tmp_path, make):
    data = make()
    with _write(tmp_path, data).open("rb") as file:
        _assert_equal(read(file), WEIGHTS)
    file = io.BytesIO(b"before" + data)
    file.seek(6)
    _assert_equal(read(file), WEIGHTS)


@pytest.mark.parametrize("name", ["model.npz", "model.pth"])
def test_npz_gives_numbers_as_tensors(tmp_path, name):
    arrays = {"a": np.arange(3.0), "b": np.ones(2, ">f4"), "c": np.array(["words"])}
    got = read(_write(tmp_path, _npz_bytes(**arrays), name))
    _assert_equal(
        {key: got[key] for key in "ab"}, {"a": torch.arange(3.0).double(), "b": torch.ones(2)}
    )
    assert got["c"][0] == "words"


def test_file_on_disk_and_open_file_into_a_model(tmp_path):
    options = {"embed_dim": 48, "depth": 4, "conv_inplane": 8, "pretrain_size": 64}
    source = vitadapter.create_model("vit_adapter_tiny", task="segmentation", **options)
    path = _write(tmp_path, _torch_bytes(source.state_dict()))
    with path.open("rb") as file:
        for each in (path, file):
            model = vitadapter.create_model("vit_adapter_tiny", task="segmentation", **options)
            load_checkpoint(model, each, strict=True)
            _assert_equal(model.state_dict(), source.state_dict())


PLAIN = {
    "np.float64": np.float64(0.5),
    "np.float32": np.float32(0.5),
    "np.int64": np.int64(5),
    "np.bool": np.bool_(True),
    "np.str": np.str_("best"),
    "np.datetime64": np.datetime64("2020-01-01"),
    "array": np.arange(6.0).reshape(2, 3),
    "array of bool": np.array([True]),
    "array of strings": np.array(["a", "bc"]),
    "array of records": np.zeros(2, [("a", "f4"), ("b", "i8")]),
    "array of plain objects": np.array([1, "a", None], dtype=object),
    "dtype": np.dtype("f4"),
    "Namespace": argparse.Namespace(lr=0.1, path=pathlib.Path("a"), nested=argparse.Namespace()),
    "SimpleNamespace": types.SimpleNamespace(lr=0.1),
    "OrderedDict": collections.OrderedDict(a=1),
    "Counter": collections.Counter("aab"),
    "defaultdict": collections.defaultdict(list, {"loss": [np.float64(1.0)]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "paths": [pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("a"), pathlib.Path("c")],
    "time": [datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(1)],
    "date": [datetime.date(2020, 1, 1), datetime.time(1)],
    "builtins": [range(3), slice(1, 2), frozenset({1}), {2}, 1j, b"ab", bytearray(b"a"), float],
    "torch": [torch.Size([1]), torch.float16, torch.device("cpu"), torch.strided],
}


@pytest.mark.parametrize("save", [_torch_bytes, _legacy_bytes], ids=["zip", "legacy"])
@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain_values_beside_the_weights(tmp_path, value, save):
    got = read(_write(tmp_path, save({"epoch": 3, "state_dict": WEIGHTS, "best": value})))
    _assert_equal(got["state_dict"], WEIGHTS)
    assert got["epoch"] == 3
    assert got.keys() == {"epoch", "state_dict", "best"}


@pytest.mark.parametrize("written", ["core", "_core"], ids=["numpy 1", "numpy 2"])
def test_numpy_of_either_generation(tmp_path, written):
    current = np.float64(0.5).__reduce__()[0].__module__.encode()
    data = _legacy_bytes({"state_dict": WEIGHTS, "best": np.float64(0.5), "all": np.arange(3)})
    assert current in data
    data = data.replace(current, f"numpy.{written}.multiarray".encode())
    _assert_equal(read(_write(tmp_path, data))["state_dict"], WEIGHTS)


@pytest.fixture
def class_of(monkeypatch):
    """Makes a class of a module that is not installed."""

    def make(module, name, *bases):
        part, made = "", type(name, bases, {"__module__": module})
        for each in module.split("."):
            part = f"{part}.{each}".lstrip(".")
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        setattr(sys.modules[module], name, made)
        return made

    return make


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lightning.fabric.utilities.data", "AttributeDict"),
        ("lightning_fabric.utilities.data", "AttributeDict"),
        ("pytorch_lightning.utilities.parsing", "AttributeDict"),
        ("yacs.config", "CfgNode"),
    ],
)
def test_configurations_of_other_packages_are_mappings(tmp_path, class_of, module, name):
    config = class_of(module, name, dict)(lr=0.1, state_dict=WEIGHTS)
    config.__dict__["_frozen"] = True
    got = read(_write(tmp_path, _torch_bytes({"hyper_parameters": config})))
    assert got["hyper_parameters"]["lr"] == 0.1
    _assert_equal(got["hyper_parameters"]["state_dict"], WEIGHTS)


def test_no_stand_in_is_left_with_torch(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    read(_write(tmp_path, _torch_bytes({"best": np.float64(1.0)})))
    assert set(torch.serialization.get_safe_globals()) == before


def test_classes_that_the_user_allowed_are_read(tmp_path, class_of):
    history = class_of("mmengine.logging.history_buffer", "HistoryBuffer")
    path = _write(tmp_path, _torch_bytes({"state_dict": WEIGHTS, "loss": history()}))
    with torch.serialization.safe_globals([history]):
        _assert_equal(read(path)["state_dict"], WEIGHTS)


def _refusal(source, error=ValueError) -> str:
    """The message of a refusal, checked for what all have in common."""
    with pytest.raises(error, match=r"^checkpoint: ") as raised:
        read(source)
    shown = "".join(traceback.format_exception(raised.value))
    assert "Weights only load failed" not in shown
    assert not re.search(r"weights_only\W*(=|set to)\W*False|allow_pickle=False", str(raised.value))
    return str(raised.value)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("mmengine.logging.history_buffer", "HistoryBuffer"),
        ("omegaconf.dictconfig", "DictConfig"),
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ],
)
@pytest.mark.parametrize("save", [_torch_bytes, _legacy_bytes], ids=["zip", "legacy"])
def test_python_objects_are_refused_saying_how_to_strip_them(
    tmp_path, class_of, module, name, save
):
    extra = class_of(module, name)
    for value in (extra(), {extra: {}}):
        path = _write(tmp_path, save({"state_dict": WEIGHTS, "extra": value}))
        message = _refusal(path)
        assert f"{path}, which holds Python objects ({module}.{name})" in message
        assert 'torch.save({"state_dict": contents["state_dict"]}, "weights.pth")' in message


def test_whole_models_are_refused_by_name(tmp_path):
    message = _refusal(_write(tmp_path, _torch_bytes(nn.Sequential(nn.Linear(2, 2)))))
    assert "torch.nn.modules.container.Sequential" in message
    assert "model.state_dict() of a whole model" in message


class _Malicious:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def _object_array(value):
    array = np.empty(1, object)
    array[0] = value
    return array


CARRIERS = {
    "torch": _torch_bytes,
    "torch, value": lambda bad: _torch_bytes({"state_dict": WEIGHTS, "x": bad}),
    "torch, key": lambda bad: _torch_bytes({(1, bad): WEIGHTS}),
    "torch, array of objects": lambda bad: _torch_bytes({"x": _object_array(bad)}),
    "torch, Namespace": lambda bad: _torch_bytes({"x": argparse.Namespace(x=bad)}),
    "torch, protocol 4": lambda bad: _torch_bytes({"x": bad}, pickle_protocol=4),
    "legacy torch": lambda bad: _legacy_bytes({"x": bad}),
    "zip of torch": lambda bad: _zip_bytes({"a.pth": _torch_bytes({"x": bad})}),
    "zip of a pickle": lambda bad: _zip_bytes({"a.pth": pickle.dumps({"x": bad}, 2)}),
    "zip, data.pkl": lambda bad: _zip_bytes({"a/data.pkl": pickle.dumps(bad, 2)}),
    "zip, constants.pkl": lambda bad: _zip_bytes(
        {name: pickle.dumps(bad, 2) for name in ("a/data.pkl", "a/constants.pkl", "a/version")}
    ),
    "npz": lambda bad: _npz_bytes(a=np.ones(2), x=_object_array(bad)),
    "npy": lambda bad: _npy_bytes(_object_array(bad)),
    **{f"pickle {n}": lambda bad, n=n: pickle.dumps({"x": bad}, n) for n in range(6)},
}


@pytest.mark.parametrize("carrier", CARRIERS.values(), ids=CARRIERS)
@pytest.mark.parametrize("function", ["os.system", "exec", "touch", "getattr"])
@pytest.mark.parametrize("name", ["model.pth", "model.npz", "model.safetensors"])
def test_nothing_is_executed(tmp_path, carrier, function, name):
    sign = tmp_path / "executed"
    bad = {
        "os.system": _Malicious(os.system, f"touch {sign}"),
        "exec": _Malicious(exec, f"open({str(sign)!r}, 'w')"),
        "touch": _Malicious(pathlib.Path.touch, sign),
        "getattr": _Malicious(getattr, _Malicious(open, str(sign), "w"), "name"),
    }[function]
    data = carrier(bad)
    assert not sign.exists()
    path = _write(tmp_path, data, name)
    _refusal(path)
    assert not sign.exists()
    _refusal(io.BytesIO(data))
    assert not sign.exists()


HTML = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
REFUSED = {
    "HTML": (lambda: HTML, "looks like a web page .*download the raw file"),
    "XML": (lambda: b"<?xml version='1.0'?><Error>AccessDenied</Error>", "looks like a web page"),
    "git-lfs": (lambda: POINTER, "is a git-lfs pointer .*`git lfs pull`"),
    "empty": (lambda: b"", "is empty; download it again"),
    "text": (lambda: b"Entry not found", "looks like text .*'Entry not found'"),
    "index": (lambda: b'{\n  "metadata": {"total_size": 1}}', "looks like JSON .* sharded"),
    "list": (lambda: b"[1, 2]", "looks like JSON"),
    "gzip": (lambda: b"\x1f\x8b\x08\x00" + bytes(20), "is compressed .*unpack it"),
    "tar": (_tar_bytes, "is a tar archive .*unpack it"),
    "npy": (lambda: _npy_bytes(np.ones(3)), "is one array of numpy .*numpy.savez"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n", "is HDF5 .*convert it"),
    "pickle": (lambda: pickle.dumps(WEIGHTS), "is a pickle, which torch.save did not write"),
    "bytes": (lambda: bytes(range(1, 255)), "unknown format .*expected .pth"),
    "tensor": (lambda: _torch_bytes(torch.ones(3)), "holds one object, a Tensor; .*state_dict"),
    "list of torch": (lambda: _torch_bytes([torch.ones(3)]), "holds one object, a list; "),
    "legacy tensor": (lambda: _legacy_bytes(torch.ones(3)), "holds one object, a Tensor"),
    "TorchScript": (_torchscript_bytes, r"is a TorchScript archive; .*state_dict\(\)"),
    "npz without arrays": (_npz_bytes, "a zip archive of no files"),
    "npz of objects": (
        lambda: _npz_bytes(a=_object_array([1])),
        r"holds Python objects \(arrays of dtype object\)",
    ),
    "zip of two": (lambda: _zip_bytes({"a.pth": b"", "b.pth": b""}), "archive of a.pth, b.pth; "),
    "zip of HTML": (lambda: _zip_bytes({"a.pth": HTML}), r"got a.pth in .*model, which looks like"),
    "protocol 4": (
        lambda: _torch_bytes(WEIGHTS, pickle_protocol=4),
        "written by other means .*Unsupported operand.* save it again with torch.save's defaults",
    ),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_other_files_are_refused_saying_what_they_look_like(tmp_path, make, message):
    data = make()
    for name in ("model", "model.safetensors", "model.npz"):
        path = _write(tmp_path, data, name)
        got = _refusal(path)
        assert str(path) in got
    _refusal(io.BytesIO(data))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read(_write(tmp_path, data, "model"))


COMPLETE = {
    **FORMATS,
    "npz": lambda: _npz_bytes(a=np.ones(50), b=np.ones(50)),
    "compressed zip": lambda: _zip_bytes({"a.pth": _torch_bytes(WEIGHTS)}),
}


@pytest.mark.parametrize("make", COMPLETE.values(), ids=COMPLETE)
def test_truncated_files_are_refused_at_any_length(tmp_path, make):
    data = make()
    step = max(1, len(data) // 60)
    for length in [*range(0, min(40, len(data))), *range(40, len(data), step), len(data) - 1]:
        message = _refusal(_write(tmp_path, data[:length]))
        assert "; " in message
        assert "model.pth" in message
    assert "is cut off, damaged" in message
    assert "download it again" in message


@pytest.mark.parametrize("make", COMPLETE.values(), ids=COMPLETE)
def test_damaged_files_raise_nothing_but_refusals(tmp_path, make):
    data = make()
    for start in range(0, len(data), max(1, len(data) // 100)):
        path = _write(tmp_path, data[:start] + b"\xff" * 8 + data[start + 8 :])
        try:
            assert isinstance(read(path), dict)
        except ValueError as error:
            assert str(error).startswith("checkpoint: ")  # noqa: PT017


@pytest.mark.parametrize("url", ["https://host/model.pth", "s3://bucket/model.pth"])
def test_urls_are_refused(url):
    for source in (url, pathlib.Path(url)):
        assert "is a URL; pass the file that torch.hub.download_url_to_file" in _refusal(source)


def test_folders_are_refused_with_their_files(tmp_path):
    message = _refusal(tmp_path)
    assert f"got {tmp_path}, which is a folder" in message
    assert "transformers or a sharded checkpoint, with no files of weights" in message
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
        _write(tmp_path, b"", name)
    assert "with model-1.safetensors, model-2.safetensors; pass a file" in _refusal(tmp_path)


def test_missing_files_are_named(tmp_path):
    message = _refusal(tmp_path / "nothing.pth", FileNotFoundError)
    assert message.endswith(f"there is no file {tmp_path / 'nothing.pth'}")
    message = _refusal("facebook/dinov2-small", FileNotFoundError)
    assert "there is no file facebook/dinov2-small; of a repository on a hub, download" in message


def test_other_arguments_raise_type_errors(tmp_path):
    for source, name in ((3, "int"), (None, "NoneType"), (nn.ReLU(), "ReLU"), ([1], "list")):
        assert f"state_dict(), got {name}" in _refusal(source, TypeError)
    with _write(tmp_path, b"text").open() as file:
        assert "opened for reading bytes" in _refusal(file, TypeError)
    assert "I/O operation on closed file" in _refusal_of_closed_file()


def _refusal_of_closed_file() -> str:
    file = io.BytesIO()
    file.close()
    return _refusal(file)


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    path = _write(tmp_path, _safetensors_bytes(WEIGHTS), "model.pth")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "model.pth is in the safetensors format, which needs `pip install safetensors`" in (
        _refusal(path, ModuleNotFoundError)
    )


@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
@pytest.mark.parametrize("zipped", [False, True])
def test_other_pickle_protocols_are_refused_by_name(tmp_path, protocol, zipped):
    path = tmp_path / "model.pth"
    torch.save(WEIGHTS, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pickle_protocol.*save it again with torch.save's defa"):
        read(path)


def test_nothing_is_said_of_weights_only(tmp_path):
    path = tmp_path / "model.pth"
    for contents, protocol in (({"a": torch.eye(3).to_sparse()}, 2), (WEIGHTS, 3)):
        torch.save(contents, path, pickle_protocol=protocol)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read(path).keys() == contents.keys()


def test_threads_that_read_leave_the_filters_of_warnings_and_safe_names(tmp_path):
    for number in range(4):
        torch.save({"at": np.float64(number), **WEIGHTS}, tmp_path / f"{number}.pth")
    before = list(warnings.filters), set(torch.serialization.get_safe_globals())
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            for contents in threads.map(read, tmp_path.iterdir()):
                assert contents.keys() == {"at", *WEIGHTS}
    assert (list(warnings.filters), set(torch.serialization.get_safe_globals())) == before


def test_paths_of_bytes_that_a_folder_lists_are_read(tmp_path):
    torch.save(WEIGHTS, tmp_path / "model.pth")
    (entry,) = os.scandir(os.fsencode(tmp_path))
    _assert_equal(read(entry), WEIGHTS)
