"""Maps of what patches say directly: their contributions to the answer through the last position's attention.

Unusual: one forward pass that keeps values everywhere but patterns and streams of the last position alone. With a
second answer all increases are exact at once, because the difference of two is the difference of two logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.log_prob import TOLERANCE, log_prob_increase, names_for
from llava_lens.analysis.attribution.query import Place
from llava_lens.analysis.interventions.where import layers_of
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError
from llava_lens.hooks import reader
from llava_lens.kernels import rms_norm_parts, upcast
from llava_lens.maps.case import Case
from llava_lens.record import Cuts, Recorder


@dataclass(frozen=True)
class Glance:
    """One run's cache: values of every position, all else at the last one."""

    cache: LlavaCache

    @property
    def place(self) -> Place:
        """The last position."""
        return Place.of(self.cache, 0, -1)


def glance(case: Case) -> Glance:
    """Run the model and keep what the direct maps read."""
    names = names_for(case.model, "head", "position")
    everywhere, at_last = Recorder(Cuts()), Recorder(Cuts(slice(-1, None)))
    hooks = [(name, everywhere if name.endswith("hook_v") else at_last) for name in names]
    with torch.no_grad(), case.model.hooks(fwd_hooks=hooks):
        case.model(case.inputs, logits_to_keep=1)
    case.count(forward=1)
    acts = everywhere.stored | at_last.stored
    return Glance(LlavaCache(acts, case.model, inputs=case.inputs, asked=frozenset(names), kept=(case.last,)))


def lpi_linear(case: Case) -> Float[Tensor, " patch"]:
    """`Σ <c, ∇ log p(answer)>` over heads: the first order of the increase, an upper bound of it."""
    return lpi(case, top_k=0)


def dla(case: Case) -> Float[Tensor, " patch"]:
    """What each patch adds to the answer's logit through all heads, under the frozen final norm.

    `closure` is how far heads plus bias miss the attention's output.
    """
    return logit_cells(case, glance(case)).sum((0, 1))[case.patches]


def lpi(
    case: Case, *, exact: bool = False, tolerance: int | float = TOLERANCE, top_k: int | None = None
) -> Float[Tensor, " patch"]:
    """The log-probability increase of each patch, summed over all heads; `log_prob_increase` says what the options do.

    The notes say how many cells (head × position) are exact.
    """
    if case.versus is not None:
        case.notes["increase"] = SAME
        return dla(case)
    return increases(case, glance(case), exact=exact, tolerance=tolerance, top_k=top_k)


def lpi_top(
    case: Case, *, k: int = 1, exact: bool = False, tolerance: int | float = TOLERANCE
) -> Float[Tensor, " patch"]:
    """The increase of each patch through the `k` heads with the highest increase; the paper draws one."""
    n = case.model.cfg.n_layers * case.model.cfg.n_heads
    if not 1 <= k <= n:
        raise LensError(f"k={k}; expected 1 … {n} heads")
    run = glance(case)
    if case.versus is not None:
        cells = logit_cells(case, run)
        order = cells.sum(-1).flatten().topk(k).indices
        case.notes |= {"increase": SAME, "heads": [list(divmod(int(i), cells.shape[1])) for i in order]}
        return cells.flatten(0, 1)[order].sum(0)[case.patches]
    top = log_prob_increase(run.cache, case.token, "head", exact=True).top(k)
    case.notes["heads"] = [list(entry.place) for entry in top]
    heads = [(entry.place[0], entry.place[1]) for entry in top]
    return increases(case, run, heads=heads, exact=exact, tolerance=tolerance)


SAME = "the difference of two increases is that of the logits"
"""Why no increase is computed where there is a second answer."""


def increases(case: Case, run: Glance, **how: Any) -> Float[Tensor, " patch"]:
    """The increase of each patch, summed over heads."""
    found = log_prob_increase(run.cache, case.token, "position", **how)
    case.closure = found.closure
    case.notes |= {"exact_cells": found.method["exact"], "cells": found.method["of"]}
    return found.values[case.patches]


def logit_cells(case: Case, run: Glance) -> Float[Tensor, "layer head source"]:
    """What every head adds from every position to the answer's logit, or to its lead over another one's."""
    model, place, layers = case.model, run.place, []
    final = place.at(place.n_layers - 1, "hook_resid_post")
    unembed = upcast(model.unembed.weight[[case.token, case.token if case.versus is None else case.versus]]).detach()
    read = unembed[0] - (0 if case.versus is None else unembed[1])
    read = read * upcast(model.ln_final.w).detach() * (final.pow(2).mean() + model.cfg.eps).rsqrt()
    misses = []
    for layer in range(place.n_layers):
        attn = model.blocks[layer].attn
        through = upcast(attn.W_O).detach() @ read
        cells = place.pattern(layer) * einsum(place.values(layer), through, "head key d_head, head d_head -> head key")
        whole = (place.at(layer, "hook_attn_out") - upcast(attn.b_O).detach()) @ read
        misses.append(abs(float(cells.sum() - whole)))
        layers.append(cells)
    case.closure = max(misses)
    return torch.stack(layers)


def logit_lens(case: Case, *, layer: int | str = "best") -> Float[Tensor, " patch"]:
    """The answer's probability read from each patch's own stream behind a layer, through the final norm.

    "best" is the highest of all layers, "mean" their mean. With a second answer it is the difference of logits.
    """
    n = case.model.cfg.n_layers
    if isinstance(layer, str) and layer not in ("best", "mean"):
        raise LensError(f"layer={layer!r}; expected a layer, 'best' or 'mean'")
    layers = layers_of(None if isinstance(layer, str) else layer, n)
    gain, unembed = upcast(case.model.ln_final.w).detach(), upcast(case.model.unembed.weight).detach()
    found: list[Tensor] = []

    @reader
    def look(act: Tensor, hook: Any) -> None:
        normed, _ = rms_norm_parts(act[0, case.patches], case.model.cfg.eps)
        runs = case.measure((normed * gain) @ unembed.T)
        found.append(runs.prob if case.versus is None else runs.score)

    hooks = [(f"blocks.{each}.hook_resid_post", look) for each in layers]
    with torch.no_grad(), case.model.hooks(fwd_hooks=hooks):
        case.model(case.inputs, logits_to_keep=1)
    case.count(forward=1)
    by_layer = torch.stack(found)
    return by_layer.amax(0) if layer == "best" else by_layer.mean(0)
