"""What a vector added to the stream does to the next token's log-probability: exactly, to first order, and a bound.

Unusual: increases come from differences of logits alone, `<y, G> − log1p(Σ p expm1(δ − E δ))`, never from two
log-softmaxes that cancel, so a contribution of 1e-6 nats keeps its digits in float32. The second term is what first
order misses; it is bounded for every vector by a matrix of the stream's width, without forming any logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens import kernels
from llava_lens.analysis.attribution.readout import Readout
from llava_lens.kernels import upcast

LARGEST = 50.0
"""Beyond this `e^b` says nothing that Hoeffding's lemma does not."""
KEPT = 2
"""How many times `d_model` of the likeliest tokens the bound takes with their own probability."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The rows of `W_U`, less their mean, times the final norm's gain, in float32 or better.

    The mean moves all logits alike, which no probability sees; without it rounding is smaller.
    """

    rows: Float[Tensor, "d_vocab d_model"]

    @classmethod
    def of(cls, model: Any) -> Vocabulary:
        unembed = upcast(model.unembed.weight.detach())
        return cls((unembed - unembed.mean(0)).mul_(upcast(model.ln_final.w.detach())))

    @cached_property
    def gram(self) -> Float[Tensor, "d_model d_model"]:
        """`Σ_v r_v r_vᵀ`, of which one half is computed and mirrored."""
        width = self.rows.shape[-1]
        gram, step = self.rows.new_zeros(width, width), -(-width // 8)
        for start in range(0, width, step):
            gram[start : start + step, start:] = self.rows[:, start : start + step].T @ self.rows[:, start:]
        return gram.triu() + gram.triu(1).T

    @cached_property
    def squares(self) -> Float[Tensor, " d_vocab"]:
        """`‖r_v‖²`."""
        return torch.linalg.vector_norm(self.rows, dim=-1).square()


@dataclass(frozen=True, eq=False)
class Base:
    """A stream `x` that vectors are added to, and the probabilities it reads as.

    `factor` is what the norm multiplies it by: one over the root mean square of the model's final stream, or of `x`
    itself with `own`. All that is asked takes `moved`, by how much the stream changes after its norm: `s·y` under the
    frozen factor, `s'·(x + y) − s·x` under its own. Logits are linear in it either way.
    """

    vocabulary: Vocabulary
    x: Float[Tensor, " d_model"]
    token: int
    factor: float
    own: bool
    log_p: Float[Tensor, " d_vocab"]
    p: Float[Tensor, " d_vocab"]

    @classmethod
    def of(cls, vocabulary: Vocabulary, readout: Readout, x: Float[Tensor, " d_model"], token: int, own: bool) -> Base:
        """A stream read under the factor of the read-out, or under its `own`."""
        factor = float((x.pow(2).mean() + readout.eps).rsqrt()) if own else readout.scale
        log_p = (vocabulary.rows @ (x * factor)).log_softmax(-1)
        return cls(vocabulary, x, token, factor, own, log_p, log_p.exp())

    @cached_property
    def mean(self) -> Float[Tensor, " d_model"]:
        """`E_p r`."""
        return self.p @ self.vocabulary.rows

    @property
    def log_prob(self) -> float:
        """The token's log-probability before anything is added."""
        return float(self.log_p[self.token])

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The gradient of the token's log-probability by the stream after its norm: `r_w − E_p r`."""
        return self.vocabulary.rows[self.token] - self.mean

    def stretch(self, dot: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """`s'` of `x + y`, and `s' − s` without cancellation, from `<x, y>` and `‖y‖²`."""
        if not self.own:
            return torch.full_like(dot, self.factor), torch.zeros_like(dot)
        grown = (2 * dot + square) * (self.factor**2 / len(self.x))
        grown = grown.clamp(min=torch.finfo(grown.dtype).eps - 1)  # a stream that y takes back to nothing
        change = self.factor * torch.expm1(-0.5 * torch.log1p(grown))
        return self.factor + change, change

    def moved(self, y: Float[Tensor, "cell d_model"]) -> Float[Tensor, "cell d_model"]:
        """By how much adding each vector moves the stream after its norm."""
        factor, change = self.stretch(y @ self.x, y.square().sum(-1))
        return factor[:, None] * y + change[:, None] * self.x

    def increase(self, moved: Float[Tensor, "cell d_model"]) -> Float[Tensor, " cell"]:
        """What each vector adds to the token's log-probability, exactly, over the full vocabulary."""
        return self.from_table(moved, self.vocabulary.rows.T)

    def from_table(
        self, coefficients: Float[Tensor, "cell k"], table: Float[Tensor, "k d_vocab"]
    ) -> Float[Tensor, " cell"]:
        """The same for vectors given as sums of some whose logits are in a table."""
        return kernels.increase_from_table(coefficients, table, self.log_p, self.token, self.p)

    @cached_property
    def reach(self) -> float:
        """`max_v ‖r_v − E_p r‖`: no logit moves further from the mean than this times the vector's length."""
        vocabulary = self.vocabulary
        distance = vocabulary.squares - 2 * (vocabulary.rows @ self.mean) + self.mean.square().sum()
        return float(distance.max().clamp(min=0).sqrt())

    @cached_property
    def second(self) -> Float[Tensor, "d_model d_model"]:
        """A matrix that no second moment exceeds: `Σ_v max(p_v, τ) r_v r_vᵀ ≽ Σ_v p_v r_v r_vᵀ`.

        `τ` is the probability of the first token left out of the `KEPT · d_model` likeliest, so the sum over the whole
        vocabulary is that of one matrix for all streams.
        """
        vocabulary = self.vocabulary
        count = min(KEPT * vocabulary.rows.shape[-1] + 1, len(self.p))
        p, which = self.p.topk(count)
        own = vocabulary.rows[which] * (p - p[-1]).sqrt()[:, None]
        return torch.addmm(vocabulary.gram * p[-1], own.T, own)

    @cached_property
    def second_error(self) -> float:
        """What rounding may take from `yᵀ second y`, in units of `‖y‖²`: it goes by the matrix, not by the product."""
        return 8 * torch.finfo(self.second.dtype).eps * float(torch.linalg.matrix_norm(self.second))


def cheap_bound(square: Float[Tensor, "*cell"], reach: float) -> Float[Tensor, "*cell"]:
    """What first order misses at most, from `‖moved‖²`: `R²/8` with `R` the range of `δ` (Hoeffding's lemma)."""
    return square * (reach**2 / 2)


def tight_bound(
    second: Float[Tensor, "*cell"],
    mean: Float[Tensor, "*cell"],
    square: Float[Tensor, "*cell"],
    reach: float,
    error: float,
) -> Float[Tensor, "*cell"]:
    """The same from the second moment and the mean of `δ` too: `Var δ · (e^b − 1 − b) / b²` (Bennett's inequality).

    `b` is what no `δ_v − E δ` exceeds. The variance is given room for the rounding of its terms, `error · ‖moved‖²`: a
    token that is all but impossible may be raised so far that its share of the variance, lost in rounding, decides.
    """
    variance = (second * (1 + 1e-5) - mean.square()).clamp(min=0) + error * square
    b = (square.double().sqrt() * reach).clamp(min=1e-3)
    missed = torch.log1p(variance * (torch.expm1(b) - b) / b.square()).to(variance.dtype)
    cheap = cheap_bound(square, reach)
    return torch.where(b < LARGEST, missed.minimum(cheap), cheap)
