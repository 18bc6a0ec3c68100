"""The frozen-norm read-out: what a vector in the stream says about the next token, and exact log-probability increases.

Unusual: increases come from differences of logits alone (`δ_w − log Σ p e^δ`), never from two log-softmaxes that
cancel, so a contribution of 1e-6 nats keeps its digits in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.kernels import upcast

MAX_LOGITS = 2**25
"""How many logits are held at a time while increases are computed: 128 MiB in float32."""


@dataclass(frozen=True)
class Readout:
    """`z(y) = W_U (gain ∘ y · s)` at one query position, in float32 or better.

    `s` is one over the root mean square of the model's final stream there, so `z` is linear and contributions add up
    to the model's own logits.
    """

    unembed: Float[Tensor, "d_vocab d_model"]
    gain: Float[Tensor, " d_model"]
    final: Float[Tensor, " d_model"]
    eps: float

    @classmethod
    def of(cls, model: Any, final: Float[Tensor, " d_model"], unembed: Tensor | None = None) -> Readout:
        """The read-out of a model whose stream ends as `final`; `unembed` shares an upcast `W_U` between rows."""
        unembed = upcast(model.unembed.weight) if unembed is None else unembed
        return cls(unembed.detach(), upcast(model.ln_final.w).detach(), upcast(final), model.cfg.eps)

    @property
    def scale(self) -> float:
        """The frozen factor `s`."""
        return float((self.final.pow(2).mean() + self.eps).rsqrt())

    def logits(self, y: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """`z(y)`."""
        return (upcast(y) * (self.gain * self.scale)) @ self.unembed.T

    def log_probs(self, y: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """`log softmax z(y)`."""
        return self.logits(y).log_softmax(-1)

    def gradient(self, base: Float[Tensor, " d_model"], token: int) -> Float[Tensor, " d_model"]:
        """`G_b`, the gradient of `log softmax(z(b))[token]` by `b`; `<y, G_b>` is never below the increase."""
        expected = self.log_probs(base).exp() @ self.unembed
        return self.scale * self.gain * (self.unembed[token] - expected)

    def increase(
        self, y: Float[Tensor, "rows d_model"], base: Float[Tensor, " d_model"], token: int
    ) -> Float[Tensor, " rows"]:
        """`log softmax(z(base + y))[token] − log softmax(z(base))[token]` of every row, over the full vocabulary."""
        log_p = self.log_probs(base)
        rows = max(1, MAX_LOGITS // len(log_p))
        return torch.cat([shift(self.logits(part), log_p, token) for part in y.split(rows)])


def shift(delta: Float[Tensor, "rows d_vocab"], log_p: Float[Tensor, " d_vocab"], token: int) -> Float[Tensor, " rows"]:
    """What logits moved by `delta` do to one token's log-probability: `δ_w − log Σ_v p_v exp(δ_v)`."""
    near = torch.log1p((torch.expm1(delta.clamp(-1, 1)) * log_p.exp()).sum(-1))
    far = torch.logsumexp(log_p + delta, -1)
    return delta[:, token] - torch.where(delta.abs().amax(-1) > 1, far, near)
