"""What a head reads at a position and what it brings to a query, in vocabulary space.

Unusual: key input and value input split the stream by where it comes from, earlier attentions or earlier MLPs; both
carry how far they and the embedding miss the stream itself.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.answers import Word
from llava_lens.analysis.attribution.needs import STREAM, last_stream, model_of, need, whole
from llava_lens.analysis.attribution.query import Place, rows_of
from llava_lens.analysis.attribution.rebuild import heads_add_up
from llava_lens.analysis.lenses.chosen import Chosen, Positions, asked
from llava_lens.analysis.lenses.lens import call_of, scale_of
from llava_lens.analysis.lenses.words import UNITS, Lens, Reader, facts_of, same_shape
from llava_lens.analysis.scores import Scores
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError
from llava_lens.kernels import upcast


def key_input(
    cache: LlavaCache,
    layer: int,
    position: Positions,
    answer: Word = None,
    *,
    norm: str = "frozen",
    query: int = -1,
    row: int | None = None,
    top: int = 5,
    by: str = "log_prob",
) -> Lens:
    """Earlier attention outputs in the stream before a layer, read as words: `x[l] − x[0] − Σ_{j<l} F[j]`.

    `F` are the MLPs' outputs, their biases included (arXiv 2411.10950). `position` is a number, several, a role, a word
    of the prompt, or None for all. The final norm is "frozen" at the scale of the model's final stream at `query`, or
    each vector's "own". `answer` is the word to score, by default the model's own choice at `query`; `by` is "log_prob"
    or "logit". The closure is how far key input + value input + `x[0]` miss `x[l]`, in the word's logit.

    Raises `LensError` for missing entries (naming them), and for a layer, positions or a row that are not there.
    """
    return _input("key_input", cache, layer, position, answer, norm, query, row, top, by)


def value_input(
    cache: LlavaCache,
    layer: int,
    position: Positions,
    answer: Word = None,
    *,
    norm: str = "frozen",
    query: int = -1,
    row: int | None = None,
    top: int = 5,
    by: str = "log_prob",
) -> Lens:
    """Earlier MLP outputs in the stream before a layer, read as words: `x[l] − x[0] − Σ_{j<l} A[j]`, `[position]`.

    `A` are the attentions' outputs, their biases included. Everything else as in `key_input`.
    """
    return _input("value_input", cache, layer, position, answer, norm, query, row, top, by)


@torch.no_grad()
def _input(
    what: str, cache: LlavaCache, layer: int, position: Positions, answer: Word,
    norm: str, query: int, row: int | None, top: int, by: str,
) -> Lens:  # fmt: skip
    model, layer = model_of(cache), layer_of(cache.model, layer)
    outputs = {kind: [f"blocks.{j}.{kind}" for j in range(layer)] for kind in ("hook_attn_out", "hook_mlp_out")}
    here = f"blocks.{layer}.hook_resid_pre"
    ends = [last_stream(model)] if answer is None or norm == "frozen" else []
    need(cache, [STREAM, here, *outputs["hook_attn_out"], *outputs["hook_mlp_out"], *ends], call_of(what))
    each = []
    for i in rows_of(cache, row):
        token, readout = asked(cache, i, query, answer)
        reader = Reader.of(model, "output", by, scale_of(cache, readout, norm))
        chosen = Chosen.of(cache, i, position)
        start, stream = chosen.vectors(STREAM), chosen.vectors(here)
        attn, mlp = (
            sum((chosen.vectors(name) for name in names), torch.zeros_like(start)) for names in outputs.values()
        )
        vectors = stream - start - (mlp if what == "key_input" else attn)
        missing = stream - start - attn - mlp  # key input + value input + x[0] − x[l]
        closure = None if reader.scale is None else float(_logits(reader, missing, token).abs().max())
        method = facts_of(model, what.replace("_", " "), token, layer=layer, norm=norm)
        each.append(_at_positions(chosen, reader, vectors, token, top, method, closure))
    return same_shape(each)


@torch.no_grad()
def head_output(
    cache: LlavaCache,
    layer: int,
    head: int,
    source: Positions = None,
    answer: Word = None,
    *,
    norm: str = "frozen",
    position: int = -1,
    row: int | None = None,
    top: int = 5,
    by: str = "log_prob",
) -> Lens:
    """What a head brings to the query `position` from each source, `a · v @ W_O`, read as words: `[position]`.

    `source` are the positions it comes from: numbers, a role, a word of the prompt, or None for all. With
    `by="logit"` and the norm "frozen" the scores of all sources add up to the head's part of the word's logit; where
    all are read and the cache holds `hook_z`, the closure is how far they miss it. The rest as in `key_input`.

    Raises `LensError` for missing entries (naming them), and for a head, positions or a row that are not there.
    """
    model, layer, head = model_of(cache), layer_of(cache.model, layer), head_of(cache.model, head)
    names = [STREAM, f"blocks.{layer}.attn.hook_pattern", f"blocks.{layer}.attn.hook_v"]
    need(cache, [*names, *([last_stream(model)] if answer is None or norm == "frozen" else [])], call_of("head_output"))
    W_O, mixed = upcast(model.blocks[layer].attn.W_O[head]).detach(), f"blocks.{layer}.attn.hook_z"
    each = []
    for i in rows_of(cache, row):
        token, readout = asked(cache, i, position, answer)
        reader = Reader.of(model, "output", by, scale_of(cache, readout, norm))
        chosen, query = Chosen.of(cache, i, source), Place.of(cache, i, position)
        pattern, v = query.pattern(layer)[head], query.values(layer)[head]
        if len(pattern) != len(v):
            raise LensError(
                f"values of {len(v)} positions, attention to {len(pattern)}: output by source takes a cache of "
                "the whole prompt in one run, without pos_slice"
            )
        if mixed in cache and f"blocks.{layer}.hook_attn_out" in cache:
            heads_add_up(query, layer, query.at(layer, "attn.hook_z"))
        vectors = (pattern[:, None] * v)[chosen.read] @ W_O
        closure = None
        if source is None and mixed in cache and reader.scale is not None:
            missing = vectors.sum(0) - query.at(layer, "attn.hook_z")[head] @ W_O
            closure = float(_logits(reader, missing, token).abs())
        method = facts_of(model, "head output", token, layer=layer, head=head, query=query.in_prompt, norm=norm)
        each.append(_at_positions(chosen, reader, vectors, token, top, method, closure))
    return same_shape(each)


def _logits(reader: Reader, vectors: Float[Tensor, "*rows d_model"], token: int) -> Float[Tensor, "*rows"]:
    """One word's logit under the frozen norm."""
    assert reader.gain is not None and reader.scale is not None
    return (vectors * reader.gain * reader.scale) @ reader.matrix[token]


def _at_positions(
    chosen: Chosen, reader: Reader, vectors: Tensor, token: int, top: int, method: dict[str, Any], closure: float | None
) -> Lens:
    """One vector per position, read as words."""
    read = chosen.spread(reader.read(vectors, token, top))
    labels = {"position": chosen.labels}
    scores = Scores(read.scores, ("position",), labels, UNITS[reader.by], method, closure, chosen.roles)
    return Lens.of(chosen.place.cache.model, read, scores)


def layer_of(model: Any, layer: int) -> int:
    """A layer, negative ones from the end; raises `LensError` where there is none."""
    n = model.cfg.n_layers
    return whole("layer", layer, -n, n - 1) % n


def head_of(model: Any, head: int) -> int:
    """A head; raises `LensError` where there is none."""
    return whole("head", head, 0, model.cfg.n_heads - 1)
