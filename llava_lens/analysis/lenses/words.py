"""Vectors read as words: the words that score highest, and the score and the rank of a given one.

Unusual: the scores of the whole vocabulary exist for a few vectors at a time only; what is kept of each vector is its
`top` words and the one word asked about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from llava_lens.analysis.attribution.answers import Word, tokens_of, told
from llava_lens.analysis.attribution.query import Place
from llava_lens.analysis.attribution.readout import MAX_LOGITS, Readout
from llava_lens.analysis.scores import Scores, stacked
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError, nearest
from llava_lens.kernels import rms_norm_parts, upcast
from llava_lens.roles import SELECTORS, Roles

Positions = str | int | Sequence[int] | None

MEASURES: dict[str, tuple[str, ...]] = {"output": ("log_prob", "logit"), "input": ("cosine", "dot")}
"""How a vector is compared with the words of each space; the first is the default."""
UNITS: dict[str, str] = {"log_prob": "nats", "logit": "logit", "cosine": "cosine", "dot": "dot product"}
STREAM = "blocks.0.hook_resid_pre"
"""Where the decoder's stream starts: what every position of the prompt is counted by."""
SHOWN = 16
"""How many places are printed along an axis."""


class Read(NamedTuple):
    """What is kept of each vector: score and rank of the word asked about, the highest words and their scores."""

    scores: Float[Tensor, "*places"]
    ranks: Float[Tensor, "*places"]
    ids: Int[Tensor, "*places top"]
    values: Float[Tensor, "*places top"]


