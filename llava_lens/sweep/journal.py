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
from typing import Any

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


def source_of(fn: Any) -> list[Any]:
    """What tells one function from another, for `digest`: its name, its code, and what it has closed over."""
    if isinstance(fn, partial):
        return [source_of(fn.func), list(map(_held, fn.args)), [[k, _held(v)] for k, v in sorted(fn.keywords.items())]]
    cells = [cell.cell_contents for cell in getattr(fn, "__closure__", None) or ()]
    kept = [*cells, *(getattr(fn, "__defaults__", None) or ())]
    try:
        code = inspect.getsource(fn)
    except (OSError, TypeError):
        code = ""
    return [getattr(fn, "__qualname__", type(fn).__name__), code, list(map(_held, kept))]


def _held(value: Any) -> Any:
    """A value as far as it says what it is wherever it lies in memory."""
    if isinstance(value, Tensor | str | int | float | bool | list | tuple) or value is None:
        return value
    return source_of(value) if inspect.isfunction(value) else type(value).__name__


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
        except (SafetensorError, OSError) as error:
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
        self.values[cells] = values.double().cpu()
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
