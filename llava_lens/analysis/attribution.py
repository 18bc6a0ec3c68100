"""Log-probability increase of layers, heads and positions, from the entries of a cache (arXiv 2411.10950, 2312.12141).

Unusual: every head and position is screened with the linear form, which costs one vector per layer and is never below
the increase; the cells that matter are then computed exactly, over the full vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from llava_lens.analysis.query import Answer, By, Place, Query
from llava_lens.analysis.scores import Scores, stacked
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError
from llava_lens.kernels import upcast

Head = tuple[int, int]

NEEDED: dict[By, tuple[str, ...]] = {
    "layer": ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"),
    "head": ("hook_resid_pre", "attn.hook_z", "hook_attn_out"),
    "position": ("hook_resid_pre", "attn.hook_pattern", "attn.hook_v", "hook_attn_out"),
    ("head", "position"): ("hook_resid_pre", "attn.hook_pattern", "attn.hook_v", "hook_attn_out"),
    "attention": ("attn.hook_pattern",),
}
"""What each question asks of every block's entries; all but `attention` need the last `hook_resid_post` too."""


def names_for(model: Any, *by: By) -> list[str]:
    """The cache entries that `log_prob_increase(by=…)` reads (`"attention"`: `mean_attention`), for `names_filter`.

    >>> from llava_lens import HookedLlava, LlavaConfig
    >>> cfg = LlavaConfig(n_layers=1, d_model=8, n_heads=2, n_key_value_heads=2, d_head=4, d_mlp=8, act_fn="silu",
    ...                   eps=1e-5, normalization_type="RMS", n_ctx=16, d_vocab=11)
    >>> names_for(HookedLlava(cfg), "head")
    ['blocks.0.hook_resid_pre', 'blocks.0.attn.hook_z', 'blocks.0.hook_attn_out', 'blocks.0.hook_resid_post']
    """
    unknown = [each for each in by if each not in NEEDED]
    if unknown:
        raise LensError(f"by={unknown[0]!r}; expected {', '.join(map(repr, NEEDED))}")
    suffixes = dict.fromkeys(suffix for each in by for suffix in NEEDED[each])
    last = model.cfg.n_layers - 1
    names = [f"blocks.{layer}.{suffix}" for layer in range(last + 1) for suffix in suffixes]
    return names if set(by) == {"attention"} else [*names, f"blocks.{last}.hook_resid_post"]


def log_prob_increase(
    cache: LlavaCache,
    answer: Answer = None,
    by: By = "layer",
    position: int = -1,
    *,
    row: int | None = None,
    heads: Iterable[Head] | None = None,
    top_k: int = 1024,
    exact: bool = False,
) -> Scores:
    """How much each part of the model raises the log-probability of `answer`, in nats.

    `LPI(y) = log softmax z(base + y)[answer] − log softmax z(base)[answer]`, with `z` the unembedding under the norm
    scale of the model's own final stream and `base` the stream that `y` is added to (arXiv 2411.10950). By "layer":
    `[layer, part]`, attention and MLP, which telescope to `log p(answer)`; by "head": `[layer, head]`; by
    ("head", "position"): `[layer, head, position]`; by "position": `[position]`, summed over all heads or the given
    `heads`, pairs (layer, head).

    The `top_k` cells with the largest linear form (in absolute value) are exact, all with `exact`; the rest is the
    linear form, an upper bound that is the tighter the smaller it is. `method` says how many are exact, and how many of
    the highest are certain to be the highest. `closure` is how far the telescoping sum, or heads plus bias against the
    attention's output, misses.

    `answer` is a token id or a string that is one token, by default the model's own choice. `position` is the query,
    -1 the last that is not padding. Of a batch all rows are scored, with an axis `batch`, or one `row`.

    Raises `LensError` for missing entries (naming them), a string of several tokens, a position or row not there.
    """
    if by not in NEEDED or by == "attention":
        raise LensError(f"by={by!r}; expected 'layer', 'head', 'position' or ('head', 'position')")
    if heads is not None and by != "position":
        raise LensError(f"heads= with by={by!r}: only by='position' sums over heads")
    chosen = None if heads is None else head_mask(cache.model, heads)
    need(cache, by)
    unembed = upcast(cache.model.unembed.weight)
    each = []
    for i in rows_of(cache, row):
        query = Query.asking(cache, i, position, answer, unembed)
        each.append(by_layer(query) if by == "layer" else by_cell(query, by, chosen, None if exact else top_k))
    return joined(each)


def mean_attention(cache: LlavaCache, position: int = -1, *, row: int | None = None) -> Scores:
    """The attention of a query to every position, `[position]`, averaged over all layers and heads; it sums to 1.

    `position` and `row` as in `log_prob_increase`, so are the errors.
    """
    need(cache, "attention")
    each = []
    for i in rows_of(cache, row):
        place = Place.of(cache, i, position)
        patterns = [place.pattern(layer) for layer in range(cache.model.cfg.n_layers)]
        mean = torch.stack([pattern.mean(0) for pattern in patterns]).mean(0)
        method = {"score": "mean attention", "query": place.in_prompt}
        each.append(
            Scores(mean, ("position",), place.labels, "", method, abs(float(mean.sum()) - 1), place.roles_or_none)
        )
    return joined(each)


# ---- one query position of one row of a cache


def rows_of(cache: LlavaCache, row: int | None) -> list[int]:
    """The rows to score: the given one, or all."""
    name = next(name for name in cache.cache_dict if name.startswith("blocks."))
    n = len(cache[name]) if cache.has_batch_dim else 1
    if row is not None and not -n <= row < n:
        raise LensError(f"row {row}; expected {-n} … {n - 1}")
    return list(range(n)) if row is None else [row % n]


