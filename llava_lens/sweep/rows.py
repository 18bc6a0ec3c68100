"""One row of a batch, studied alone: with the padding it has, and without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from llava_lens.errors import LensError
from llava_lens.inputs import PER_TOKEN, Inputs, standing
from llava_lens.pictures import Picture
from llava_lens.roles import Roles
from llava_lens.sweep.edits import Rows


@dataclass(frozen=True)
class Row:
    """One prompt. Positions are counted as in its batch, padding in front included; padding behind is cut off.

    `inputs` is a batch of one with that padding. `columns` are the positions that are no padding.
    """

    inputs: Inputs
    columns: tuple[int, ...]

    @classmethod
    def of(cls, model: Any, inputs: Inputs, i: int = 0) -> Row:
        """Row `i` of a batch that the model has checked."""
        seen = None if inputs.attention_mask is None else inputs.attention_mask[i].bool()
        columns = tuple(range(inputs.n_pos)) if seen is None else tuple(seen.nonzero()[:, 0].tolist())
        if not columns:
            raise LensError(f"row {i} is all padding")
        n = columns[-1] + 1
        layouts = inputs.layouts(model.cfg)
        counts = [sum(len(layout.pictures) for layout in row) for row in layouts]
        first = sum(counts[:i])
        pixels = inputs.pixels[first : first + counts[i]] if inputs.pixels is not None and counts[i] else None
        mask = None if len(columns) == n or inputs.attention_mask is None else inputs.attention_mask[i : i + 1, :n]
        roles = None if inputs.roles is None else (inputs.roles[i].kept(range(n)),)
        extras = inputs.extras_of(i, slice(0, n), model.cfg)
        return cls(Inputs(inputs.tokens[i : i + 1, :n], pixels, mask, roles, extras), columns)

    @property
    def n_columns(self) -> int:
        """Positions with the padding in front."""
        return self.inputs.n_pos

    @property
    def last(self) -> int:
        """The last position."""
        return self.columns[-1]

    @property
    def n_images(self) -> int:
        return 0 if self.inputs.pixels is None else len(self.inputs.pixels)

    @property
    def roles(self) -> Roles | None:
        return None if self.inputs.roles is None else self.inputs.roles[0]

    @cached_property
    def rows(self) -> Rows:
        """Position → its place without the padding."""
        return Rows(self.columns)

    @cached_property
    def compact(self) -> Inputs:
        """The tokens without the padding."""
        keep = list(self.columns)
        return Inputs(self.inputs.tokens[:, keep], self.inputs.pixels, extras=self.inputs.extras_of(0, keep))

    def slots(self, model: Any) -> list[list[int]]:
        """The positions of each picture's tokens, its class token included where it is kept."""
        return [where for where, _ in self.standing(model)]

    def standing(self, model: Any) -> list[tuple[list[int], Picture]]:
        """The pictures, each with the positions of its tokens."""
        return standing(self.inputs, 0, model.cfg) if self.n_images else []

    def seen(self, model: Any) -> Bool[Tensor, "place place"] | None:
        """Which places each place sees; None where that is all earlier ones, as causality says."""
        if not getattr(model, "follows_inputs", False):
            return None
        inputs = self.compact
        mask = model.mask(None, 0, inputs.tokens[..., None], inputs)
        if mask.allowed is not None:
            return mask.allowed.expand(1, 1, inputs.n_pos, inputs.n_pos)[0, 0]
        everything = torch.ones(inputs.n_pos, inputs.n_pos, dtype=torch.bool, device=inputs.tokens.device)
        return None if mask.causal else everything

    def place_of(self, column: int) -> int:
        """A position's place without the padding; raises `LensError` for padding and what is not there."""
        column = column + self.n_columns if column < 0 else column
        if column not in self.rows.place:
            what = "is padding" if 0 <= column < self.n_columns else f"is outside 0 … {self.n_columns - 1}"
            raise LensError(f"position {column} {what}")
        return self.rows.place[column]

    def check_image(self, image: int, hook: str) -> None:
        """Raise `LensError` for a picture that is not there."""
        if not 0 <= image < self.n_images:
            there = f"0 … {self.n_images - 1}" if self.n_images else "none: the prompt has no picture"
            raise LensError(f"image {image} at {hook!r}; expected {there}")

    def extended(self, ids: list[int]) -> Row:
        """The row with tokens of an answer behind it."""
        if not ids:
            return self
        new = torch.tensor([ids], device=self.inputs.tokens.device, dtype=self.inputs.tokens.dtype)
        tokens = torch.cat((self.inputs.tokens, new), -1)
        mask = self.inputs.attention_mask
        mask = None if mask is None else torch.cat((mask, mask.new_ones(1, len(ids))), -1)
        roles = self.roles
        if roles is not None:
            at = len(roles.text)
            roles = replace(
                roles,
                labels=roles.labels + ("answer",) * len(ids),
                tokens=roles.tokens + ("",) * len(ids) if roles.tokens else (),
                spans=roles.spans + ((at, at),) * len(ids) if roles.spans else (),
            )
        columns = self.columns + tuple(range(self.n_columns, self.n_columns + len(ids)))
        extras = self.inputs.extras_over(tokens.shape[1])
        return Row(Inputs(tokens, self.inputs.pixels, mask, None if roles is None else (roles,), extras), columns)


def shared_length(one: Row, other: Row, model: Any) -> int:
    """How many positions in front (padding left out) two rows have in common, pictures and their places too."""
    n = min(len(one.columns), len(other.columns))
    if one.columns[:n] != other.columns[:n]:
        return 0
    a, b = one.compact.tokens[0, :n], other.compact.tokens[0, :n]
    differ = (a != b).nonzero()[:, 0]
    shared = int(differ[0]) if len(differ) else n
    types, others = ({name: v for name, v in row.compact.extras.items() if name in PER_TOKEN} for row in (one, other))
    if types.keys() != others.keys() or not all(
        torch.equal(v[:, :n], others[name][:, :n]) for name, v in types.items()
    ):
        return 0
    theirs = [picture for _, picture in other.standing(model)]
    for image, (slots, picture) in enumerate(one.standing(model)):
        if slots and (theirs[image : image + 1] != [picture] or not same_picture(one, other, image)):
            shared = min(shared, one.rows.place[slots[0]])
    return shared


def same_picture(one: Row, other: Row, image: int) -> bool:
    """Whether two rows show the same pixels in a place."""
    a: Tensor | None = one.inputs.pixels
    b: Tensor | None = other.inputs.pixels
    return a is not None and b is not None and torch.equal(a[image], b[image])
