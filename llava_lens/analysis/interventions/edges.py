"""Edge attribution: by first order, how much each part of the decoder does through what each later part reads of it.

Unusual: what a part reads is the stream before its norm, and the norm is linearised on the run that is patched. So the
scores of one receiver sum over its senders to the first-order effect of patching that receiver's whole input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.interventions.gradients import Graph, base_of, change, on_graph, slope_of
from llava_lens.analysis.interventions.study import Direction, Running, Turn, each_row, facts_of, read_pair
from llava_lens.analysis.interventions.where import Ground
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError, nearest
from llava_lens.kernels import upcast
from llava_lens.sweep.base import Base

RECEIVERS = ("q", "k", "v", "mlp", "logits")
Written = Float[Tensor, "part pos d_model"]


def edge_attribution(
    model: Any,
    clean: Any,
    corrupt: Any,
    *,
    metric: Any = None,
    direction: Direction = "denoise",
    receivers: str | Sequence[str] = RECEIVERS,
    at: Any = None,
    **how: Unpack[Running],
) -> Scores:
    """First-order effect of patching one edge of the decoder alone: `Scores[sender, receiver]` (arXiv 2310.10348).

    `Σ_position (source − base) of what the sender adds to the stream · ∂metric/∂(what the receiver reads)`, in units of
    the metric. Senders are `"embed"` (pictures included), every head (`"L0H3"`, without the attention's bias) and every
    MLP (`"L1 mlp"`); receivers every head's queries, keys and values (`"L2H1 q"`; of keys and values, key/value heads),
    every MLP and the final stream (`"logits"`). An edge that does not exist, the sender not being before the receiver,
    is zero.

    `at` sums over some positions only, the same for sender and receiver. The rest is as in `patch`. `closure` is how
    far the senders of a receiver miss the effect of its whole input, at the worst one. An estimate throughout: patching
    tells the truth about the few that matter.

    Raises `LensError` as `patch` does, for receivers that do not exist, a metric that no gradient passes through, and
    `file=`, since there is no sweep to go on with.
    """
    kinds = (receivers,) if isinstance(receivers, str) else tuple(dict.fromkeys(receivers))
    unknown = next((kind for kind in kinds if kind not in RECEIVERS), None)
    if unknown is not None or not kinds:
        hint = "none" if unknown is None else f"{unknown!r}{nearest(str(unknown), RECEIVERS)}"
        raise LensError(f"receivers: {hint}; expected some of {', '.join(RECEIVERS)}")
    if how.get("file") is not None:
        raise LensError("file= with edge_attribution, which runs no sweep that could be interrupted; leave it out")
    clean, corrupt = read_pair(model, clean, corrupt, direction)

    def study(turn: Turn) -> Scores:
        rows = turn.row(clean), turn.row(corrupt)
        where = None if at is None else Ground(model, rows[0]).select(at)
        setting = turn.settle(*rows, stream_names(model))
        base, source = base_of(setting, direction)
        slope = slope_of(setting, base)
        graph = Graph(base, gradient_names(model, kinds), setting.bound.places(len(base.row.columns)))
        places = list(range(len(base.row.columns))) if where is None else base.row.rows.local(where)[1]
        edges = Edges(base, source, graph.backward(slope), kinds, tuple(places))
        values, closure = edges.scores()
        method = {"score": "edge attribution", "direction": direction, **facts_of(setting), "baseline": slope.value}
        labels = {"sender": edges.senders(), "receiver": edges.receivers()}
        return Scores(values, ("sender", "receiver"), labels, setting.bound.unit, method, closure)

    return each_row(model, clean, metric, how, study)


def stream_names(model: Any) -> list[str]:
    """What both runs must hold: the stream, and what is added to it."""
    each = ("hook_resid_pre", "attn.hook_z", "hook_resid_mid", "hook_mlp_out")
    names = [f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in each]
    return [*names, _final(model)]


def gradient_names(model: Any, kinds: Sequence[str]) -> list[str]:
    """Where gradients are needed for receivers of some kinds."""
    hooks = [HOOKS[kind] for kind in kinds if kind != "logits"]
    names = [f"blocks.{layer}.{hook}" for layer in range(model.cfg.n_layers) for hook in hooks]
    return names + ([_final(model)] if "logits" in kinds else [])


HOOKS = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "mlp": "hook_mlp_in"}


def _final(model: Any) -> str:
    return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"


@dataclass(frozen=True)
class Edges:
    """All edges into receivers of some kinds, from two runs and the gradients on the first of them."""

    base: Base
    source: Base
    grads: dict[str, Tensor]
    kinds: tuple[str, ...]
    places: tuple[int, ...]

    @property
    def model(self) -> Any:
        return self.base.model

    def senders(self) -> tuple[str, ...]:
        """What each sender is called, in the order of a forward pass."""
        cfg = self.model.cfg
        each = [[*(f"L{i}H{head}" for head in range(cfg.n_heads)), f"L{i} mlp"] for i in range(cfg.n_layers)]
        return ("embed", *(name for names in each for name in names))

    def groups(self) -> list[tuple[int, str, slice]]:
        """The receivers of one kind in one block, `(block, kind, their numbers)`, in the order of a forward pass."""
        cfg, found, n = self.model.cfg, [], 0
        sizes = {"q": cfg.n_heads, "k": cfg.n_key_value_heads, "v": cfg.n_key_value_heads, "mlp": 1}
        for layer in range(cfg.n_layers):
            for kind in (kind for kind in RECEIVERS[:-1] if kind in self.kinds):
                found.append((layer, kind, slice(n, n := n + sizes[kind])))
        return [*found, (cfg.n_layers, "logits", slice(n, n + 1))] if "logits" in self.kinds else found

    def receivers(self) -> tuple[str, ...]:
        """What each receiver is called."""
        names = []
        for layer, kind, own in self.groups():
            heads = range(own.stop - own.start)
            one = ["logits"] if kind == "logits" else [f"L{layer} mlp"]
            names += one if kind in ("mlp", "logits") else [f"L{layer}H{head} {kind}" for head in heads]
        return tuple(names)

    def scores(self) -> tuple[Float[Tensor, "sender receiver"], float]:
        """Every edge, one sender's block at a time, and how far the senders of the worst receiver miss its input."""
        groups = self.groups()
        values = torch.zeros(len(self.senders()), groups[-1][2].stop, dtype=torch.float64)
        whole = torch.zeros(groups[-1][2].stop, dtype=torch.float64)
        start = 0
        for sender, written in self.written():
            parts = slice(start, start := start + len(written))
            for layer, kind, own in groups:
                heads = self._before(sender, layer, kind, len(written))
                if heads or sender < 0:
                    at_input = self.at_input(layer, kind)
                    found = torch.einsum("spd,rpd->sr", written[:heads], at_input)
                    values[parts.start : parts.start + heads, own] = found.double().cpu()
                    if sender < 0:
                        whole[own] = einsum(self.moved(layer, kind), at_input, "p d, r p d -> r").double().cpu()
        return values, float((values.sum(0) - whole).abs().max())

    @staticmethod
    def _before(sender: int, layer: int, kind: str, n: int) -> int:
        """How many of a block's parts (heads, then MLP) are before a receiver."""
        if sender < layer:
            return n
        return n - 1 if sender == layer and kind == "mlp" else 0

    def written(self) -> Iterator[tuple[int, Written]]:
        """What the senders of each block (-1: the embedding) add to the stream, as the two runs differ in it."""
        yield -1, self._change("blocks.0.hook_resid_pre")[None]
        for layer, block in enumerate(self.model.blocks):
            z, weight = self._change(f"blocks.{layer}.attn.hook_z"), upcast(block.attn.W_O.detach())
            heads = einsum(z, weight, "pos head d_head, head d_head d_model -> head pos d_model")
            yield layer, torch.cat((heads, self._change(f"blocks.{layer}.hook_mlp_out")[None]))

    def _change(self, name: str) -> Tensor:
        return change(self.source, self.base, name)[0, list(self.places)]

    def _stream(self, layer: int, kind: str) -> str:
        """The stream that a receiver reads."""
        if kind == "logits":
            return _final(self.model)
        return f"blocks.{layer}.{'hook_resid_mid' if kind == 'mlp' else 'hook_resid_pre'}"

    def moved(self, layer: int, kind: str) -> Float[Tensor, "pos d_model"]:
        """How the two runs differ in what a receiver reads."""
        return self._change(self._stream(layer, kind))

    def at_input(self, layer: int, kind: str) -> Float[Tensor, "receiver pos d_model"]:
        """The metric's gradient at what each receiver of a kind reads, before the norm."""
        places = list(self.places)
        if kind == "logits":
            return upcast(self.grads[_final(self.model)][0, places])[None]
        grad = upcast(self.grads[f"blocks.{layer}.{HOOKS[kind]}"][0, places])
        if kind == "mlp":
            return grad[None]
        block = self.model.blocks[layer]
        weight = upcast(getattr(block.attn, f"W_{kind.upper()}").detach())
        normed = einsum(grad, weight, "pos head d_head, head d_model d_head -> head pos d_model")
        with on_graph():
            x = self.base.acts[self._stream(layer, kind)][0, places].expand(len(normed), -1, -1).clone()
            x.requires_grad_()
            (at_input,) = torch.autograd.grad(block.ln1(x), x, normed.to(x.dtype))
        return upcast(at_input)
