"""The frozen-norm read-out: what a vector in the stream says about the next token.

Unusual: `z` is linear in the vector, because the norm's factor is that of the model's final stream, so contributions
add up to the model's own logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from llava_lens.kernels import upcast

MAX_LOGITS = 2**25
"""How many logits are held at a time: 128 MiB in float32."""


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
