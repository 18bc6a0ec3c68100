"""Log-probability increase of layers, heads, positions and neurons, from a cache (arXiv 2411.10950, 2312.12141).

Unusual: every cell is screened to first order, with a bound on what that misses; only the cells that the bound does not
settle are computed over the full vocabulary, so all heads × positions cost little more than one vector per layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from llava_lens.analysis.attribution.answers import Several, Word, check_several, predicted_at, tokens_of, told
from llava_lens.analysis.attribution.cells import Screen, certain, doubt, largest, to_settle
from llava_lens.analysis.attribution.increase import Base, Vocabulary
from llava_lens.analysis.attribution.needs import many, model_of, need, one_of, stack_names, whole
from llava_lens.analysis.attribution.query import By, Place, Query, rows_of
from llava_lens.analysis.scores import Scores, stacked
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError
from llava_lens.kernels import upcast

Head = tuple[int, int]
TOLERANCE = 1e-4
"""How far a number may be off unless told otherwise, in nats."""
SCALES = ("final", "own")

NEEDED: dict[By, tuple[str, ...]] = {
    "layer": ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"),
    "head": ("hook_resid_pre", "attn.hook_z", "hook_attn_out"),
    "position": ("hook_resid_pre", "attn.hook_pattern", "attn.hook_v", "hook_attn_out"),
    ("head", "position"): ("hook_resid_pre", "attn.hook_pattern", "attn.hook_v", "hook_attn_out"),
    "neuron": ("hook_resid_pre", "hook_attn_out", "mlp.hook_post", "hook_mlp_out"),
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
    names = stack_names(model, NEEDED, by)
    return names[1:-1] if set(by) == {"attention"} else names


def log_prob_increase(
    cache: LlavaCache,
    answer: Word = None,
    by: By = "layer",
    position: int = -1,
    *,
    row: int | None = None,
    heads: Iterable[Head] | None = None,
    scale: str = "final",
    several: Several = None,
    tolerance: float = TOLERANCE,
    top_k: int | None = None,
    exact: bool = False,
) -> Scores:
    """How much each part of the model raises the log-probability of `answer`, in nats (arXiv 2411.10950).

    `LPI(y) = log softmax z(base + y)[answer] − log softmax z(base)[answer]`, with `base` the stream that `y` is added
    to. By "layer": `[layer, part]`, attention and MLP; by "head": `[layer, head]`; by ("head", "position"):
    `[layer, head, position]`; by "position": `[position]`, summed over all heads or the given `heads`, pairs
    (layer, head); by "neuron": `[layer, neuron]`, what each neuron of an MLP adds behind the attention. With `scale`
    "final" `z` is the unembedding under the norm factor of the model's own final stream, as in the paper; with "own"
    `base` and `base + y` are each normed by themselves. Layers telescope to `log p(answer)` either way.

    No number is off by more than `tolerance` nats, rounding aside: first order, which is never below the increase, is
    kept where it is certain to be that close (Hoeffding's lemma, Bennett's inequality), all else is computed over the
    full vocabulary; layers always are. `exact` computes everything so; `top_k` instead the cells whose first order is
    the largest in absolute value, whatever the others miss. `method` says how many are exact, how far a number may be
    off at most (`certified`), and how many of the highest cells are certain to be the highest. `closure` is how far the
    telescoping sum, or the parts plus bias against what their layer adds, misses.

    `answer` is a token id or a string, by default the model's own choice. Of a string of several tokens
    `several="first"` scores the first; "all" adds up all, each at the position where it is predicted, the last at
    `position`, with their start in the prompt. `position` is the query, -1 the last that is not padding. Of a batch all
    rows are scored, with an axis `batch`, or one `row`.

    Raises `LensError` for missing entries (naming them), those of another model, a string of several tokens without
    `several`, a position or row not there, an unknown `by` or `scale`, and a tolerance that is not above zero.
    """
    check(heads, by, scale, tolerance, top_k, exact)
    check_several(several)
    need(cache, names_for(model_of(cache), by), f"names_for(model, {by!r})")
    chosen = None if heads is None else head_mask(cache.model, heads)
    asked = Asked(by, chosen, scale == "own", tolerance, top_k, exact, Vocabulary.of(cache.model))
    unembed = upcast(cache.model.unembed.weight)
    rows = rows_of(cache, row)
    return joined([of_answer(asked, questions(cache, i, position, answer, several, unembed)) for i in rows])


def mean_attention(cache: LlavaCache, position: int = -1, *, row: int | None = None) -> Scores:
    """The attention of a query to every position, `[position]`, averaged over all layers and heads; it sums to 1.

    `position` and `row` as in `log_prob_increase`, so are the errors.
    """
    need(cache, names_for(model_of(cache), "attention"), "names_for(model, 'attention')")
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


def joined(each: Sequence[Scores]) -> Scores:
    """The scores of one row as they are, of several with an axis `batch`."""
    return each[0] if len(each) == 1 else stacked(each)


def check(heads: Any, by: By, scale: str, tolerance: float, top_k: int | None, exact: bool) -> None:
    """Raise `LensError` for a question that has no answer."""
    one_of("by", (by,), (each for each in NEEDED if each != "attention"))
    if heads is not None and by != "position":
        raise LensError(f"heads= with by={by!r}: only by='position' sums over heads")
    one_of("scale", (scale,), SCALES)
    if isinstance(tolerance, bool) or not isinstance(tolerance, float | int) or not tolerance > 0:
        raise LensError(f"tolerance={tolerance!r}; expected nats above 0, as {TOLERANCE:g} (exact=True for none)")
    if top_k is not None:
        whole("top_k=", top_k, 0)
    if top_k is not None and exact:
        raise LensError(f"top_k={top_k!r} with exact=True, which computes every cell; expected one of them")


def head_mask(model: Any, heads: Iterable[Head]) -> Bool[Tensor, "layer head"]:
    """Which heads were named; raises `LensError` for one that is not there and for none."""
    layers, n = model.cfg.n_layers, model.cfg.n_heads
    mask = torch.zeros(layers, n, dtype=torch.bool)
    listed = many(heads)
    for each in [heads] if listed is None else listed:
        pair = many(each) or []
        if len(pair) != 2:
            raise LensError(f"head {each!r}; expected (0 … {layers - 1}, 0 … {n - 1}), a pair (layer, head)")
        mask[whole(f"head {each!r}: layer", pair[0], 0, layers - 1), whole("head", pair[1], 0, n - 1)] = True
    if not mask.any():
        raise LensError("heads= names no head; leave it out for all of them")
    return mask


# ---- the scores of one answer


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of every row."""

    by: By
    heads: Bool[Tensor, "layer head"] | None
    own: bool
    tolerance: float
    top_k: int | None
    exact: bool
    vocabulary: Vocabulary

    @property
    def enough(self) -> float:
        """Bounds need not be tighter than this: infinite where nobody reads them."""
        return math.inf if self.exact else self.tolerance


