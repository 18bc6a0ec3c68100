"""Direct logit attribution: what every part of the decoder writes into the answer's logit, so that the sum closes.

Unusual: what a split does not show (embedding, MLPs, biases) travels along as `method["rest"]`, and `closure` says how
far all of it together misses the logit of the model's own final stream.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.account import Answers, Asked, attribution_names
from llava_lens.analysis.attribution.answers import Several
from llava_lens.analysis.attribution.log_prob import joined
from llava_lens.analysis.attribution.needs import model_of, need, one_of
from llava_lens.analysis.attribution.query import Place, rows_of
from llava_lens.analysis.attribution.rebuild import beside, heads_add_up, neurons_add_up
from llava_lens.analysis.scores import Label, Scores
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError

Directions = Float[Tensor, "answer d_model"]
Cells = Float[Tensor, "answer layer *cell"]
Rest = dict[str, Float[Tensor, " answer"]]
AXES: dict[str, tuple[str, ...]] = {
    "component": ("component",),
    "layer": ("layer", "part"),
    "head": ("layer", "head"),
    "neuron": ("layer", "neuron"),
    "source": ("layer", "head", "position"),
}


def direct_logit_attribution(
    cache: LlavaCache,
    answer: Answers = None,
    versus: Answers = None,
    by: str = "component",
    position: int = -1,
    *,
    row: int | None = None,
    several: Several = None,
) -> Scores:
    """What each part of the decoder adds to the logit of `answer` (less that of `versus`), in logits.

    The final norm's scale is held at that of the model's own final stream, so the unembedding is linear and all parts
    sum to the logit (https://transformer-circuits.pub/2021/framework; arXiv 2211.00593). By "component": `[component]`,
    the embedding and every layer's attention and MLP, output biases included; by "layer": the same as `[layer, part]`;
    by "head": `[layer, head]`; by "source": `[layer, head, position]`, every head split over the positions it attends
    to (`.over_image()` keeps those of a picture); by "neuron": `[layer, neuron]`, the MLPs' hidden units.

    `method["logit"]` is the logit (difference), `method["rest"]` what the split does not show: "embed", the direct path
    of what stands at the query itself (an image feature at an image position), "MLPs" or "attention", "biases". Scores
    and rest sum to the logit; `closure` is by how much they miss it.

    `answer` and `versus` are token ids or strings that are one token; without an answer it is the model's own choice.
    Several answers (each against `versus`, or against its own of as many) give an axis `answer` in front. Of a string
    of several tokens `several="first"` scores the first, "all" adds up all, each where it is predicted. `position` is
    the query, -1 the last that is not padding. Of a batch all rows are scored, with an axis `batch`, or one `row`.

    Raises `LensError` for an unknown `by`, entries that are missing (naming them and the filter that keeps them),
    another model's cache, positions, rows and answers that are not there, and heads, sources or neurons whose sum is
    not what the run cached: the weights, or a hook, changed it.
    """
    one_of("by", (by,), AXES)
    need(cache, attribution_names(model_of(cache), by), f"attribution_names(model, {by!r})")
    each = []
    for i in rows_of(cache, row):
        asked = Asked.of(cache, i, position, answer, versus, several)
        split = [parts(place, directions, by) for place, directions in asked.terms]
        values = torch.stack([cells for cells, _ in split]).sum(0)
        rest = {name: torch.stack([own[name] for _, own in split]).sum(0) for name in split[0][1]}
        facts = {"score": "direct logit attribution", "by": by}
        labels = labels_of(asked.place, by)
        each.append(asked.scores(values, AXES[by], rest, asked.logit, labels, facts, roles=by == "source"))
    return joined(each)


def parts(place: Place, directions: Directions, by: str) -> tuple[Float[Tensor, "answer *cell"], Rest]:
    """What every cell of a split adds along the directions, and the rest of the sum."""
    sums = components(place) @ directions.T
    embed, outs = sums[0], rearrange(sums[1:], "(layer part) answer -> answer layer part", part=2)
    if by == "component":
        return sums.T, {}
    if by == "layer":
        return outs, {"embed": embed}
    neurons = by == "neuron"
    layers, biases = [], []
    for layer, block in enumerate(place.cache.model.blocks):
        layers.append(by_neuron(place, layer, directions) if neurons else by_head(place, layer, directions, by))
        biases.append(directions @ beside(block.mlp.b_out if neurons else block.attn.b_O, directions))
    others = outs[..., 0 if neurons else 1].sum(1)
    rest = {"embed": embed, "attention" if neurons else "MLPs": others, "biases": torch.stack(biases).sum(0)}
    return torch.stack(layers, dim=1), rest


def components(place: Place) -> Float[Tensor, "component d_model"]:
    """What was added to the stream, in its order: the embedding, then each layer's attention and MLP."""
    outs = [place.at(layer, name) for layer in range(place.n_layers) for name in ("hook_attn_out", "hook_mlp_out")]
    return torch.stack([place.at(0, "hook_resid_pre"), *outs])


def by_head(place: Place, layer: int, directions: Directions, by: str) -> Float[Tensor, "answer head *source"]:
    """One layer's heads, whole or split over the positions they attend to."""
    attn = place.cache.model.blocks[layer].attn
    out = beside(attn.o_proj.weight, directions)
    read = rearrange(directions @ out, "answer (head d_head) -> answer head d_head", d_head=attn.cfg.d_head)
    if by == "head":
        z = place.at(layer, "attn.hook_z")
        cells = einsum(z, read, "head d_head, answer head d_head -> answer head")
    else:
        pattern, v = place.pattern(layer), place.values(layer)
        if pattern.shape[1] != v.shape[1]:
            raise LensError(
                f"values of {v.shape[1]} positions, attention to {pattern.shape[1]}: "
                "by='source' takes a cache of the whole prompt in one run, without pos_slice"
            )
        z = einsum(pattern, v, "head key, head key d_head -> head d_head")
        said = einsum(v, read, "head key d_head, answer head d_head -> answer head key")
        cells = pattern * said
    heads_add_up(place, layer, z)
    return cells


def by_neuron(place: Place, layer: int, directions: Directions) -> Float[Tensor, "answer neuron"]:
    """One layer's hidden units, each along its own output weights."""
    mlp = place.cache.model.blocks[layer].mlp
    post, out = place.at(layer, "mlp.hook_post"), beside(mlp.out_proj.weight, directions)
    neurons_add_up(place, layer, post)
    return post * (directions @ out)


def component_names(n_layers: int) -> tuple[Label, ...]:
    """`embed`, `L0 attn`, `L0 mlp`, …"""
    return ("embed", *(f"L{layer} {part}" for layer in range(n_layers) for part in ("attn", "mlp")))


def labels_of(place: Place, by: str) -> dict[str, tuple[Label, ...]]:
    """What the places along the axes of a split are called."""
    if by == "source":
        return dict(place.labels)
    return {"component": {"component": component_names(place.n_layers)}, "layer": {"part": ("attn", "mlp")}}.get(by, {})
