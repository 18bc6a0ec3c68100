"""Streams and image features read in vocabulary space: the logit lens, visual words, and the lens through the tower.

Unusual: the logit lens norms every stream by its own scale and exactly once, so its last row is the model's own logits;
what is read as a summand of a logit (`norm="frozen"`) takes the scale of the model's final stream instead.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.answers import Word
from llava_lens.analysis.attribution.needs import STREAM, last_stream, model_of, need, one_of, stack_names, whole
from llava_lens.analysis.attribution.query import Place, rows_of
from llava_lens.analysis.attribution.readout import Readout
from llava_lens.analysis.lenses.chosen import Chosen, Positions, asked
from llava_lens.analysis.lenses.words import UNITS, Lens, Read, Reader, facts_of, same_shape
from llava_lens.analysis.scores import Scores
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.kernels import upcast
from llava_lens.roles import Roles

FEATURES = "projector.hook_out"
NORMS = ("frozen", "own")

BLOCKS: dict[str, tuple[str, ...]] = {
    "logit_lens": ("hook_resid_pre",),
    "mid": ("hook_resid_pre", "hook_resid_mid"),
    "visual_words": (),
    "tower_lens": (),
    "key_input": ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"),
    "value_input": ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"),
    "head_output": ("attn.hook_pattern", "attn.hook_v"),
    "value_neurons": ("hook_resid_pre", "hook_attn_out", "mlp.hook_post", "hook_mlp_out"),
    "query_neurons": ("attn.hook_z", "mlp.hook_post", "ln2.hook_scale", "mlp.hook_pre", "mlp.hook_pre_linear"),
    "head_query_neurons": ("attn.hook_z", "mlp.hook_post", "ln1.hook_scale", "attn.hook_rot_q", "attn.hook_rot_k"),
}
"""What each lens reads of every block; all read where the decoder's stream starts and ends, too."""


def names_for_lens(model: Any, *what: str) -> list[str]:
    """The cache entries that the named lenses read, for `names_filter`; `"mid"` is what `incl_mid` adds.

    >>> from llava_lens import HookedLlava, LlavaConfig
    >>> cfg = LlavaConfig(n_layers=1, d_model=8, n_heads=2, n_key_value_heads=2, d_head=4, d_mlp=8, act_fn="silu",
    ...                   eps=1e-5, normalization_type="RMS", n_ctx=16, d_vocab=11)
    >>> names_for_lens(HookedLlava(cfg), "logit_lens")
    ['blocks.0.hook_resid_pre', 'blocks.0.hook_resid_post']
    """
    names = stack_names(model, BLOCKS, what, "lens")
    if {"visual_words", "tower_lens"} & set(what):
        tower = tower_streams(model)
        names += [FEATURES] * ("visual_words" in what) + tower * ("tower_lens" in what)
    return names


def call_of(what: str) -> str:
    """What names all entries that a lens reads."""
    return f"names_for_lens(model, {what!r})"


# ---- the decoder's streams


@torch.no_grad()
def logit_lens(
    cache: LlavaCache,
    positions: Positions = None,
    answer: Word = None,
    *,
    incl_mid: bool = False,
    row: int | None = None,
    top: int = 5,
    by: str = "log_prob",
) -> Lens:
    """Every layer's stream read as if it were the last: `[stream, position]`, each normed by its own scale.

    The streams are `0_pre`, `1_pre`, … `final_post`, with `0_mid` between for `incl_mid`; the last are the model's own
    logits, and where the cache holds `hook_logits` the closure says how far off the word's scores are. `positions` are
    a role, a word of the prompt, numbers, or all that the cache kept (padding is NaN). `by` is "log_prob" or "logit".
    `answer` is a token id or a string of one token, by default the model's own choice at the last position. Of a batch
    all rows are read, with an axis `batch`, or one `row`.

    Raises `LensError` for missing entries (naming them), a string of several tokens, positions or rows not there.
    """
    model = model_of(cache)
    layers = range(model.cfg.n_layers)
    kinds = ("pre", "mid") if incl_mid else ("pre",)
    labels = (*(f"{layer}_{kind}" for layer in layers for kind in kinds), "final_post")
    names = [*(f"blocks.{layer}.hook_resid_{kind}" for layer in layers for kind in kinds), last_stream(model)]
    need(cache, [STREAM, *names], call_of("mid" if incl_mid else "logit_lens"))
    reader = Reader.of(model, "output", by)
    each = []
    for i in rows_of(cache, row):
        token, _ = asked(cache, i, -1, answer)
        chosen = Chosen.of(cache, i, positions)
        reads = [chosen.spread(reader.read(chosen.vectors(name), token, top)) for name in names]
        read = Read(*(torch.stack(parts) for parts in zip(*reads, strict=True)))
        method = facts_of(model, "logit lens", token)
        places = {"stream": labels, "position": chosen.labels}
        closure = _miss(chosen, read.scores[-1], token, reader.by)
        scores = Scores(read.scores, ("stream", "position"), places, UNITS[reader.by], method, closure, chosen.roles)
        each.append(Lens.of(model, read, scores))
    return same_shape(each)


