"""The log-probability increase of many cells at one query: all to first order, each with a bound, then those that
need it exactly.

Unusual: what a head takes from one position is kept as a few coefficients of the rows of its output matrix, so lengths,
bounds and logits of all positions come from small products; a table of logits per head is built only where that is
cheaper than projecting the cells one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from llava_lens.analysis.attribution.increase import Base, Vocabulary, cheap_bound, tight_bound
from llava_lens.analysis.attribution.query import By, Query
from llava_lens.analysis.attribution.readout import MAX_LOGITS
from llava_lens.analysis.attribution.rebuild import heads_add_up, neurons_add_up

Values = Float[Tensor, "layer group cell"]
Chosen = Bool[Tensor, "layer group cell"]


@dataclass(frozen=True, eq=False)
class Parts:
    """What the cells of one layer add to the stream, in groups that share a basis (heads); None: the stream's axes."""

    coefficients: Float[Tensor, "group cell k"]
    basis: Float[Tensor, "group k d_model"] | None

    @classmethod
    def of(cls, query: Query, layer: int, by: By) -> Parts:
        """The cells that a question asks for."""
        if by == "neuron":
            return cls(query.neurons(layer)[None], None)
        return cls(query.mixtures(layer, by), query.W_O(layer))

    def read(self, vector: Float[Tensor, " d_model"]) -> Float[Tensor, "group cell"]:
        """The product of every cell with one vector."""
        if self.basis is None:
            return self.coefficients @ vector
        return einsum(self.coefficients, self.basis @ vector, "group cell k, group k -> group cell")

    def squared(self, form: Float[Tensor, "d_model d_model"] | None = None) -> Float[Tensor, "group cell"]:
        """`yᵀ M y` of every cell, `‖y‖²` without a matrix."""
        spread = self.coefficients
        if self.basis is None:
            spread = spread if form is None else spread @ form
        else:
            left = self.basis if form is None else self.basis @ form
            spread = spread @ (left @ self.basis.mT)
        return (spread * self.coefficients).sum(-1).clamp(min=0)

    def moved(self, base: Base) -> Parts:
        """The same cells as what they do to the stream after its norm; the base joins the basis where that bends."""
        factor, change = base.stretch(self.read(base.x), self.squared())
        scaled = factor[..., None] * self.coefficients
        if not base.own:
            return Parts(scaled, self.basis)
        if self.basis is None:
            return Parts(scaled + change[..., None] * base.x, None)
        row = base.x.expand(len(self.basis), 1, -1)
        return Parts(torch.cat((scaled, change[..., None]), -1), torch.cat((self.basis, row), 1))

    def exact(self, base: Base, chosen: Bool[Tensor, "group cell"]) -> Float[Tensor, " chosen"]:
        """The increase of the chosen cells, in the order of `chosen.nonzero()`."""
        if self.basis is None:
            return base.increase(self.coefficients[chosen])
        vocabulary, (width, d_model) = base.vocabulary.rows, self.basis.shape[1:]
        counts = chosen.sum(-1).tolist()
        many = [group for group, count in enumerate(counts) if count * d_model > width * (d_model + count)]
        few = [group for group, count in enumerate(counts) if count and group not in many]
        found = {}
        for some in parted(many, max(1, MAX_LOGITS // (width * len(vocabulary)))):
            tables = rearrange(self.basis[some], "group k d_model -> (group k) d_model") @ vocabulary.T
            for group, table in zip(some, tables.split(width), strict=True):
                found[group] = base.from_table(self.coefficients[group, chosen[group]], table)
        if few:
            vectors = torch.cat([self.coefficients[group, chosen[group]] @ self.basis[group] for group in few])
            found |= zip(few, base.increase(vectors).split([counts[group] for group in few]), strict=True)
        return torch.cat([found[group] for group, count in enumerate(counts) if count])


@dataclass(frozen=True, eq=False)
class Screen:
    """Every cell to first order, with what that misses at most, and the bases it was read against.

    `closure` is how far the parts with their bias miss the whole of what their layer adds, in the worst layer.
    """

    query: Query
    by: By
    bases: tuple[Base, ...]
    linear: Values
    square: Values
    bound: Values
    closure: float

    @classmethod
    def of(cls, query: Query, vocabulary: Vocabulary, by: By, own: bool, enough: float) -> Screen:
        """Screen a query; bounds are tightened where more cells exceed `enough` than that costs."""
        bases, linears, squares, misses = [], [], [], []
        for layer in range(query.n_layers):
            x = query.base(layer)
            x = x + query.at(layer, "hook_attn_out") if by == "neuron" else x
            base, parts = Base.of(vocabulary, query.readout, x, query.token, own), Parts.of(query, layer, by)
            if by == "neuron":
                neurons_add_up(query, layer, query.at(layer, "mlp.hook_post"))
            else:
                heads_add_up(query, layer, parts.coefficients.sum(1))
            added, bias = query.added(layer, by)
            miss = parts.read(base.direction).sum() - (added - bias) @ base.direction
            misses.append(base.factor * abs(float(miss)))
            moved = parts.moved(base)
            linears.append(moved.read(base.direction))
            squares.append(moved.squared())
            bases.append(base)
        bound = torch.stack([cheap_bound(each, base.reach) for each, base in zip(squares, bases, strict=True)])
        screened = cls(query, by, tuple(bases), torch.stack(linears), torch.stack(squares), bound, max(misses))
        tight = int((bound > enough).sum()) > vocabulary.rows.shape[-1]
        return screened.tightened() if tight else screened

    def parts(self, layer: int) -> Parts:
        """What the cells of a layer do to the stream after its norm."""
        return Parts.of(self.query, layer, self.by).moved(self.bases[layer])

    def tightened(self) -> Screen:
        """The same with the bound that knows the variance."""
        bounds = []
        for layer, base in enumerate(self.bases):
            parts = self.parts(layer)
            second, mean = parts.squared(base.second), parts.read(base.mean)
            bounds.append(tight_bound(second, mean, self.square[layer], base.reach, base.second_error))
        return replace(self, bound=torch.stack(bounds))

    def exactly(self, chosen: Chosen) -> Values:
        """The values, those of the chosen cells exact."""
        values = self.linear.clone()
        for layer, base in enumerate(self.bases):
            if bool(chosen[layer].any()):
                values[layer][chosen[layer]] = self.parts(layer).exact(base, chosen[layer])
        return values


def to_settle(bound: Values, candidates: Chosen, tolerance: float, summed: bool) -> Chosen:
    """The candidates that first order does not settle: those bounded by more than `tolerance`.

    Where a number is the sum over layers and groups, its cells share the tolerance, and as many as possible are left.
    """
    if not summed:
        return candidates & ~(bound <= tolerance)
    flat = rearrange(torch.where(candidates, bound, 0.0), "layer group cell -> (layer group) cell")
    order = flat.argsort(0)
    total = flat.gather(0, order).cumsum(0)
    open_ = torch.empty_like(total, dtype=torch.bool).scatter_(0, order, ~(total <= tolerance))
    return candidates & open_.reshape(bound.shape)


def largest(linear: Values, candidates: Chosen, top_k: int) -> Chosen:
    """The candidates whose first order is the largest in absolute value."""
    if top_k >= int(candidates.sum()):
        return candidates
    order = torch.where(candidates, linear.abs(), -1.0).flatten().topk(top_k).indices
    return torch.zeros_like(candidates).flatten().index_fill(0, order, True).reshape(candidates.shape)


def doubt(bound: Values, chosen: Chosen, candidates: Chosen) -> Values:
    """How far below its number each candidate may be: its bound, unless it was computed exactly."""
    return torch.where(candidates & ~chosen, bound, 0.0)


def certain(values: Float[Tensor, "*cell"], off: Float[Tensor, "*cell"]) -> int:
    """How many of the highest numbers, each at most `off` too high, are certainly the highest, in this order."""
    ranked, order = values.flatten().sort(descending=True, stable=True)
    least, below = ranked - off.flatten()[order], ranked.roll(-1)
    below[-1] = -torch.inf
    return int((least >= below).cumprod(0).sum())


def parted(numbers: list[int], length: int) -> list[list[int]]:
    """Lists of at most `length`."""
    return [numbers[i : i + length] for i in range(0, len(numbers), length)]