@dataclass(frozen=True, eq=False)
class Questions:
    """One row's queries, one per token of the answer that is scored, and what is to be said of it."""

    queries: tuple[Query, ...]
    facts: dict[str, Any]


def questions(cache: LlavaCache, row: int, position: int, answer: Word, several: Several, unembed: Tensor) -> Questions:
    """Where each token of an answer is asked about in one row."""
    model = cache.model
    if answer is None:
        query = Query.asking(cache, row, position, None, unembed)
        return Questions((query,), told(model, [query.token]))
    ids = tokens_of(model, answer, several)
    whole = tokens_of(model, answer, "all") if several == "first" else None
    at = predicted_at(cache, row, Place.of(cache, row, position).in_prompt, ids)
    return Questions(tuple(Query.asking(cache, row, p, token, unembed) for p, token in at), told(model, ids, whole))


def of_answer(asked: Asked, questions: Questions) -> Scores:
    """The scores of an answer: of its token, or the sum of those of all its tokens, which share the tolerance."""
    n = len(questions.queries)
    asked = replace(asked, tolerance=asked.tolerance / n)
    score = by_layer if asked.by == "layer" else by_cell
    each = [score(asked, query) for query in questions.queries]
    first = each[0]
    method: dict[str, Any] = {"score": "log-probability increase", **questions.facts}
    method["query"] = first.method["query"] if n == 1 else [scores.method["query"] for scores in each]
    method["scale"] = "own" if asked.own else "final"
    if not asked.own:
        factors = [query.readout.scale for query in questions.queries]
        method["norm_scale"] = factors[0] if n == 1 else factors
    for name in SUMMED:
        if name in first.method and (n == 1 or name != "certain"):
            method[name] = sum(scores.method[name] for scores in each)
    if "tolerance" in first.method:
        method["tolerance"] = asked.tolerance * n
    closure = sum(scores.closure or 0.0 for scores in each)
    return replace(first, values=torch.stack([scores.values for scores in each]).sum(0), method=method, closure=closure)