def _miss(chosen: Chosen, last: Float[Tensor, " position"], token: int, by: str) -> float | None:
    """How far the last row misses the model's own logits; None where the cache does not hold those."""
    cache = chosen.place.cache
    if "hook_logits" not in cache or cache["hook_logits"].shape[-2] != cache[STREAM].shape[-2]:
        return None
    logits = chosen.place.entry("hook_logits")
    own = [logits[i] for i in chosen.read]
    theirs = torch.stack([(upcast(x).log_softmax(-1) if by == "log_prob" else upcast(x))[token] for x in own])
    return float((theirs.cpu() - last[~last.isnan()]).abs().max())


# ---- pictures


@torch.no_grad()
def visual_words(
    source: Any,
    inputs: Inputs | None = None,
    answer: Word = None,
    *,
    space: str = "input",
    by: str | None = None,
    norm: str = "frozen",
    image: int = 0,
    position: int = -1,
    row: int | None = None,
    top: int = 5,
) -> Lens:
    """What the decoder is given of each patch, read as words: `[row, col]` (arXiv 2411.10950).

    `source` is a cache, or a model to run on `inputs`. In the "input" space the projected features are compared with
    the input embeddings, `by` "cosine" or "dot" product; in the "output" space with `z(·)`, the unembedding behind the
    final norm, `by` "log_prob" or "logit". That norm is "frozen" at the scale of the model's final stream at
    `position`, so that scores are summands of the logits, or each patch's "own", as in the logit lens. `answer` is the
    word to score, by default the model's own choice at `position`. Of a batch all rows are read, or one `row`.

    Raises `LensError` for missing entries (naming them), an image or a row not there, other spaces and measures.
    """
    cache = _cache_of(source, inputs, "visual_words")
    need(cache, [FEATURES], call_of("visual_words"))
    each = []
    for i in rows_of(cache, row):
        reader, token, roles, method = _patch_reader(cache, i, "visual words", answer, space, by, norm, image, position)
        features = _patches(cache, FEATURES, i, image, skip=cache.model.cfg.vision.keep_class_token)
        each.append(_over_patches(cache.model, [features], reader, token, top, roles, method)[{"layer": 0}])
    return same_shape(each)


@torch.no_grad()
def tower_lens(
    source: Any,
    inputs: Inputs | None = None,
    answer: Word = None,
    *,
    space: str = "input",
    by: str | None = None,
    norm: str = "frozen",
    slot: int = 0,
    image: int = 0,
    position: int = -1,
    row: int | None = None,
    top: int = 5,
) -> Lens:
    """Every layer of the vision tower sent through the projector and read as words: `[layer, row, col]`.

    Layer 0 is the stream behind the pre-norm, layer l the one behind block l - 1. Where the projector takes several
    layers side by side, the layer stands in for the one in `slot`, and the other slots keep what the model reads
    there; so the layer that the model reads in `slot` gives `visual_words`. The projector runs in the model's dtype, as
    it is now. Everything else as in `visual_words`, so are the errors.
    """
    cache = _cache_of(source, inputs, "tower_lens")
    model = cache.model
    names = tower_streams(model)
    need(cache, names, call_of("tower_lens"))
    read_layers = model.cfg.vision.feature_layers
    takes = len(read_layers)
    slot = whole(f"projector layers {read_layers}: slot", slot, -takes, takes - 1) % takes
    keep = model.cfg.vision.keep_class_token
    each = []
    for i in rows_of(cache, row):
        reader, token, roles, method = _patch_reader(cache, i, "tower lens", answer, space, by, norm, image, position)
        streams = [_patches(cache, name, i, image, skip=False) for name in names]
        features = []
        for stream in streams:
            swapped = list(streams)
            swapped[read_layers[slot]] = stream
            weight = next(model.projector.parameters())
            chosen = model.vision.select([s[None].to(weight.device, weight.dtype) for s in swapped])
            pixels = cache.inputs.pixels[:1].to(weight.device)  # type: ignore[union-attr,index]
            features.append(model.project(chosen, pixels)[0, int(keep) :])
        beside = {"slot": slot, "feature_layers": list(read_layers)} if len(read_layers) > 1 else {}
        each.append(_over_patches(model, features, reader, token, top, roles, {**method, **beside}))
    return same_shape(each)