@dataclass(frozen=True)
class Reader:
    """A matrix with a row per word, the norm in front of it, and how vector and word are compared.

    `gain` is the final norm's, None in the space of the input embeddings; `scale` is its frozen factor, None where each
    vector is normed by itself.
    """

    matrix: Float[Tensor, "d_vocab d_model"]
    by: str
    gain: Float[Tensor, " d_model"] | None = None
    eps: float = 0.0
    scale: float | None = None

    @classmethod
    def of(cls, model: Any, space: str = "output", by: str | None = None, scale: float | None = None) -> Reader:
        """The reader of a space; raises `LensError` for another space and for a measure that it does not have."""
        if space not in MEASURES:
            raise LensError(f"space={space!r}; expected 'output' (the unembedding) or 'input' (the embedding matrix)")
        measure = next((each for each in MEASURES[space] if by in (None, each)), None)
        if measure is None:
            raise LensError(f"by={by!r} in the {space} space; expected {' or '.join(map(repr, MEASURES[space]))}")
        if space == "input":
            return cls(upcast(model.embed.weight).detach(), measure)
        matrix, gain = upcast(model.unembed.weight).detach(), upcast(model.ln_final.w).detach()
        return cls(matrix, measure, gain, model.cfg.eps, scale)

    def scores(self, vectors: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """The score of every word; a word or a vector of length zero has the cosine 0."""
        y = upcast(vectors).to(self.matrix.device)
        if self.gain is not None:
            y = (rms_norm_parts(y, self.eps)[0] if self.scale is None else y * self.scale) * self.gain
        if self.by == "cosine":
            smallest = torch.finfo(y.dtype).tiny
            y = y / y.norm(dim=-1, keepdim=True).clamp_min(smallest)
            return (y @ self.matrix.T) / self.matrix.norm(dim=-1).clamp_min(smallest)
        products = y @ self.matrix.T
        return products.log_softmax(-1) if self.by == "log_prob" else products

    def read(self, vectors: Float[Tensor, "place d_model"], token: int, top: int) -> Read:
        """The `top` words of every vector, and score and rank (1: none scores higher) of one word."""
        if not 1 <= top <= len(self.matrix):
            raise LensError(f"top={top}; expected 1 … {len(self.matrix)} words")
        return Read(*(torch.cat(each) for each in zip(*self._parts(vectors, token, top), strict=True)))

    def _parts(self, vectors: Tensor, token: int, top: int) -> Iterator[tuple[Tensor, ...]]:
        for part in vectors.split(max(1, MAX_LOGITS // len(self.matrix))):
            scores = self.scores(part)
            own = scores[:, token]
            best = scores.topk(top)
            yield own.cpu(), ((scores > own[:, None]).sum(-1) + 1).to(own.dtype).cpu(), best[1].cpu(), best[0].cpu()


@dataclass(frozen=True, eq=False, repr=False)
class Lens:
    """Places read as words: scores and ranks of one word, and the highest words of every place.

    `scores` `[*places]` are of the word in `scores.method["answer"]`; `ranks` are its ranks (1: no word scores higher);
    `ids` and `values` `[*places, top]` are the highest words and their scores, `words` the same as strings. Places that
    were not read (padding) have NaN and the id -1.
    """

    scores: Scores
    ranks: Scores
    ids: Int[Tensor, "*places top"]
    values: Float[Tensor, "*places top"]
    strings: Mapping[int, str]

    @classmethod
    def of(cls, model: Any, read: Read, scores: Scores) -> Lens:
        """A lens over the places of `scores`, whose values are not read."""
        strings = {int(i): word_of(model, int(i)) for i in read.ids.unique() if i >= 0}
        full = replace(scores, values=read.scores)
        return cls(full, replace(full, values=read.ranks, unit="rank", closure=None), read.ids, read.values, strings)

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the places' axes."""
        return self.scores.axes

    @property
    def words(self) -> Shaped[np.ndarray, "*places top"]:
        """The highest words as strings, the best first; empty where nothing was read."""
        flat = [self.strings.get(int(i), "") for i in self.ids.flatten()]
        return np.array(flat, dtype=object).reshape(tuple(self.ids.shape))

    @property
    def probs(self) -> Scores:
        """The word's probabilities; raises `LensError` where the scores are no log-probabilities."""
        self.need_probabilities()
        return replace(self.scores, values=self.scores.values.exp(), unit="probability", closure=None)

    @property
    def reciprocal_ranks(self) -> Scores:
        """One over the word's ranks; their mean over samples is the mean reciprocal rank."""
        return replace(self.ranks, values=1 / self.ranks.values, unit="1 / rank")

    def need_probabilities(self) -> None:
        """Raise `LensError` where the scores are no log-probabilities."""
        if self.scores.unit != UNITS["log_prob"]:
            raise LensError(f"scores in {self.scores.unit} are no probabilities; read with by='log_prob'")

    def __getitem__(self, places: Mapping[str, int | slice]) -> Lens:
        """The lens at some places, by axis, as `Scores`: `lens[{"stream": -1}]`."""
        ids, values = (each[places] for each in self._tops())
        return replace(self, scores=self.scores[places], ranks=self.ranks[places], ids=ids.values, values=values.values)

    def over_image(self, image: int = 0) -> Lens:
        """Positions as the patches `[…, row, col]` of one image; raises `LensError` as `Scores.over_image` does."""
        ids, values = (each.over_image(image).values.movedim(-3, -1) for each in self._tops())
        scores, ranks = self.scores.over_image(image), self.ranks.over_image(image)
        return replace(self, scores=scores, ranks=ranks, ids=ids, values=values)

    def _tops(self) -> tuple[Scores, Scores]:
        axes = (*self.axes, "top")
        ids, values = (replace(self.scores, values=each, axes=axes) for each in (self.ids, self.values))
        return ids, values

    def __repr__(self) -> str:
        shape = " × ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.scores.values.shape, strict=True))
        method = self.scores.method
        word = method.get("answer") if method.get("answer") is not None else method.get("answer_id")
        head = f"Lens[{shape}]: {method.get('score')} of {word!r} in {self.scores.unit}"
        return "\n".join([head, *self._lines()])

    def _lines(self) -> list[str]:
        axes = self.axes
        if "batch" in axes or ("position" in axes and len(axes) > 1):
            axis, there = "batch" if "batch" in axes else "position", (self.ids[..., 0] >= 0).flatten(0, -2).any(0)
            at = 0 if axis == "batch" else int(there.nonzero()[-1])  # the last that is no padding
            return [f"at {axis} {self.scores.labels_of(axis)[at]}", *self[{axis: at}]._lines()]
        if axes[-2:] == ("row", "col"):
            above = f"{axes[0]} {self.scores.labels_of(axes[0])[-1]}, " if len(axes) == 3 else ""
            grid = self.words[(-1,) * (len(axes) - 2)][..., 0]
            width = max((len(word) for word in grid.flatten()), default=0)
            lines = [" ".join(str(word).ljust(width) for word in row).rstrip() for row in grid]
            return [f"{above}the highest word of every patch", *(f"  {line}" for line in lines)]
        rows = [()] if not axes else [(i,) for i in range(self.scores.length(axes[0]))]
        shown = rows if len(rows) <= SHOWN else rows[-SHOWN:]
        more = [f"  … {len(rows) - len(shown)} before"] if len(shown) < len(rows) else []
        labels = self.scores.labels_of(axes[0]) if axes else ("",)
        names = [str(label) for label in labels[-len(shown) :]]
        width = max(map(len, names), default=0)
        return [*more, *(self._line(place, f"{name:<{width}}") for place, name in zip(shown, names, strict=True))]

    def _line(self, place: tuple[int, ...], name: str) -> str:
        unit, best = self.scores.unit, zip(self.words[place], self.values[place], strict=True)
        own, rank = self.scores.values[place], float(self.ranks.values[place])
        told = "  ".join(f"{word} {_shown(value, unit)}" for word, value in best)
        return f"  {name}  {_shown(own, unit):>8} rank {rank:<6.0f}{told}"


def _shown(value: Tensor, unit: str) -> str:
    return f"{float(value.exp()):.1%}" if unit == UNITS["log_prob"] else f"{float(value):+.3g}"


def word_of(model: Any, token: int) -> str:
    """A token as a string, `<id>` where it has none (no tokenizer, or a row of the matrix behind its words)."""
    return (model.token_string(token) if model.processor is not None else "") or f"<{token}>"


def same_shape(each: Sequence[Lens]) -> Lens:
    """The lens of one row as it is, of several with an axis `batch`; raises `LensError` where they differ in size."""
    if len(each) == 1:
        return each[0]
    if len({lens.scores.values.shape for lens in each}) > 1:
        sizes = ", ".join(str(list(lens.scores.values.shape)) for lens in each)
        raise LensError(f"rows that differ in what is read ({sizes}): take one at a time, row=0 … {len(each) - 1}")
    return Lens(
        stacked([lens.scores for lens in each]),
        stacked([lens.ranks for lens in each]),
        torch.stack([lens.ids for lens in each]),
        torch.stack([lens.values for lens in each]),
        {i: word for lens in each for i, word in lens.strings.items()},
    )


# ---- which places, and which word


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
            given = [-1] if positions == "last" else [positions] if isinstance(positions, int) else positions
        places = [Place.of(cache, row, int(p)) for p in given]
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
        return tokens_of(model, answer)[0], None
    roles = Place(cache, row, 0).roles
    if position == -1 and cache.kept is not None:
        position = next((p for p in cache.kept[::-1] if roles is None or roles.labels[p] != "padding"), -1)
    readout = Readout.of(
        model, upcast(Place.of(cache, row, position).entry(final))[Place.of(cache, row, position).query]
    )
    return (int(readout.logits(readout.final).argmax()) if answer is None else tokens_of(model, answer)[0]), readout


def last_stream(model: Any) -> str:
    """The name of the stream that the final norm reads."""
    return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"


def facts_of(model: Any, what: str, token: int, **more: Any) -> dict[str, Any]:
    """What a lens says of itself: what was read, and the word asked about."""
    return {"score": what, **told(model, [token]), **more}
