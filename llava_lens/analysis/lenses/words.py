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

from llava_lens.analysis.attribution.answers import told
from llava_lens.analysis.attribution.needs import one_of, whole
from llava_lens.analysis.attribution.readout import MAX_LOGITS
from llava_lens.analysis.scores import Scores, stacked
from llava_lens.errors import LensError
from llava_lens.kernels import rms_norm_parts, upcast

MEASURES: dict[str, tuple[str, ...]] = {"output": ("log_prob", "logit"), "input": ("cosine", "dot")}
"""How a vector is compared with the words of each space; the first is the default."""
UNITS: dict[str, str] = {"log_prob": "nats", "logit": "logit", "cosine": "cosine", "dot": "dot product"}
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
        one_of("space", (space,), MEASURES)
        measure = MEASURES[space][0] if by is None else by
        one_of("by", (measure,), MEASURES[space], f" in the {space} space")
        if space == "input":
            return cls(upcast(model.W_E).detach(), measure)
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
        top = whole("top=", top, 1, len(self.matrix))
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


def facts_of(model: Any, what: str, token: int, **more: Any) -> dict[str, Any]:
    """What a lens says of itself: what was read, and the word asked about."""
    return {"score": what, **told(model, [token]), **more}
