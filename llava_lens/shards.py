"""The files that hold tensors: safetensors and `.bin`, read one tensor at a time after looking at all the headers.

Unusual: tensors are mapped, not copied, and a mapping stays resident until its last tensor is gone. So a file is mapped
anew after every fiftieth of its size: what is cast or sent to a device leaves nothing behind, however large the shard.
No pickle is ever run: `.bin` files are read with `weights_only=True`.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_lens.errors import LensError


class CheckpointError(LensError):
    """A checkpoint that cannot be read as it stands; the message says what was given and what was expected."""


class CorruptFile(CheckpointError):
    """A file that is truncated, damaged, missing, or not of the format that its name promises."""


class UnsafeFile(CheckpointError):
    """A file that asks for more than plain tensors of this folder: code in a pickle, a path that leads outside."""


class Entry(NamedTuple):
    """One tensor of a checkpoint, known by its header and read when `load()` is called."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    file: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes as it is stored."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""The names under which weights are published; the first one that a folder holds is read."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name to file name, every one inside the index's folder.

    Raises `CorruptFile` for anything that is not such a map, and `UnsafeFile` for a name that leads outside.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CorruptFile(f"{path}: expected a 'weight_map' from tensor names to file names")
    for key, name in weight_map.items():
        parts = name.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise UnsafeFile(f"{path}: puts {key!r} in {name!r}; expected a file inside {path.parent}")
    return weight_map


def read_json(path: Path) -> dict:
    """A JSON object from a file; `CorruptFile` when it is anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path}: expected a JSON object ({error})") from error
    if not isinstance(content, dict):
        raise CorruptFile(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_headers(folder: Path) -> list[Entry]:
    """Every tensor of a folder's weight files, in file order, without reading any.

    Raises `CheckpointError` when the folder holds no weights, when a file that the index names is missing or
    damaged, and when a file lacks a tensor that the index puts there.
    """
    published = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if published is None:
        held = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}; found {held}")
    if not published.endswith(".json"):
        return list(_read_header(folder / published))
    weight_map = read_index(folder / published)
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            count = sum(file == name for file in weight_map.values())
            raise CorruptFile(f"{folder / published} names {name!r} ({count} tensors), which is not there")
    entries = [entry for name in names for entry in _read_header(folder / name)]
    found = {(entry.key, entry.file) for entry in entries}
    for key, name in weight_map.items():
        if (key, str(folder / name)) not in found:
            raise CorruptFile(f"{folder / published} puts {key!r} in {name!r}, which does not hold it")
    return entries


def _read_header(path: Path) -> Iterator[Entry]:
    return _safetensors(path) if path.suffix == ".safetensors" else _bin(path)


def _safetensors(path: Path) -> Iterator[Entry]:
    file = _Mapped(path, lambda: safe_open(path, framework="pt").get_tensor)
    try:
        with safe_open(path, framework="pt") as header:
            for key in header.keys():  # noqa: SIM118
                part = header.get_slice(key)
                name = part.get_dtype()
                if name not in DTYPES:
                    raise CheckpointError(f"{path}: {key!r} is stored as {name}; expected {', '.join(DTYPES)}")
                yield Entry(key, tuple(part.get_shape()), DTYPES[name], partial(file.load, key), str(path))
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path}: expected a whole safetensors file ({error})") from error


def _bin(path: Path) -> Iterator[Entry]:
    mapped = zipfile.is_zipfile(path)  # what torch wrote before 1.6 can only be read whole, once
    file = _Mapped(path, lambda: _unpickle(path, mmap=mapped).__getitem__, 50 if mapped else 0)
    for key, tensor in _unpickle(path, map_location="meta").items():
        yield Entry(key, tuple(tensor.shape), tensor.dtype, partial(file.load, key), str(path))


class _Mapped:
    """A file's tensors by name; the file is mapped `times` anew as it is read, so that little of it stays resident."""

    def __init__(self, path: Path, open_file: Callable[[], Callable[[str], Tensor]], times: int = 50):
        self.path, self.open_file, self.times = path, open_file, times
        self.get: Callable[[str], Tensor] | None = None
        self.left = 0.0

    def load(self, key: str) -> Tensor:
        try:
            if self.get is None or self.left <= 0:
                self.get = None  # lets go of the old mapping
                self.get = self.open_file()
                self.left = self.path.stat().st_size / self.times if self.times else float("inf")
            tensor = self.get(key)
        except (SafetensorError, KeyError, OSError) as error:
            raise CorruptFile(f"{self.path}: {key!r} cannot be read any more ({error})") from error
        self.left -= tensor.nbytes
        return tensor


def _unpickle(path: Path, **how: object) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # an error follows, or nothing
            content = torch.load(path, weights_only=True, **how)  # type: ignore[arg-type]
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsafeFile(f"{path}: expected a pickle of plain tensors and nothing else ({reason})") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise CorruptFile(f"{path}: expected a whole file written by torch.save ({error})") from error
    if not isinstance(content, dict):
        raise UnsafeFile(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UnsafeFile(f"{path}: expected a dictionary of tensors, found {key!r}: {type(value).__name__}")
    return content
