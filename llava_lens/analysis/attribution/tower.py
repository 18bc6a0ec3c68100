"""The account of an answer continued through the projector and the vision tower, back to heads and patches of CLIP.

Unusual: whatever is not linear is held at what the run observed (decoder patterns and norm scales, the projector's
activation as the factor `post / pre`), so every sum closes; no derivative is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from llava_lens.analysis.attribution.account import Answers, Asked, attribution_names
from llava_lens.analysis.attribution.answers import Several
from llava_lens.analysis.attribution.direct import Rest, component_names
from llava_lens.analysis.attribution.features import (
    Features,
    Picture,
    by_all_paths,
    directly,
    read_by_heads,
    same_stream,
)
from llava_lens.analysis.attribution.log_prob import joined
from llava_lens.analysis.attribution.needs import model_of, need
from llava_lens.analysis.attribution.query import rows_of
from llava_lens.analysis.attribution.rebuild import beside, rebuilt
from llava_lens.analysis.scores import Scores
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError
from llava_lens.layers import bias_of
from llava_lens.record import TOWER

PerFeature = dict[str, Float[Tensor, "answer feature"]]
AXES: dict[str, tuple[str, ...]] = {
    "component": ("component", "row", "col"),
    "head": ("layer", "head", "row", "col"),
    "neuron": ("layer", "neuron"),
    "source": ("layer", "head", "row", "col"),
}
HELD = {
    "direct": "decoder patterns and norm scales, and the projector's post / pre, as observed",
    "all": "decoder patterns, norm scales and MLP gates, and the projector's post / pre, as observed",
}


def tower_attribution(
    cache: LlavaCache,
    answer: Answers = None,
    versus: Answers = None,
    by: str = "component",
    position: int = -1,
    *,
    through: str = "direct",
    row: int | None = None,
    image: int = 0,
    several: Several = None,
) -> Scores:
    """What each part of the vision tower adds, by way of one picture's features, to the logit of `answer`, in logits.

    Everything not linear is held at its observed values: in the decoder attention patterns and norm scales, in the
    projector the factor `post / pre` of every unit, by which the activation multiplied its input (and the scale of a
    norm in front of it). The tower's own
    attention and MLPs are not looked through: each writes into its patch's stream, and that is what is counted.

    `through="direct"` takes the direct path, from a feature's place in the embedding through the value and output
    matrices of one decoder head to the final stream (and the feature itself, where the query is an image position);
    the sum is `method["through_image"]`. `through="all"` takes every path through the decoder with its MLPs' gates
    `act(pre)` held too; the decoder is then linear, and picture, text embeddings and biases sum to the whole logit.

    By "component": `[component, row, col]`, the tower's embedding (after its pre-norm), each layer's attention and MLP,
    output biases included, and the projector's biases, in the stream of each patch; by "head":
    `[layer, head, row, col]`, by the patch that is written to; by "source": `[layer, head, row, col]`, by the patch
    that is attended to, summed over those written to; by "neuron": `[layer, neuron]`, summed over patches. Of several
    feature layers each counts the parts below it. `method["rest"]` holds what the split leaves out: "embed", "MLPs" or
    "attention", "biases", "projector", "class token" (its own feature where the decoder sees it, by "source" what was
    read from it), by "source" the "patches without a token" of a tile whose padding is cut off, and with "all" the
    decoder's "text", "other images" (image tokens of no picture too) and "decoder biases". Scores and rest sum to
    `through_image`, or with "all" to `logit`; `closure` is by how much they miss it.

    The other arguments are those of `direct_logit_attribution`; `image` is the picture's number in its row. Raises
    `LensError` as it does, and for a picture or a tower that is not there, positions cut away, and image positions
    whose stream is not the projector's output.
    """
    names = attribution_names(model_of(cache), by, through=str(through))  # refuses unknown choices first of all
    if cache.inputs is None or cache.inputs.pixels is None:
        why = "carries no inputs that say where the pictures are" if cache.inputs is None else "is of a run without any"
        raise LensError(f"no picture to attribute to: this cache {why}")
    need(cache, names, f"attribution_names(model, {by!r}, through={through!r})")
    pictures = [Picture.of(cache, i, image) for i in rows_of(cache, row)]
    asked = [Asked.of(cache, picture.row, position, answer, versus, several) for picture in pictures]
    return joined([scores_of(*pair, by, through) for pair in zip(pictures, asked, strict=True)])


def scores_of(picture: Picture, asked: Asked, by: str, through: str) -> Scores:
    """The account of one row."""
    same_stream(picture, asked.place)
    directions, elsewhere = (directly if through == "direct" else by_all_paths)(picture, asked)
    through_image = einsum(directions, picture.projected("hook_out"), "answer feature d, feature d -> answer")
    cells, rest = parts(picture, *into_projector(picture, directions), by)
    values, sums = cells, {name: each.sum(1) for name, each in rest.items()}
    if by != "neuron":
        values, sums = on_the_grid(picture, cells, rest, by)
    facts = {"score": "tower attribution", "by": by, "through": through, "held": HELD[through]}
    facts |= {"image": picture.number, "through_image": asked.plain(through_image)}
    names = {"component": (*component_names(picture.cfg.n_layers), "projector")} if by == "component" else {}
    total = through_image if through == "direct" else asked.logit
    return asked.scores(values, AXES[by], sums | elsewhere, total, names, facts, roles=by != "neuron")


def on_the_grid(
    picture: Picture, cells: Float[Tensor, "answer *axes position"], rest: PerFeature, by: str
) -> tuple[Float[Tensor, "answer *axes row col"], Rest]:
    """Patches as rows and columns; the class token in front of them, where it is there, goes to the rest."""
    rows, cols = picture.grid
    by_source, ahead = by == "source", int(picture.cfg.keep_class_token)
    own = picture.read[ahead:] if by_source else list(range(ahead, cells.shape[-1]))
    values = rearrange(cells[..., own], "... (row col) -> ... row col", row=rows, col=cols)
    if by_source:
        sums = {name: each.sum(1) for name, each in rest.items()}
        first = int(picture.cfg.class_token)
        without = [at for at in range(first, cells.shape[-1]) if at not in set(own)]
        if first:
            sums["class token"] = cells[..., 0].sum((1, 2))
        return values, sums | ({"patches without a token": cells[..., without].sum((1, 2, 3))} if without else {})
    sums = {name: each[:, ahead:].sum(1) for name, each in rest.items()}
    if ahead:
        first_cells = [cells[..., 0].flatten(1).sum(1), *(each[:, 0] for each in rest.values())]
        sums["class token"] = torch.stack(first_cells).sum(0)
    return values, sums


def into_projector(picture: Picture, directions: Features) -> tuple[Features, Float[Tensor, "answer feature"]]:
    """The directions at the projector's input, and what its biases add."""
    projector = picture.model.projector
    x, pre, post, out = (picture.projected(name) for name in ("hook_in", "hook_pre", "hook_post", "hook_out"))
    dtype, first, second = picture.dtype("projector.hook_out"), projector.linear_1, projector.linear_2
    normed, back = through_norm(picture, x)
    rebuilt(normed, first, pre, dtype, "projector.hook_pre is not the first layer of the cached hook_in")
    rebuilt(post, second, out, dtype, "projector.hook_out is not the second layer of the cached hook_post")
    W_1, W_2 = beside(first.weight, x), beside(second.weight, x)
    b_1, b_2 = beside(bias_of(first), x), beside(bias_of(second), x)
    factor = torch.where(pre == 0, 0.0, post / pre)
    at_post = directions @ W_2
    at_pre = at_post * factor
    at_in, shift = back(at_pre @ W_1)
    biases = directions @ b_2 + at_pre @ b_1 + (at_post * (post - factor * pre)).sum(-1)
    return at_in, biases + shift


