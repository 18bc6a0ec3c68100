"""MLP neurons in vocabulary space: those that raise a word, what they promote, and which neurons before them feed them.

Unusual: every list of neurons is part of a sum that is kept with it: upstream neurons, heads, embedding and biases add
up to the pre-activation (or the attention score) that the model had, and the closure says how far they miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.answers import Word
from llava_lens.analysis.attribution.log_prob import log_prob_increase
from llava_lens.analysis.attribution.needs import CHANGED, STREAM, many, model_of, need, one_of, slack, whole
from llava_lens.analysis.attribution.query import Place, rows_of
from llava_lens.analysis.lenses.chosen import asked
from llava_lens.analysis.lenses.heads import head_of, layer_of
from llava_lens.analysis.lenses.lens import call_of, names_for_lens
from llava_lens.analysis.lenses.words import UNITS, Lens, Reader, facts_of
from llava_lens.analysis.scores import Scores
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError
from llava_lens.kernels import rotate, upcast

Neuron = tuple[int, int]
NAN = float("nan")


def neuron_name(neuron: Neuron) -> str:
    """`L3N17`."""
    return f"L{neuron[0]}N{neuron[1]}"


# ---- neurons that raise a word


@dataclass(frozen=True, eq=False, repr=False)
class ValueNeurons:
    """MLP neurons that raise a word the most, and the words that each one's output promotes and demotes.

    `increases` `[layer, neuron]` are all neurons' log-probability increases, in nats; `neurons` the `k` highest, pairs
    (layer, neuron). `promoted` and `demoted` `[neuron]` are their outputs `m · W_out`, and the same turned round, read
    by logit under the frozen norm.
    """

    increases: Scores
    neurons: tuple[Neuron, ...]
    promoted: Lens
    demoted: Lens

    @property
    def scores(self) -> Scores:
        """The increases of the `k` highest, `[neuron]`."""
        layers, numbers = zip(*self.neurons, strict=True)
        labels = {"neuron": tuple(map(neuron_name, self.neurons))}
        return replace(
            self.increases, values=self.increases.values[list(layers), list(numbers)], axes=("neuron",), labels=labels
        )

    def __repr__(self) -> str:
        method, scores = self.increases.method, self.scores.values.tolist()
        rows = zip(self.neurons, scores, self.promoted.words, self.demoted.words, strict=True)
        width = max(len(" ".join(up)) for up in self.promoted.words)
        lines = [
            f"  {neuron_name(neuron):<9}{score:+9.4f}   + {' '.join(up):<{width}}   − {' '.join(down)}"
            for neuron, score, up, down in rows
        ]
        word = method["answer_id"] if method["answer"] is None else method["answer"]
        return "\n".join([f"ValueNeurons: log-probability increase of {word!r} in nats, and the words moved", *lines])


@torch.no_grad()
def value_neurons(
    cache: LlavaCache,
    answer: Word = None,
    k: int = 10,
    position: int = -1,
    *,
    row: int | None = None,
    top: int = 5,
    **how: Any,
) -> ValueNeurons:
    """The `k` MLP neurons that raise the log-probability of `answer` at `position` the most (arXiv 2312.12141).

    The increases are those of `log_prob_increase(by="neuron")`, to which `how` goes on (`tolerance`, `exact`). `answer`
    is a token id or a string of one token, by default the model's own choice. Neurons without an increase are left out.

    Raises `LensError` for missing entries (naming them), for several rows (give `row`), and as `log_prob_increase`.
    """
    model = model_of(cache)
    k, top = whole("k=", k, 1), whole("top=", top, 1, model.cfg.d_vocab)
    need(cache, names_for_lens(model, "value_neurons"), call_of("value_neurons"))
    i = one_row(cache, row)
    token, readout = asked(cache, i, position, answer)
    assert readout is not None
    increases = log_prob_increase(cache, token, by="neuron", position=position, row=i, **how)
    neurons = tuple((e.place[0], e.place[1]) for e in increases.top(k) if e.value > 0)
    if not neurons:
        raise LensError(f"no neuron raises {facts_of(model, '', token)['answer']!r} at position {position}")
    place = Place.of(cache, i, position)
    vectors = torch.stack(
        [place.at(at, "mlp.hook_post")[n] * upcast(model.blocks[at].mlp.W_out[n]) for at, n in neurons]
    )
    reader = Reader.of(model, "output", "logit", readout.scale)
    labels = {"neuron": tuple(map(neuron_name, neurons))}
    places = Scores(torch.zeros(len(neurons)), ("neuron",), labels, UNITS["logit"], facts_of(model, "neuron", token))
    promoted, demoted = (Lens.of(model, reader.read(sign * vectors, token, top), places) for sign in (1, -1))
    return ValueNeurons(increases, neurons, promoted, demoted)


def one_row(cache: LlavaCache, row: int | None) -> int:
    """The row that is meant; raises `LensError` where a batch has several and none is named."""
    rows = rows_of(cache, row)
    if len(rows) > 1:
        raise LensError(f"a batch of {len(rows)}: say which row=0 … {len(rows) - 1}")
    return rows[0]


# ---- what feeds neurons and heads


class Feed(NamedTuple):
    """An upstream neuron: its place, what it adds to the number explained, and its share of that number."""

    neuron: Neuron
    value: float
    share: float


@dataclass(frozen=True, eq=False, repr=False)
class QueryNeurons:
    """What the parts of the stream add to numbers read from it: pre-activations of neurons, or an attention score.

    `neurons` `[target, layer, neuron]`, `heads` `[target, layer, head]` and `rest` `[target, part]` (embedding, biases)
    add up to `observed` `[target]`, as the closure says; what lies behind a target is NaN.
    """

    neurons: Scores
    heads: Scores
    rest: Scores
    observed: Scores

    @property
    def shares(self) -> Scores:
        """The neurons' parts of what was observed, `[target, layer, neuron]`; they are signed as that is."""
        whole = self.observed.values[:, None, None]
        return replace(self.neurons, values=self.neurons.values / whole, unit="share", closure=None)

    def top(self, k: int = 10, target: int = 0) -> list[Feed]:
        """The `k` upstream neurons with the highest share of one target, highest first."""
        values, shares = self.neurons[{"target": target}].values, self.shares[{"target": target}]
        return [Feed((e.place[0], e.place[1]), float(values[e.place]), e.value) for e in shares.top(k)]

    def __repr__(self) -> str:
        lines = []
        for i, name in enumerate(self.observed.labels_of("target")):
            parts = [float(each.values[i].nansum()) for each in (self.neurons, self.heads)]
            rest = dict(zip(self.rest.labels_of("part"), self.rest.values[i].tolist(), strict=True))
            summed = {"neurons": parts[0], "heads": parts[1], **rest}
            told = ", ".join(f"{what} {value:+.4g}" for what, value in summed.items())
            lines.append(f"  {name}: {float(self.observed.values[i]):+.4g} = {told}")
            lines += [f"    {neuron_name(e.neuron):<9}{e.value:+9.4f}  {e.share:+7.1%}" for e in self.top(5, i)]
        closes = f"the sums close to {self.observed.closure:.1e}"
        return "\n".join([f"QueryNeurons: what adds up to each {self.observed.unit}; {closes}", *lines])


