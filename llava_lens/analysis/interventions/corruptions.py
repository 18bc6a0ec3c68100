"""Ways to corrupt a prompt: what takes from the model the fact that it answers from.

Unusual: whatever is drawn is drawn in float32 on the CPU, so a seed means the same corruption on every device and in
every dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.interventions.study import check_pair, read
from llava_lens.analysis.interventions.swap import require, swapped
from llava_lens.analysis.interventions.where import Ground
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.kernels import upcast
from llava_lens.sweep.edits import Edit, Places
from llava_lens.sweep.rows import Row

EMBED = "hook_embed"
"""Where embeddings are corrupted: pictures and words side by side, in front of the first block."""
Corrupted = tuple[Edit, ...] | Inputs


class Corruption:
    """One way to corrupt a row: called with the model, the clean row and a generator on the CPU, it returns edits of
    the embedding that last, or other `Inputs` of the same layout.

    `drawn` says whether the generator matters. Subclass it for one of your own.
    """

    drawn = False

    def __call__(self, model: Any, row: Row, generator: torch.Generator) -> Corrupted:
        raise NotImplementedError

    def of_row(self, model: Any, inputs: Inputs, i: int) -> Corruption:
        """Itself for row `i` of a batch; raises `LensError` for what does not fit the batch."""
        return self


def gaussian(sigma: int | float = 3.0, at: Any = "image") -> Corruption:
    """Noise `N(0, (sigma · s)²)` added to the embeddings at some positions, as in ROME.

    `s` is the standard deviation of what stands there: for a patch that of its picture's projected features, for a word
    that of the embedding matrix. `at` selects as in `patch`.
    """
    return Noise(_positive(sigma, "sigma"), at, "add")


def multiplicative(sigma: int | float = 3.0, at: Any = "image") -> Corruption:
    """The embeddings at some positions times `N(1, sigma²)`, number by number: as in the BLIP tracer (2308.14179)."""
    return Noise(_positive(sigma, "sigma"), at, "multiply")


def blur(radius: int | float, image: int | None = None) -> Corruption:
    """A Gaussian blur of the pixel values, `radius` its standard deviation in pixels of the model's input.

    All pictures of a row, or one. The edge's pixels go on outside the picture.
    """
    return Blur(_positive(radius, "radius"), image)


def mean_embedding(at: Any = "image", reference: Any = None) -> Corruption:
    """The embeddings at some positions all replaced by their mean, or by the mean there over `reference` inputs."""
    return Mean(at, reference)


def resample(other: Any, at: Any = "image") -> Corruption:
    """What other inputs of the same layout hold in the embedding at some positions; `at=None` takes their pictures.

    Of a list of inputs each repeat draws one. Of a batch each row gets the other's row.
    """
    others = (other,) if isinstance(other, Mapping) else tuple(other) if isinstance(other, list | tuple) else ()
    if not others:
        raise LensError(f"resample from {type(other).__name__} without inputs; expected Inputs, or a list of them")
    return Resample(others, at)


def pair(other: Any) -> Corruption:
    """Other inputs of the same layout that differ in one fact of picture or prompt; of a batch row by row."""
    return Pair(other)


def text_swap(words: Mapping[str, str]) -> Corruption:
    """Words of the question for others, token for token: `text_swap({"circle": "square"})`; roles stay.

    Letter case does not matter, a capital at the start stays. When it is called, it raises `LensError` for a word that
    no question of a batch has, for a prompt with none of them, for one of another number of tokens (with the pieces),
    and for a model without a tokenizer.
    """
    given = tuple(words.items())
    if not given or not all(isinstance(word, str) and word.strip() for swap in given for word in swap):
        raise LensError(f"text_swap({words!r}); expected words for words: {{'circle': 'square'}}")
    return Swap(tuple((old.strip().lower(), new.strip()) for old, new in given))


def _positive(value: int | float, name: str) -> float:
    if not 0 < value < float("inf"):
        raise LensError(f"{name}={value}; expected more than 0")
    return float(value)


def embeddings(model: Any, row: Row) -> Float[Tensor, "pos d_model"]:
    """What the decoder is given at every position of a row, padding included."""
    with torch.inference_mode():
        _, cache = model.run_with_cache(row.inputs, names_filter=EMBED, stop_at_layer=0)
    return cache[EMBED][0]


def positions(model: Any, row: Row, at: Any) -> Places:
    """Positions that are selected as in `patch`, each once, ascending."""
    return tuple(sorted(set(Ground(model, row).select(at))))


@dataclass(frozen=True)
class Noise(Corruption):
    """`gaussian` and `multiplicative`."""

    sigma: float
    at: Any
    how: Literal["add", "multiply"]
    drawn = True

    def __call__(self, model: Any, row: Row, generator: torch.Generator) -> Corrupted:
        where = positions(model, row, self.at)
        noise = torch.randn(len(where), model.cfg.d_model, generator=generator, dtype=torch.float32).double()
        noise = self.sigma * noise
        noise = noise * self._spread(model, row, where) if self.how == "add" else 1 + noise
        return (Edit(EMBED, noise, self.how, pos=where),)

    @staticmethod
    def _spread(model: Any, row: Row, where: Places) -> Float[Tensor, "pos 1"]:
        """The standard deviation of what stands at each position."""
        pictures = [slots for slots in row.slots(model) if set(slots) & set(where)]
        spread = {}
        if pictures:
            x = embeddings(model, row)
            spread = {at: std for slots in pictures for std in [float(upcast(x[slots]).std())] for at in slots}
        if not set(where) <= set(spread):
            word = float(upcast(model.W_E.detach()).std())
            spread = dict.fromkeys(where, word) | spread
        return torch.tensor([[spread[at]] for at in where], dtype=torch.float64)

    def __str__(self) -> str:
        return f"{'gaussian' if self.how == 'add' else 'multiplicative'}(sigma={self.sigma:g}, at={_named(self.at)})"


@dataclass(frozen=True)
class Blur(Corruption):
    """`blur`."""

    radius: float
    image: int | None

    def __call__(self, model: Any, row: Row, generator: torch.Generator) -> Corrupted:
        pixels = row.inputs.pixels
        if pixels is None:
            raise LensError(f"{self} needs a picture; the prompt has none")
        if self.image is not None and not 0 <= self.image < len(pixels):
            raise LensError(f"image {self.image} in {self}; expected 0 … {len(pixels) - 1}")
        which = slice(None) if self.image is None else slice(self.image, self.image + 1)
        rows, cols = (self.weights(n).to(pixels.device) for n in pixels.shape[-2:])
        blurred = pixels.clone()
        blurred[which] = (rows @ pixels[which].double() @ cols.T).to(pixels)
        return replace(row.inputs, pixels=blurred)

    def weights(self, n: int) -> Float[Tensor, "to of"]:
        """What each of `n` pixels in a line gets of each, out to four standard deviations; sums to 1."""
        reach = max(1, int(4 * self.radius + 0.5))
        steps = torch.arange(-reach, reach + 1)
        bell = torch.exp(-0.5 * (steps.double() / self.radius) ** 2)
        of = (torch.arange(n)[:, None] + steps).clamp(0, n - 1)
        return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, of, (bell / bell.sum()).expand(n, -1))

    def __str__(self) -> str:
        return f"blur(radius={self.radius:g}" + ("" if self.image is None else f", image={self.image}") + ")"


@dataclass(frozen=True)
class Mean(Corruption):
    """`mean_embedding`."""

    at: Any
    reference: Any

    def __call__(self, model: Any, row: Row, generator: torch.Generator) -> Corrupted:
        rows = [row]
        if self.reference is not None:
            each = [self.reference] if isinstance(self.reference, Mapping) else list(self.reference)
            batches = [read(model, inputs, "reference") for inputs in each]
            rows = [Row.of(model, batch, i) for batch in batches for i in range(batch.batch_size)]
        if not rows:
            raise LensError("an empty reference; expected Inputs, or a list of them")
        held = [upcast(embeddings(model, each)[list(positions(model, each, self.at))]) for each in rows]
        return (Edit(EMBED, torch.cat(held).mean(0), pos=positions(model, row, self.at)),)

    def __str__(self) -> str:
        of = "" if self.reference is None else ", of a reference"
        return f"mean_embedding(at={_named(self.at)}{of})"


@dataclass(frozen=True)
class Resample(Corruption):
    """`resample`."""

    others: tuple[Any, ...]
    at: Any

    @property
    def drawn(self) -> bool:  # type: ignore[override]
        return len(self.others) > 1

    def of_row(self, model: Any, inputs: Inputs, i: int) -> Corruption:
        return replace(self, others=tuple(_of_row(model, other, inputs, i) for other in self.others))

    def __call__(self, model: Any, row: Row, generator: torch.Generator) -> Corrupted:
        chosen = int(torch.randint(len(self.others), (1,), generator=generator))
        other = _of_row(model, self.others[chosen], row.inputs, 0)
        if self.at is None:
            if other.pixels is None:
                raise LensError(f"{self} needs a picture; the prompt has none")
            return replace(row.inputs, pixels=other.pixels)
        where = positions(model, row, self.at)
        return (Edit(EMBED, embeddings(model, Row.of(model, other))[list(where)], pos=where),)

    def __str__(self) -> str:
        return f"resample({len(self.others)} inputs, at={_named(self.at)})"


@dataclass(frozen=True)
class Pair(Corruption):
    """`pair`."""

    other: Any

    def of_row(self, model: Any, inputs: Inputs, i: int) -> Corruption:
        return Pair(_of_row(model, self.other, inputs, i))

    def __call__(self, model: Any, row: Row, generator: torch.Generator) -> Corrupted:
        return _of_row(model, self.other, row.inputs, 0)

    def __str__(self) -> str:
        return f"pair({self.other!r})"


def _of_row(model: Any, other: Any, inputs: Inputs, i: int) -> Inputs:
    """Row `i` of other inputs of the same layout; raises `LensError` for another one."""
    other = read(model, other, "other")
    check_pair(model, inputs, other)
    return Row.of(model, other, i).inputs


@dataclass(frozen=True)
class Swap(Corruption):
    """`text_swap`."""

    words: tuple[tuple[str, str], ...]

    def of_row(self, model: Any, inputs: Inputs, i: int) -> Corruption:
        if model.tokenizer is not None:  # raises where there is none
            require(inputs, dict(self.words))
        return self

    def __call__(self, model: Any, row: Row, generator: torch.Generator) -> Corrupted:
        return swapped(model.tokenizer, row, dict(self.words))

    def __str__(self) -> str:
        return f"text_swap({dict(self.words)!r})"


def _named(at: Any) -> str:
    """A selection in a few characters."""
    return shorten(repr(at), 60) if at is None or isinstance(at, str | int | list | tuple) else type(at).__name__
