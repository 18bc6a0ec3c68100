"""Which places of a run a lens reads, and which word it asks about.

Unusual: what is padding keeps its place among the positions and is not read; a position that the cache cut away raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.answers import Word, tokens_of
from llava_lens.analysis.attribution.needs import STREAM, last_stream, many, need
from llava_lens.analysis.attribution.query import Place
from llava_lens.analysis.attribution.readout import Readout
from llava_lens.analysis.lenses.words import Read
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError, nearest
from llava_lens.kernels import upcast
from llava_lens.roles import SELECTORS, Roles

Positions = str | SupportsIndex | Iterable[SupportsIndex] | None


@dataclass(frozen=True)
class Chosen:
    """The positions to read in one row: what they are called, where the cache holds them, and which are padding."""

    place: Place
    positions: tuple[int, ...]
    held: tuple[int, ...]
    whole: bool

    @classmethod
    def of(cls, cache: LlavaCache, row: int, positions: Positions) -> Chosen:
        """Positions from None (all that the cache kept), a role, a word of the prompt, a number or several."""
        place = Place(cache, row, 0)
        roles = place.roles
        if positions is None:
            numbers = cache.kept or range(place.entry(STREAM).shape[-2])
            held = (-1 if roles is not None and roles.labels[p] == "padding" else i for i, p in enumerate(numbers))
            return cls(place, tuple(numbers), tuple(held), cache.kept is None and roles is not None)
        if isinstance(positions, str) and positions != "last":
            if roles is None:
                raise LensError(f"positions={positions!r}, but the inputs carried no roles; give numbers")
            given = named(roles, positions)
        else:
            several = many(positions)
            given: list[Any] = several if several is not None else [-1 if positions == "last" else positions]
        places = [Place.of(cache, row, p) for p in given]
        if not places:
            raise LensError(f"positions={positions!r} selects none of the prompt")
        return cls(place, tuple(p.in_prompt for p in places), tuple(p.query for p in places), False)

    def vectors(self, name: str) -> Float[Tensor, "place width"]:
        """A cached entry at the positions that are no padding, in float32 or better."""
        entry = self.place.entry(name)
        return upcast(entry[torch.tensor(self.read, device=entry.device)])

    @property
    def roles(self) -> tuple[Roles, ...] | None:
        """The row's roles where every position of the prompt has its place."""
        return self.place.roles_or_none if self.whole else None

    @property
    def read(self) -> list[int]:
        """Where the cache holds the positions that are no padding."""
        return [i for i in self.held if i >= 0]

    @property
    def labels(self) -> tuple[int | str, ...]:
        """What each position is called."""
        names = self.place.labels.get("position")
        return self.positions if names is None else tuple(names[p] for p in self.positions)

    def spread(self, read: Read) -> Read:
        """What was read at the positions (the last axis of places), with NaN and -1 at padding."""
        if -1 not in self.held:
            return read
        there = torch.tensor([i >= 0 for i in self.held])

        def put(each: Tensor, axis: int, empty: float | int) -> Tensor:
            moved = each.movedim(axis, 0)
            out = moved.new_full((len(self.held), *moved.shape[1:]), empty)
            out[there] = moved
            return out.movedim(0, axis)

        nan = float("nan")
        return Read(
            put(read.scores, -1, nan), put(read.ranks, -1, nan), put(read.ids, -2, -1), put(read.values, -2, nan)
        )


def named(roles: Any, name: str) -> list[int]:
    """The positions of a role or of a word of the prompt; raises `LensError` where there is neither."""
    if name in SELECTORS or not roles.spans:
        found = roles.positions(name).tolist()
        if not found:
            there = [label for label in dict.fromkeys(roles.labels) if label != "padding"]
            raise LensError(f"the prompt has no {name!r}{nearest(name, there)}; it has {', '.join(there)}")
        return found
    return roles.positions_of(name).tolist()


def asked(cache: LlavaCache, row: int, position: int, answer: Word) -> tuple[int, Readout | None]:
    """The word asked about, by default the model's own choice at a position, and the read-out there where it is kept.

    -1 is the last position that is no padding, of those that the cache kept.
    """
    model, final = cache.model, last_stream(cache.model)
    if final not in cache or STREAM not in cache:
        if answer is None:
            raise LensError(
                f"no answer given, and the cache lacks {STREAM} or {final}, which tell the model's own choice: keep "
                "them (names_for_lens names all that a lens reads), or give answer="
            )
        return tokens_of(model, answer, alone=True)[0], None
    roles = Place(cache, row, 0).roles
    if position == -1 and cache.kept is not None:
        position = next((p for p in cache.kept[::-1] if roles is None or roles.labels[p] != "padding"), -1)
    need(cache, [STREAM, final], "names_for_lens(model, 'logit_lens')")
    place = Place.of(cache, row, position)
    readout = Readout.of(model, place.at(place.n_layers - 1, "hook_resid_post"))
    token = int(readout.logits(readout.final).argmax()) if answer is None else tokens_of(model, answer, alone=True)[0]
    place.same_logit(token)
    return token, readout