@torch.no_grad()
def query_neurons(
    cache: LlavaCache,
    targets: Neuron | Sequence[Neuron],
    position: int = -1,
    *,
    which: str = "gate",
    row: int | None = None,
) -> QueryNeurons:
    """Which upstream neurons make some neurons fire at `position`: parts of their pre-activation (arXiv 2312.12141).

    A neuron (layer, neuron) looks for its key direction, its column of the gate's weights (`which="gate"`) or of the
    input's (`"in"`) behind the norm's gain and the scale that the norm had; what a part of the stream adds to the
    pre-activation is its product with that. Parts are all neurons of earlier layers, all heads up to the neuron's own
    layer, the embedding and the biases.

    Raises `LensError` for missing entries (naming them), for a neuron, position or row that is not there, and for
    several rows (give `row`).
    """
    model = model_of(cache)
    one_of("which", (which,), ("gate", "in"))
    hook = "mlp.hook_pre" if which == "gate" else "mlp.hook_pre_linear"
    neurons = _neurons(model, targets)
    layers = [layer for layer, _ in neurons]
    own = [f"blocks.{layer}.{name}" for layer in layers for name in ("ln2.hook_scale", hook)]
    need(cache, [*_upstream(max(layers), own_attention=True), *own], call_of("query_neurons"))
    place = Place.of(cache, one_row(cache, row), position)
    directions, biases, observed = [], [], []
    for layer, neuron in neurons:
        block = model.blocks[layer]
        weight, bias = (block.mlp.W_gate, block.mlp.b_gate) if which == "gate" else (block.mlp.W_in, block.mlp.b_in)
        gain = upcast(block.ln2.w) / place.at(layer, "ln2.hook_scale")
        directions.append(upcast(weight[:, neuron]) * gain)
        biases.append(upcast(bias[neuron]))
        observed.append(place.at(layer, hook)[neuron])
    method = {"score": f"parts of the {which} pre-activation", "query": place.in_prompt}
    names = tuple(map(neuron_name, neurons))
    read = Targets(names, layers, torch.stack(directions), torch.stack(biases), torch.stack(observed))
    return _fed(place, read, True, "pre-activation", method)