def joined(each: Sequence[Scores]) -> Scores:
    """The scores of one row as they are, of several with an axis `batch`."""
    return each[0] if len(each) == 1 else stacked(each)


def need(cache: LlavaCache, by: By) -> None:
    """Raise `LensError` naming what a question needs and the cache lacks."""
    names = names_for(cache.model, by)
    missing = [name for name in names if name not in cache]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise LensError(
            f"the cache lacks {shown}; run with names_filter=names_for(model, {by!r}) "
            "(llava_lens.analysis.names_for), or without a filter"
        )


def head_mask(model: Any, heads: Iterable[Head]) -> Bool[Tensor, "layer head"]:
    """Which heads were named; raises `LensError` for one that is not there and for none."""
    layers, n = model.cfg.n_layers, model.cfg.n_heads
    mask = torch.zeros(layers, n, dtype=torch.bool)
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < n):
            raise LensError(f"head ({layer}, {head}); expected (0 … {layers - 1}, 0 … {n - 1})")
        mask[layer, head] = True
    if not mask.any():
        raise LensError("heads= names no head; leave it out for all of them")
    return mask


# ---- the scores of one query


def by_layer(query: Query) -> Scores:
    """Attention and MLP of every layer, exact; they telescope from the embedding to the answer's log-probability."""
    values = query.readout.final.new_empty(query.n_layers, 2)
    for layer in range(query.n_layers):
        x, attn, mlp = (query.at(layer, name) for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"))
        values[layer, 0] = query.readout.increase(attn[None], x, query.token)[0]
        values[layer, 1] = query.readout.increase(mlp[None], x + attn, query.token)[0]
    whole = query.readout.log_probs(torch.stack((query.readout.final, query.base(0))))[:, query.token]
    closure = abs(float(values.sum()) - float(whole[0] - whole[1]))
    method = {**query.method, "log_prob": float(whole[0]), "log_prob_of_embedding": float(whole[1])}
    return Scores(values, ("layer", "part"), {"part": ("attn", "mlp")}, "nats", method, closure, None)


def by_cell(query: Query, by: By, heads: Tensor | None, top_k: int | None) -> Scores:
    """Heads, or heads × positions: all by the linear form, then the `top_k` largest (None: all) exactly."""
    linear, closure = screen(query, by)
    candidates = linear.new_ones(linear.shape, dtype=torch.bool)
    if heads is not None:
        candidates &= heads[..., None].to(linear.device)
    chosen = largest(linear, candidates, top_k)
    values = torch.where(candidates, linear, 0.0)
    for layer in range(query.n_layers):
        cells = chosen[layer].nonzero(as_tuple=True)
        if len(cells[0]):
            vectors = vectors_of(query, layer, by, cells)
            values[layer][cells] = query.readout.increase(vectors, query.base(layer), query.token)
    method = {**query.method, "exact": int(chosen.sum()), "of": int(candidates.sum())}
    method["certain"] = certain(values, chosen, candidates)
    if by == "head":
        return Scores(values[..., 0], ("layer", "head"), {}, "nats", method, closure, None)
    roles, axes = query.roles_or_none, ("layer", "head", "position")
    scores = Scores(values, axes, query.labels, "nats", method, closure, roles)
    return scores if by == ("head", "position") else scores.sum("layer", "head")


def screen(query: Query, by: By) -> tuple[Float[Tensor, "layer head source"], float]:
    """The linear form of every cell, and how far heads plus bias miss the attention's output (the worst layer)."""
    layers, misses = [], []
    for layer in range(query.n_layers):
        gradient = query.gradient(layer)
        read = query.W_O(layer) @ gradient
        linear = einsum(query.mixtures(layer, by), read, "head source d_head, head d_head -> head source")
        bias = upcast(query.cache.model.blocks[layer].attn.b_O).detach() @ gradient
        misses.append(abs(float(linear.sum() + bias - query.at(layer, "hook_attn_out") @ gradient)))
        layers.append(linear)
    return torch.stack(layers), max(misses)


def largest(linear: Tensor, candidates: Tensor, top_k: int | None) -> Bool[Tensor, "layer head source"]:
    """The cells whose linear form is the largest in absolute value; all candidates for None."""
    if top_k is None or top_k >= int(candidates.sum()):
        return candidates
    if top_k < 0:
        raise LensError(f"top_k={top_k}; expected 0 or more")
    order = torch.where(candidates, linear.abs(), -1.0).flatten().topk(top_k).indices
    return torch.zeros_like(candidates).flatten().index_fill(0, order, True).reshape(candidates.shape)


def vectors_of(query: Query, layer: int, by: By, cells: tuple[Tensor, ...]) -> Float[Tensor, "cell d_model"]:
    """What the cells (heads, sources) of one layer add to the stream."""
    mixtures, W_O = query.mixtures(layer, by)[cells], query.W_O(layer)
    out = mixtures.new_empty(len(mixtures), W_O.shape[-1])
    for head in cells[0].unique():
        own = cells[0] == head
        out[own] = mixtures[own] @ W_O[head]
    return out


def certain(values: Tensor, exact: Tensor, candidates: Tensor) -> int:
    """How many of the highest scores are certainly the highest: exact, and above every bound that is left."""
    left = values[candidates & ~exact]
    return int((values[exact] > left.max()).sum()) if len(left) else int(exact.sum())
