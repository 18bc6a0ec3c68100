"""A sweep's file: what is done so far, whole or not at all, and only for the sweep it was begun with."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_lens.cache_file import write_whole
from llava_lens.errors import LensError

MANIFEST, VERSION = "llava_lens_sweep", 1
EVERY = 10.0
"""Seconds between two writings."""


def digest(*parts: Any) -> str:
    """Sixteen hex digits over tensors (their numbers, shapes and dtypes), strings, numbers and nested sequences."""
    sha = hashlib.sha256()
    for part in _flat(parts):
        if isinstance(part, Tensor):
            data = part.detach().cpu().contiguous()
            sha.update(f"{data.dtype}{list(data.shape)}".encode())
            sha.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(part).encode())
    return sha.hexdigest()[:16]


def _flat(parts: Iterable[Any]) -> Iterable[Any]:
    for part in parts:
        if isinstance(part, list | tuple):
            yield f"[{len(part)}"
            yield from _flat(part)
        else:
            yield part


def source_of(fn: Any) -> Any:
    """What tells one function from another, for `digest`: its name and code, and the values that it works with.

    Those are what it has closed over, its defaults and the globals that it names. Raises `LensError` for a function
    that works with something else than numbers, strings, tensors, arrays and other functions.
    """
    return _Said().of(fn, getattr(fn, "__qualname__", type(fn).__name__))


class _Said:
    """Functions and values put into words, each function once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def of(self, value: Any, name: str) -> Any:
        if hasattr(value, "sweep_key"):
            return value.sweep_key
        if value is None or isinstance(value, Tensor | str | int | float | complex | torch.dtype | torch.device):
            return value if isinstance(value, Tensor) else repr(value)
        if isinstance(value, np.ndarray | np.generic):
            return torch.from_numpy(np.array(value))
        if isinstance(value, list | tuple | set | frozenset):
            each = [self.of(part, name) for part in value]
            return [type(value).__name__, *(sorted(each, key=str) if isinstance(value, set | frozenset) else each)]
        if isinstance(value, dict):
            return [[self.of(key, name), self.of(part, name)] for key, part in value.items()]
        if isinstance(value, partial):
            return [self.of(value.func, name), self.of(value.args, name), self.of(value.keywords, name)]
        if isinstance(value, ModuleType | type | BuiltinFunctionType) or not inspect.isroutine(value):
            return self._named(value, name)
        return self._function(value, name)

    def _named(self, value: Any, name: str) -> Any:
        """What a library gives, by its name."""
        if isinstance(value, ModuleType | type | BuiltinFunctionType) or type(value).__module__.startswith("torch"):
            return (
                f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"
            )
        raise LensError(
            f"file= cannot tell {name!r} from another: it works with a {type(value).__name__}; leave file= out, use a "
            "metric of llava_lens.sweep, or a plain function of numbers, tensors and functions"
        )

    def _function(self, fn: Any, name: str) -> Any:
        if id(fn) in self.seen or not inspect.isfunction(fn):
            own = getattr(fn, "__self__", None)
            return [name] if own is None else self._named(own, name)
        self.seen.add(id(fn))
        if (fn.__module__ or "").split(".")[0] in ("torch", "numpy", "math", "einops", "llava_lens"):
            library = fn.__closure__ is None
            if library:
                return f"{fn.__module__}.{fn.__qualname__}"
        try:
            code = inspect.getsource(fn)
        except (OSError, TypeError):
            code = repr((fn.__code__.co_code, fn.__code__.co_consts))
        cells = [cell.cell_contents for cell in fn.__closure__ or ()]
        world = {n: fn.__globals__[n] for n in fn.__code__.co_names if n in fn.__globals__}
        held = [self.of(part, name) for part in (cells, fn.__defaults__, fn.__kwdefaults__, world)]
        return [fn.__qualname__, code, held]


def weights_of(model: torch.nn.Module) -> str:
    """Sixteen hex digits over every bit of every weight: two sums of each, the second weighted by the place."""
    sums: list[int] = []
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for _, weight in sorted(model.named_parameters()):
        for part in weight.detach().reshape(-1).split(2**22):
            bits = part.view(whole[part.element_size()]).long()
            place = torch.arange(1, len(bits) + 1, device=bits.device) % 65521 + 1
            sums += [int(bits.sum()), int((bits * place).sum())]
    return digest(sums)


class Journal:
    """The values of a sweep's cells, and which of them are done, in a file that survives an interruption.

    `key` names the sweep: model, inputs, cells, metric. A file of another sweep, or one that is damaged, raises
    `LensError` before anything runs.
    """

    def __init__(self, path: str | os.PathLike[str] | None, n: int, key: str):
        self.path = None if path is None else Path(os.path.realpath(path))
        self.key = key
        self.values: Float[Tensor, " cell"] = torch.zeros(n, dtype=torch.float64)
        self.done: Bool[Tensor, " cell"] = torch.zeros(n, dtype=torch.bool)
        self.written = time.monotonic()
        if self.path is not None and self.path.is_dir():
            raise LensError(f"file={str(path)!r} is a folder; expected a file in it")
        if self.path is not None and self.path.exists():
            self._read(self.path)
        elif self.path is not None and not self.path.parent.is_dir():
            raise LensError(f"cannot write {str(path)!r}: there is no folder {str(self.path.parent)!r}")

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(MANIFEST)
                if text is None:
                    raise LensError(f"{path} is a safetensors file, but no sweep: it was not written here")
                facts = json.loads(text)
                held = {name: file.get_tensor(name) for name in ("values", "done")}
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            if isinstance(error, LensError):
                raise
            raise LensError(f"{path} is no sweep's file, or was cut off: {error}; remove it to start anew") from error
        if facts.get("version") != VERSION or facts["key"] != self.key or len(held["done"]) != len(self.done):
            raise LensError(
                f"{path} holds another sweep ({len(held['done'])} cells, {facts.get('key')}); this one has "
                f"{len(self.done)} ({self.key}): its model, inputs, cells or metric differ"
            )
        if digest(held["values"], held["done"]) != facts["digest"]:
            raise LensError(f"{path} is damaged: its numbers are not those that were written; remove it to start anew")
        self.values, self.done = held["values"], held["done"].bool()

    def put(self, cells: list[int], values: Float[Tensor, " put"]) -> None:
        """Note what a batch gave, and write the file if the last writing is a while ago."""
        values = values.double().cpu()
        if bool(values.isnan().any()):
            raise LensError(f"the metric is not a number in cell {cells[int(values.isnan().nonzero()[0])]}")
        self.values[cells] = values
        self.done[cells] = True
        if time.monotonic() - self.written > EVERY:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        done = self.done.to(torch.uint8)
        facts = {"version": VERSION, "key": self.key, "digest": digest(self.values, done)}
        write_whole({"values": self.values, "done": done}, {MANIFEST: json.dumps(facts)}, self.path)
        self.written = time.monotonic()
