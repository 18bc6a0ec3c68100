"""What maps are scored on: a question about a picture, the mask of what it asks about, and a second question.

Unusual: everything is checked before the first run, so that a mask of a wrong size does not end hours of work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from llava_lens.analysis.attribution.answers import tokens_of
from llava_lens.analysis.interventions.study import read
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.maps.case import Case
from llava_lens.roles import Roles
from llava_lens.sweep.journal import digest


@dataclass(frozen=True, eq=False)
class MapItem:
    """One question about one picture. The answer that is explained defaults to the model's own choice.

    `mask` are the pixels `[height, width]` of the original picture, or the patches `[row, col]`, of what is asked
    about; `contrast` is a second question about the same picture, with the mask of what that one asks about. `image`
    says which picture of several.
    """

    inputs: Any
    answer: int | str | None = None
    mask: Any = None
    contrast: MapItem | None = None
    name: str = ""
    image: int = 0


@dataclass(frozen=True, eq=False)
class Checked:
    """An item whose inputs have roles and a picture, and whose mask is one of patches, in reading order."""

    model: Any
    item: MapItem
    name: str
    inputs: Inputs
    mask: Bool[Tensor, " patch"] | None
    contrast: Checked | None

    @classmethod
    def of(cls, model: Any, item: MapItem, name: str) -> Checked:
        """Check without running the model; raises `LensError` naming the item."""
        with naming(name):
            inputs = read(model, item.inputs)
            if inputs.batch_size != 1:
                raise LensError(f"a batch of {inputs.batch_size}; expected one row per item: inputs.row(i)")
            inputs = inputs.row(0)
            roles = inputs.roles_of()
            if inputs.pixels is None or not roles.n_images:
                raise LensError("no picture; make the inputs with model.prepare(question, image)")
            roles.picture(item.image)
            if item.answer is not None:
                tokens_of(model, item.answer)
            mask = None if item.mask is None else patches_of(roles, item.mask, item.image)
            second = None if item.contrast is None else cls.of(model, item.contrast, "contrast")
            if second is not None and not torch.equal(picture_of(inputs, item), picture_of(second.inputs, second.item)):
                raise LensError("its contrast is about another picture; expected a second question about the same one")
        return cls(model, item, name, inputs, mask, second)

    def case(self, number: int, seed: int) -> Case:
        """The case of a map; `number` and `seed` draw what is random in it."""
        case = Case.of(self.model, self.inputs, self.item.answer, image=self.item.image, seed=seed)
        case.number = number
        return case

    @property
    def key(self) -> str:
        """What tells this item from others."""
        parts = [self.name, self.inputs.tokens, self.inputs.pixels, self.item.answer, self.item.image, self.mask]
        return digest(parts, None if self.contrast is None else self.contrast.key)


def picture_of(inputs: Inputs, item: MapItem) -> Tensor:
    """The pixel values that an item's map is about."""
    assert inputs.pixels is not None
    return inputs.pixels[item.image]


def patches_of(roles: Roles, mask: Any, image: int) -> Bool[Tensor, " patch"]:
    """The patches that a mask touches; raises `LensError` for one of another size, not boolean, or without patches."""
    given = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if given.dtype != np.bool_:
        raise LensError(f"a mask of {given.dtype}; expected booleans")
    grid, known = roles.grid(image), roles.picture(image).map
    size = None if known is None else known.size[::-1]
    if given.shape == size:
        found = roles.patches_of_mask(given, image)
    elif given.shape == grid:
        found = torch.from_numpy(given.copy())
    else:
        pixels = "" if size is None else f"pixels {list(size)} or "
        raise LensError(f"a mask {list(given.shape)}; expected {pixels}patches {list(grid)}")
    if not bool(found.any()):
        raise LensError("a mask that touches no patch; expected at least one, or mask=None")
    return found.flatten()


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put what was worked on in front of any `LensError`."""
    try:
        yield
    except LensError as error:
        said = str(error)
        raise LensError(said if said.startswith(what) else f"{what}: {said}") from error


def row_of_line(line: bytes, shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """A finished item as it was written; raises `LensError` for anything else."""
    try:
        row = json.loads(line)
        got = {part: tuple(torch.tensor(row[part], dtype=torch.float64).shape) for part in shapes}
        if type(row["i"]) is int and got == shapes:
            return row
    except (ValueError, KeyError, TypeError):
        pass
    raise LensError(f"{where} is damaged: it is no finished item; remove the line, or the file to start anew")


class Kept:
    """Finished items in a file of JSON lines, the first of which names the evaluation; in memory without a file.

    `shapes` are those of the parts of a row. A last line that an interruption cut off is dropped; a file is changed
    only where it is this evaluation's. Raises `LensError` for another one, for a damaged line, and for other files.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str, shapes: Mapping[str, tuple[int, ...]]):
        self.path = None if path is None else Path(path)
        self.rows: dict[int, Any] = {}
        if self.path is None:
            return
        first = json.dumps({"evaluation": key}).encode() + b"\n"
        try:
            found = self.path.read_bytes() if self.path.exists() else b""
            whole = found[: found.rfind(b"\n") + 1]
            if not whole and first.startswith(found):
                self.path.write_bytes(first)
                return
            if not whole.startswith(first):
                raise LensError(
                    f"{self.path} holds another evaluation, or something else: model, items, methods or settings "
                    "differ; remove it, or choose another file="
                )
            for number, line in enumerate(whole.splitlines()[1:], 2):
                row = row_of_line(line, shapes, f"{self.path}, line {number}")
                self.rows[row["i"]] = row
            os.truncate(self.path, len(whole))
        except OSError as error:
            raise LensError(f"{self.path} cannot hold an evaluation: {error.strerror or error}") from error

    def get(self, i: int) -> Any:
        """What was found of an item, None before it is."""
        return self.rows.get(i)

    def add(self, i: int, row: dict[str, Any]) -> Any:
        """Keep what was found of an item."""
        self.rows[i] = {"i": i, **row}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[i]) + "\n")
        return self.rows[i]
