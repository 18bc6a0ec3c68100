"""Maps of attention: its mean, its rollout through the layers, and attention weighted by the values that it moves.

Unusual: patterns are reduced to what is needed while the model runs, so no more than one layer's is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.interventions.where import layers_of
from llava_lens.errors import LensError
from llava_lens.hooks import reader
from llava_lens.kernels import upcast
from llava_lens.maps.case import Case
from llava_lens.maps.direct import glance


def attention(
    case: Case, *, layers: int | Sequence[int] | None = None, heads: int | Sequence[int] | None = None
) -> Float[Tensor, " patch"]:
    """The last position's attention to each patch, averaged over layers and heads (all, or the given ones)."""
    n = case.model.cfg.n_heads
    chosen = list(range(n)) if heads is None else [heads] if isinstance(heads, int) else list(heads)
    wrong = next((head for head in chosen if not 0 <= head < n), None)
    if wrong is not None or not chosen:
        raise LensError(f"heads={heads!r}; expected some of 0 … {n - 1}")
    rows = at_patterns(case, lambda pattern: pattern[chosen, -1].mean(0))
    return torch.stack([rows[layer] for layer in layers_of(layers, len(rows))]).mean(0)[case.patches]


def rollout(case: Case) -> Float[Tensor, " patch"]:
    """The last row of the product over layers of `(Ā + I) / 2`, with `Ā` the heads' mean (Abnar & Zuidema, eq. 1)."""
    means = at_patterns(case, lambda pattern: pattern.mean(0))
    row = torch.zeros(len(means[0]), dtype=means[0].dtype, device=means[0].device)
    row[-1] = 1.0
    for mean in reversed(means):
        mixed = (mean + torch.eye(len(mean), dtype=mean.dtype, device=mean.device)) / 2
        row = row @ (mixed / mixed.sum(-1, keepdim=True))
    return row[case.patches]


def value_norm(case: Case) -> Float[Tensor, " patch"]:
    """`Σ ‖a · v W_O‖` over layers and heads: how much each patch writes to the last position (Kobayashi et al., eq. 5).

    The norm is `a · √(v G vᵀ)` with `G = W_O W_Oᵀ`, so no vector as wide as the stream is formed.
    """
    place = glance(case).place
    total = torch.zeros(len(case.patches), dtype=torch.float64)
    for layer in range(place.n_layers):
        W_O = upcast(case.model.blocks[layer].attn.W_O).detach()
        gram = einsum(W_O, W_O, "head i d_model, head j d_model -> head i j")
        v = place.values(layer)[:, case.patches]
        squares = einsum(v, gram, v, "head patch i, head i j, head patch j -> head patch")
        norms = place.pattern(layer)[:, case.patches] * squares.clamp(min=0).sqrt()
        total += norms.sum(0).double().cpu()
    return total


def at_patterns(case: Case, read: Callable[[Float[Tensor, "head query key"]], Tensor]) -> list[Tensor]:
    """What one function makes of each layer's pattern, in float32 or better; one forward pass."""
    found: list[Tensor] = []

    @reader
    def look(act: Tensor, hook: Any) -> None:
        found.append(read(upcast(act[0])))

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(case.model.cfg.n_layers)]
    with torch.no_grad(), case.model.hooks(fwd_hooks=[(name, look) for name in names]):
        case.model(case.inputs, logits_to_keep=1)
    case.count(forward=1)
    return found