SUMMED = ("log_prob", "log_prob_of_embedding", "exact", "of", "certified", "certain")
"""Facts that add up over the tokens of an answer; how many cells are certain to be the highest does not."""


def by_layer(asked: Asked, query: Query) -> Scores:
    """Attention and MLP of every layer, exact; they telescope from the embedding to the answer's log-probability."""

    def base(x: Tensor) -> Base:
        return Base.of(asked.vocabulary, query.readout, x, query.token, asked.own)

    values = query.readout.final.new_empty(query.n_layers, 2)
    for layer in range(query.n_layers):
        x, attn, mlp = (query.at(layer, name) for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"))
        for part, (before, y) in enumerate(((base(x), attn), (base(x + attn), mlp))):
            values[layer, part] = before.increase(before.moved(y[None]))[0]
    whole, embedded = base(query.readout.final).log_prob, base(query.base(0)).log_prob
    closure = abs(float(values.sum()) - (whole - embedded))
    method = {"query": query.in_prompt, "log_prob": whole, "log_prob_of_embedding": embedded}
    method |= {"exact": values.numel(), "of": values.numel(), "certified": 0.0}
    return Scores(values, ("layer", "part"), {"part": ("attn", "mlp")}, "nats", method, closure, None)


def by_cell(asked: Asked, query: Query) -> Scores:
    """Heads, heads × positions or neurons: all to first order, then exactly what that does not settle."""
    by, summed = asked.by, asked.by == "position"
    screened = Screen.of(query, asked.vocabulary, by, asked.own, asked.enough)
    candidates = torch.ones_like(screened.linear, dtype=torch.bool)
    if asked.heads is not None:
        candidates &= asked.heads[..., None].to(candidates.device)
    chosen, extra = candidates, {}
    if not asked.exact and asked.top_k is not None:
        chosen = largest(screened.linear, candidates, asked.top_k)
    elif not asked.exact:
        chosen, extra = to_settle(screened.bound, candidates, asked.tolerance, summed), {"tolerance": asked.tolerance}
    values = torch.where(candidates, screened.exactly(chosen), 0.0)
    off = doubt(screened.bound, chosen, candidates)
    if summed:
        values, off = values.sum((0, 1)), off.sum((0, 1))
    method = {"query": query.in_prompt, "exact": int(chosen.sum()), "of": int(candidates.sum()), **extra}
    method |= {"certified": float(off.max()), "certain": certain(values, off)}
    if by == "head":
        return Scores(values[..., 0], ("layer", "head"), {}, "nats", method, screened.closure, None)
    if by == "neuron":
        return Scores(values[:, 0], ("layer", "neuron"), {}, "nats", method, screened.closure, None)
    axes = ("position",) if summed else ("layer", "head", "position")
    return Scores(values, axes, query.labels, "nats", method, screened.closure, query.roles_or_none)