def through_norm(picture: Picture, x: Tensor) -> tuple[Tensor, Callable[[Features], tuple[Features, Any]]]:
    """The projector's input normed at the scale observed, and the way back to directions there and the bias's part."""
    norm = picture.model.projector.norm
    if norm is None:
        return x, lambda directions: (directions, 0.0)
    scale, gain, bias = picture.projected("norm.hook_scale"), beside(norm.w, x), beside(norm.b, x)

    def centred(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    return centred(x) / scale * gain + bias, lambda said: (centred(said * gain / scale), said @ bias)


def parts(
    picture: Picture, at_in: Features, projector: Float[Tensor, "answer feature"], by: str
) -> tuple[Float[Tensor, "answer *axes"], PerFeature]:
    """The cells of a split, and the rest of the sum per feature."""
    cfg = picture.cfg
    blocks = rearrange(at_in, "answer feature (read d) -> read answer feature d", d=cfg.d_model)

    def writes(name: str, layer: int | None = None) -> Float[Tensor, "answer feature"]:
        """What one addition to the stream says; feature layers at or below it do not see it."""
        added = picture.tower(name, layer)[picture.read]
        return einsum(above(layer), added, "answer feature d, feature d -> answer feature")

    def above(layer: int | None) -> Features:
        seen = [i for i, read in enumerate(cfg.feature_layers) if layer is None or read > layer]
        return blocks[seen].sum(0)

    embed = writes("hook_embed")
    sums = [[writes(name, layer) for name in ("hook_attn_out", "hook_mlp_out")] for layer in range(cfg.n_layers)]
    if by == "component":
        return torch.stack([embed, *(each for pair in sums for each in pair), projector], dim=1), {}
    none = torch.zeros_like(embed)
    neurons, cells, biases = by == "neuron", [], none
    for layer, block in enumerate(picture.model.vision.blocks):
        directions = above(layer)
        how = by_neuron if neurons else by_source if by == "source" else by_head
        cells.append(how(picture, block, layer, directions))
        biases = biases + directions @ beside(block.mlp.b_out if neurons else block.attn.b_O, directions)
    others = sum((pair[0 if neurons else 1] for pair in sums), none)
    rest = {"embed": embed, "attention" if neurons else "MLPs": others, "biases": biases, "projector": projector}
    width = {"head": (cfg.n_heads, len(embed[0])), "source": (cfg.n_heads, cfg.n_ctx), "neuron": (cfg.d_mlp,)}[by]
    return torch.stack(cells, 1) if cells else embed.new_zeros(len(embed), 0, *width), rest


def by_head(picture: Picture, block: Any, layer: int, directions: Features) -> Float[Tensor, "answer head feature"]:
    """One layer's heads, by the feature they write to."""
    z = picture.tower("attn.hook_z", layer)[picture.read]
    unchanged(picture, layer, "hook_attn_out", z.flatten(1), block.attn.o_proj, "heads")
    return einsum(z, read_by_heads(block, directions), "feature head d, answer feature head d -> answer head feature")


def by_source(picture: Picture, block: Any, layer: int, directions: Features) -> Float[Tensor, "answer head pos"]:
    """One layer's heads, by the position they read from."""
    pattern, v = picture.tower("attn.hook_pattern", layer)[:, picture.read], picture.tower("attn.hook_v", layer)
    z = einsum(pattern, v, "head feature pos, pos head d -> feature head d")
    unchanged(picture, layer, "hook_attn_out", z.flatten(1), block.attn.o_proj, "heads")
    read = read_by_heads(block, directions)
    wanted = einsum(pattern, read, "head feature pos, answer feature head d -> answer head pos d")
    return einsum(wanted, v, "answer head pos d, pos head d -> answer head pos")


def by_neuron(picture: Picture, block: Any, layer: int, directions: Features) -> Float[Tensor, "answer neuron"]:
    """One layer's hidden units, summed over the features they write to."""
    post = picture.tower("mlp.hook_post", layer)[picture.read]
    unchanged(picture, layer, "hook_mlp_out", post, block.mlp.out_proj, "neurons")
    read = directions @ beside(block.mlp.out_proj.weight, post)
    return einsum(read, post, "answer feature neuron, feature neuron -> answer neuron")


def unchanged(picture: Picture, layer: int, name: str, x: Tensor, linear: nn.Linear, what: str) -> None:
    """Raise `LensError` where the parts of a tower layer's output are no longer what they were in the run."""
    seen, dtype = picture.tower(name, layer)[picture.read], picture.dtype(f"{TOWER}blocks.{layer}.{name}")
    said = f"the {what} of tower layer {layer} do not sum to the cached {name} (by='component' reads it as it was)"
    rebuilt(x, linear, seen, dtype, said)