def tower_streams(model: Any) -> list[str]:
    """The tower's stream behind the pre-norm and behind every block; raises `LensError` for a model without a tower."""
    if model.cfg.vision is None:
        raise LensError("this model has no vision tower; its lenses are logit_lens and those of heads and neurons")
    return ["vision.hook_embed", *(f"vision.blocks.{i}.hook_resid_post" for i in range(model.cfg.vision.n_layers))]


def _cache_of(source: Any, inputs: Inputs | None, what: str) -> LlavaCache:
    """A cache as it is, or that of a run of the model on inputs."""
    cache_given = isinstance(source, LlavaCache)
    if cache_given != (inputs is None):
        raise LensError(f"{what} takes a cache alone, or a model and inputs: {what}(model, inputs)")
    model = source.model if cache_given else source
    if not hasattr(model, "run_with_cache"):
        raise LensError(f"{what} of {type(model).__name__}; expected a cache, or a model and inputs")
    if model.cfg.vision is None:
        tower_streams(model)
    if cache_given:
        return source
    if inputs is not None and inputs.pixels is None:
        raise LensError(f"{what} reads a picture; these inputs have none")
    return model.run_with_cache(inputs, names_filter=names_for_lens(model, what))[1]


def _patch_reader(
    cache: LlavaCache, row: int, what: str, answer: Word, space: str, by: str | None, norm: str, image: int, at: int
) -> tuple[Reader, int, Roles, dict[str, Any]]:
    """The reader of one row's patches, the word asked about, the row's roles and what the lens says of itself."""
    roles = roles_of(cache, row)
    image = whole("image", image, 0, roles.n_images - 1) if roles.n_images else image
    roles.picture(image)
    one_of("norm", (norm,), NORMS)
    token, readout = asked(cache, row, at, answer)
    scale = scale_of(cache, readout, norm) if space == "output" else None
    reader = Reader.of(cache.model, space, by, scale)
    facts: dict[str, Any] = {"space": space, "image": image}
    if space == "output":
        facts["norm"] = norm if scale is None else f"frozen, {scale:.4g}"
    return reader, token, roles, facts_of(cache.model, what, token, **facts)


def scale_of(cache: LlavaCache, readout: Readout | None, norm: str) -> float | None:
    """The factor of the frozen norm, None for each vector's own; raises `LensError` for another norm."""
    one_of("norm", (norm,), NORMS)
    if norm == "own":
        return None
    if readout is None:
        raise LensError(
            f"norm='frozen' takes the scale of the final stream, and the cache lacks {STREAM} or "
            f"{last_stream(cache.model)}; keep them, or norm='own'"
        )
    return readout.scale


def roles_of(cache: LlavaCache, row: int) -> Roles:
    """The roles of one row; raises `LensError` where the inputs carried none."""
    roles = Place(cache, row, 0).roles
    if roles is None:
        raise LensError("this cache does not know whose its pictures are: its inputs carried no roles")
    return roles


def _patches(cache: LlavaCache, name: str, row: int, image: int, skip: bool) -> Float[Tensor, "patch width"]:
    """An entry of tower or projector for one picture of one row, without its class token if `skip`."""
    entry = cache[name]
    before = sum(roles_of(cache, i).n_images for i in range(row))
    entry = entry[before + image] if cache.has_image_dim else entry
    return entry[int(skip) :]


def _over_patches(
    model: Any, features: list[Tensor], reader: Reader, token: int, top: int, roles: Roles, method: dict[str, Any]
) -> Lens:
    """Patches of several layers read as words, `[layer, row, col]`."""
    picture = roles.picture(method["image"])
    rows, cols = picture.grid
    columns = cols if len(features[0]) == rows * cols else model.cfg.vision.token_grid[1]
    reads = [reader.read(each[picture.patches(columns)], token, top) for each in features]
    over = (rearrange(torch.stack(each), "layer (row col) ... -> layer row col ...", row=rows, col=cols)
            for each in zip(*reads, strict=True))  # fmt: skip
    read = Read(*over)
    scores = Scores(read.scores, ("layer", "row", "col"), {}, UNITS[reader.by], method, None, (roles,))
    return Lens.of(model, read, scores)