@torch.no_grad()
def head_query_neurons(
    cache: LlavaCache, layer: int, head: int, source: int, position: int = -1, *, row: int | None = None
) -> QueryNeurons:
    """Which upstream neurons at `source` make a head attend there from `position`: parts of the attention score.

    The key direction is the query's rotated vector, turned back by the source's rotation, through the key weights and
    the norm in front of them; the score is the one before softmax. Parts are neurons and heads of earlier layers, the
    embedding and the biases, at `source`. The run must have counted positions from 0, as runs of a whole prompt do.

    Raises `LensError` for missing entries (naming them), for what is not there, and for several rows (give `row`).
    """
    model, layer = model_of(cache), layer_of(cache.model, layer)
    head = head_of(model, head)
    own = [f"blocks.{layer}.{name}" for name in ("ln1.hook_scale", "attn.hook_rot_q", "attn.hook_rot_k")]
    need(cache, [*_upstream(layer, own_attention=False), *own], call_of("head_query_neurons"))
    i = one_row(cache, row)
    at, query = Place.of(cache, i, source), Place.of(cache, i, position)
    block, kv_head = model.blocks[layer], head // (model.cfg.n_heads // model.cfg.n_key_value_heads)
    q, k = query.at(layer, "attn.hook_rot_q")[head], at.at(layer, "attn.hook_rot_k")[kv_head]
    n = len(at.roles) if at.roles is not None else at.entry(STREAM).shape[-2]
    cos, sin = (each[0, 0, at.in_prompt] for each in model.rotary(torch.arange(n, device=q.device)[None], q.dtype))
    turned = rotate(q[None, None, None], cos[None, None, None], -sin[None, None, None])[0, 0, 0] * block.attn.scale
    gain = upcast(block.ln1.w) / at.at(layer, "ln1.hook_scale")
    direction = (upcast(block.attn.W_K[kv_head]) @ turned) * gain
    bias, observed = upcast(block.attn.b_K[kv_head]) @ turned, (q @ k) * block.attn.scale
    method = {"score": "parts of the attention score", "query": query.in_prompt, "source": at.in_prompt}
    read = Targets((f"L{layer}H{head}",), [layer], direction[None], bias[None], observed[None])
    return _fed(at, read, False, "attention score", method)


class Targets(NamedTuple):
    """Numbers read from the stream by products with directions, plus a bias: names, layers, and what was observed."""

    names: tuple[str, ...]
    layers: list[int]
    directions: Float[Tensor, "target d_model"]
    biases: Float[Tensor, " target"]
    observed: Float[Tensor, " target"]


def _upstream(layer: int, own_attention: bool) -> list[str]:
    """The entries that hold all parts of the stream before a layer, or before its MLP with its own attention."""
    parts = [f"blocks.{j}.{name}" for j in range(layer) for name in ("attn.hook_z", "mlp.hook_post")]
    return [STREAM, *parts, *([f"blocks.{layer}.attn.hook_z"] if own_attention else [])]


def _fed(place: Place, targets: Targets, own_attention: bool, unit: str, method: dict[str, Any]) -> QueryNeurons:
    """Every part of the stream at a place, by its product with each direction."""
    blocks, cfg, D = place.cache.model.blocks, place.cache.model.cfg, targets.directions
    last = max(targets.layers)
    neurons = D.new_full((len(D), last, cfg.d_mlp), NAN)
    heads = D.new_full((len(D), last + own_attention, cfg.n_heads), NAN)
    rest = torch.stack((D @ upcast(place.entry(STREAM)[place.query]), targets.biases), -1)
    for j in range(last + own_attention):
        z, W_O = place.at(j, "attn.hook_z"), upcast(blocks[j].attn.W_O)
        reached = torch.tensor([j < layer + own_attention for layer in targets.layers], device=D.device)
        heads[reached, j] = torch.einsum("hk,hkd,td->th", z, W_O, D[reached])
        rest[reached, 1] += D[reached] @ upcast(blocks[j].attn.b_O)
        reached = torch.tensor([j < layer for layer in targets.layers], device=D.device)
        if bool(reached.any()):
            m, mlp = place.at(j, "mlp.hook_post"), blocks[j].mlp
            neurons[reached, j] = (D[reached] @ upcast(mlp.W_out).T) * m
            rest[reached, 1] += D[reached] @ upcast(mlp.b_out)
    total = neurons.nansum((1, 2)) + heads.nansum((1, 2)) + rest.sum(1)
    missed = (total - targets.observed).abs()
    gross = neurons.abs().nansum((1, 2)) + heads.abs().nansum((1, 2)) + rest.abs().sum(1)
    if bool((missed > slack(place.entry(STREAM).dtype) * gross).any()):
        raise LensError(f"the parts of the stream do not sum to the {unit}: {CHANGED}")
    closure = float(missed.max())
    named = {"target": targets.names}

    def scores(values: Tensor, *axes: str, **labels: tuple[str, ...]) -> Scores:
        return Scores(values, ("target", *axes), {**named, **labels}, unit, method, closure)

    return QueryNeurons(
        scores(neurons, "layer", "neuron"),
        scores(heads, "layer", "head"),
        scores(rest, "part", part=("embedding", "biases")),
        scores(targets.observed),
    )


def _neurons(model: Any, given: Any) -> list[Neuron]:
    """One neuron or several, layers counted from the front; raises `LensError` for none and those not there."""
    several = many(given) or [given]
    pairs = [several] if all(many(each) is None for each in several) else [many(each) or [] for each in several]
    if any(len(pair) != 2 for pair in pairs):
        raise LensError(f"target {given!r}; expected a neuron (layer, neuron), or several")
    last = model.cfg.d_mlp - 1
    return [(layer_of(model, layer), whole("neuron", neuron, 0, last)) for layer, neuron in pairs]
