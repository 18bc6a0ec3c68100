"""What linear accounts of a logit share: which entries they read, the direction they project on, what must agree.

Unusual: before a sum is split, what was split is rebuilt from its parts and the model's weights, so that changed
weights or an edited activation raise instead of shifting every number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.answers import Several, Word, predicted_at, tokens_of, told
from llava_lens.analysis.attribution.query import Place
from llava_lens.analysis.scores import Label, Scores
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError, nearest
from llava_lens.kernels import upcast
from llava_lens.record import TOWER

Answers = Word | Sequence[Word]
"""One answer, or several that are asked about together."""

SUMS = ("hook_attn_out", "hook_mlp_out")
PARTS: dict[str, tuple[str, ...]] = {
    "component": SUMS,
    "layer": SUMS,
    "head": ("attn.hook_z", *SUMS),
    "neuron": ("mlp.hook_post", *SUMS),
    "source": ("attn.hook_pattern", "attn.hook_v", *SUMS),
}
"""What each split reads of every block, in the decoder and in the tower."""
THROUGH: dict[str, tuple[str, ...]] = {
    "direct": ("ln1.hook_scale", "attn.hook_pattern"),
    "all": ("ln1.hook_scale", "attn.hook_pattern", "ln2.hook_scale", "mlp.hook_pre"),
}
"""What the way from the image features to the answer reads of every decoder block."""
PROJECTOR = ("hook_in", "hook_pre", "hook_post", "hook_out")
ROUNDING, LEAST = 8, 2e-3
"""Two ways to form a sum may differ by so many units of rounding, or by TF32's, relative to what it is as long as."""


def attribution_names(model: Any, *by: str, through: str | None = None) -> list[str]:
    """The cache entries that an attribution reads, for `names_filter`.

    Those of `direct_logit_attribution(by=…)`; with `through` those of `tower_attribution(by=…, through=…)`. Raises
    `LensError` for an unknown `by` or `through`, and for a tower that the model does not have.

    >>> from llava_lens import HookedLlava, LlavaConfig
    >>> cfg = LlavaConfig(n_layers=1, d_model=8, n_heads=2, n_key_value_heads=2, d_head=4, d_mlp=8, act_fn="silu",
    ...                   eps=1e-5, normalization_type="RMS", n_ctx=16, d_vocab=11)
    >>> attribution_names(HookedLlava(cfg), "head")
    ['blocks.0.hook_resid_pre', 'blocks.0.attn.hook_z', 'blocks.0.hook_attn_out', 'blocks.0.hook_mlp_out',
     'blocks.0.hook_resid_post']
    """
    known = tuple(PARTS) if through is None else tuple(each for each in PARTS if each != "layer")
    one_of("by", by, known)
    suffixes = dict.fromkeys(suffix for each in by for suffix in PARTS[each])
    if through is None:
        return [*_stack(model, suffixes), f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    one_of("through", (through,), tuple(THROUGH))
    if model.cfg.vision is None:
        raise LensError("this model has no vision tower; expected one that looks at pictures")
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    blocks = [f"{TOWER}blocks.{layer}.{s}" for layer in range(model.cfg.vision.n_layers) for s in suffixes]
    tower = [f"{TOWER}hook_embed", *blocks, *(f"projector.{name}" for name in PROJECTOR)]
    return [*tower, *_stack(model, THROUGH[through]), last]


def _stack(model: Any, suffixes: Iterable[str]) -> list[str]:
    """The decoder's embedding, and some entries of every block."""
    each = tuple(suffixes)
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.{s}" for layer in range(model.cfg.n_layers) for s in each)]


def one_of(what: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    """Raise `LensError` for a choice that there is not, with the nearest."""
    for each in given:
        if each not in known:
            hint = nearest(str(each), known)
            raise LensError(f"{what}={each!r}; expected {', '.join(map(repr, known))}{hint}")


def need(cache: LlavaCache, by: str, through: str | None = None) -> None:
    """Raise `LensError` for entries that the cache lacks, naming them, and for those that do not fit the model."""
    names = attribution_names(cache.model, by, through=through)
    missing = [name for name in names if name not in cache]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        call = f"attribution_names(model, {by!r}{'' if through is None else f', through={through!r}'})"
        raise LensError(
            f"the cache lacks {shown}; run with names_filter={call} (llava_lens.analysis.attribution_names), "
            "or without a filter"
        )
    _fits(cache, names)


def _fits(cache: LlavaCache, names: Iterable[str]) -> None:
    """Raise `LensError` for an entry whose widths are not the model's, or one of a layer that it does not have."""
    cfg, n = cache.model.cfg, cache.model.cfg.n_layers
    beyond = f"blocks.{n}."
    deeper = next((name for name in cache.cache_dict if name.startswith(beyond)), None)
    if deeper is not None:
        raise LensError(f"the cache holds {deeper!r}, and the model has {n} layers: it is another model's cache")
    for name in names:
        by_image = name.startswith((TOWER, "projector."))
        own: Any = cfg.vision if name.startswith(TOWER) else cfg
        width = {"head": own.n_heads, "kv_head": own.n_key_value_heads, "d_head": own.d_head, "d_mlp": own.d_mlp}
        width |= {"d_model": own.d_model, "1": 1}
        if cfg.vision is not None:
            width |= {"d_features": cfg.vision.d_model * len(cfg.vision.feature_layers)}
        axes = cache.model.hook(name).axes.split()
        axes = axes if (cache.has_image_dim if by_image else cache.has_batch_dim) else axes[1:]
        shape = tuple(cache[name].shape)
        if len(shape) != len(axes) or any(width.get(a, size) != size for a, size in zip(axes, shape, strict=True)):
            expected = ", ".join(f"{a} {width[a]}" if width.get(a, 1) != 1 else a for a in axes)
            raise LensError(
                f"{name!r} is {list(shape)}; this model's has [{expected}]: it is another model's cache, "
                "or the batch axis is not where the cache says"
            )


def beside(weight: Tensor, like: Tensor) -> Tensor:
    """A weight in the precision of the activation it meets, and on its device."""
    return weight.detach().to(like)


def rebuilt(
    x: Float[Tensor, "*rows d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"],
    seen: Float[Tensor, "*rows d_out"],
    eps: float,
    what: str,
) -> None:
    """Raise `LensError` where `x` through the weights is not what the run made of it, beyond rounding of `eps`."""
    length = torch.linalg.vector_norm
    missed = length(x @ weight.T + bias - seen, dim=-1)
    typical = length(x, dim=-1) * length(weight) / x.shape[-1] ** 0.5 + length(seen, dim=-1)
    if bool((missed > max(ROUNDING * eps, LEAST) * typical).any()):
        raise LensError(
            f"{what}: the model's weights changed after the run, it is another model's cache, or a hook edited it"
        )


@dataclass(frozen=True)
class Asked:
    """A linear question to one row of a cache: for every answer a direction in the final stream.

    `terms` pairs each position that predicts a token with the directions read there; `<direction, final stream>`,
    summed over them, is `logit`: the answer's, less that of `versus`. `words` are the names of several answers, None
    where one was asked about.
    """

    place: Place
    terms: tuple[tuple[Place, Float[Tensor, "answer d_model"]], ...]
    logit: Float[Tensor, " answer"]
    words: tuple[Label, ...] | None
    method: dict[str, Any]

    @classmethod
    def of(
        cls,
        cache: LlavaCache,
        row: int,
        position: int,
        answer: Answers,
        versus: Answers = None,
        several: Several = None,
    ) -> Asked:
        """Read answers and position; raises `LensError` for what is not there and for answers of several tokens."""
        place, model = Place.of(cache, row, position), cache.model
        answers, others = pairs(answer, versus)
        told_of: list[dict[str, Any]] = []
        tokens: dict[int, list[tuple[int, int, int]]] = {}
        for i, (word, other) in enumerate(zip(answers, others, strict=True)):
            facts: dict[str, Any] = {}
            for sign, what, each in ((1, "answer", word), (-1, "versus", other)):
                if each is None and sign < 0:
                    continue
                ids = [own_choice(place)] if each is None else tokens_of(model, each, several, what)
                said = told(model, ids, None if each is None else tokens_of(model, each, "all", what))
                facts |= {named_for(what, key): fact for key, fact in said.items()}
                for at, token in predicted_at(cache, row, place.in_prompt, ids):
                    tokens.setdefault(at, []).append((i, token, sign))
            told_of.append(facts)
        terms = []
        for at, wanted in sorted(tokens.items()):
            there = Place.of(cache, row, at)
            read = torch.zeros(len(answers), model.cfg.d_model, dtype=final(there).dtype, device=final(there).device)
            for i, token, sign in wanted:
                read[i] += sign * beside(model.unembed.weight[token], read)
            terms.append((there, read * beside(model.ln_final.w, read) * frozen_scale(there)))
        logit = torch.stack([directions @ final(there) for there, directions in terms]).sum(0)
        method = {key: [f.get(key) for f in told_of] for key in dict.fromkeys(key for f in told_of for key in f)}
        method = method if listed(answer) else {key: facts[0] for key, facts in method.items()}
        method["query"] = one_or_all([there.in_prompt for there, _ in terms])
        method["norm_scale"] = one_or_all([frozen_scale(there) for there, _ in terms])
        names = tuple(name_of(facts, bool(listed(versus))) for facts in told_of)
        return cls(place, tuple(terms), logit, names if listed(answer) else None, method)

    def plain(self, values: Float[Tensor, " answer"]) -> Any:
        """One number per answer as lists of numbers, or the number of the only one."""
        return values.tolist() if self.words is not None else float(values[0])

    def scores(
        self,
        values: Float[Tensor, "answer *axes"],
        axes: tuple[str, ...],
        rest: Mapping[str, Float[Tensor, " answer"]],
        total: Float[Tensor, " answer"],
        labels: Mapping[str, tuple[Label, ...]],
        facts: Mapping[str, Any],
        roles: bool,
    ) -> Scores:
        """The scores, with the rest of the sum, and how far both together miss the total."""
        summed = values.double().flatten(1).sum(1) + sum(each.double() for each in rest.values())
        closure = float((summed - total.double()).abs().max())
        method = {**facts, **self.method, "logit": self.plain(self.logit)}
        method["rest"] = {name: self.plain(each) for name, each in rest.items()}
        named = {**labels, **({} if self.words is None else {"answer": self.words})}
        if self.words is None:
            values = values[0]
        axes = axes if self.words is None else ("answer", *axes)
        return Scores(values, axes, named, "logits", method, closure, self.place.roles_or_none if roles else None)


def pairs(answer: Answers, versus: Answers) -> tuple[list[Word], list[Word]]:
    """Answers, and what each is compared with; raises `LensError` where they are not as many."""
    answers = listed(answer) or [cast(Word, answer)]
    others = listed(versus) or [cast(Word, versus)] * len(answers)
    if [] in (answer, versus) or () in (answer, versus):
        raise LensError("no answer: an empty list; expected one or more, or None for the model's own choice")
    if len(others) != len(answers):
        raise LensError(f"{len(others)} in versus=, {len(answers)} in answer=; expected one, or one for each answer")
    return answers, others


def listed(words: Answers) -> list[Word]:
    """Several answers as a list, none for one alone."""
    return list(words) if isinstance(words, list | tuple) else []


def named_for(what: str, key: str) -> str:
    """A fact about the answer (`answer`, `answer_id`, `scored`), named after what it is about."""
    return key if what == "answer" else key.replace("answer", what) if "answer" in key else f"{what}_{key}"


def name_of(facts: Mapping[str, Any], both: bool) -> Label:
    """An answer's word, or its id; with what it is compared with, where each has its own."""
    said, other = (facts.get(what) or facts.get(f"{what}_id", 0) for what in ("answer", "versus"))
    return f"{said} − {other}" if both else said


def one_or_all(values: list[Any]) -> Any:
    """The only one, or all."""
    return values[0] if len(values) == 1 else values


def final(place: Place) -> Float[Tensor, " d_model"]:
    """The model's final stream at a position."""
    return place.at(place.n_layers - 1, "hook_resid_post")


def frozen_scale(place: Place) -> float:
    """What the final norm multiplies the stream with, before its gain."""
    return float((final(place).square().mean() + place.cache.model.cfg.eps).rsqrt())


def own_choice(place: Place) -> int:
    """The token that the model finds likeliest after a position."""
    model, x = place.cache.model, final(place)
    normed = x * beside(model.ln_final.w, x)
    parts = [upcast(beside(rows, x)) @ normed for rows in model.unembed.weight.split(4096)]
    return int(torch.cat(parts).argmax())
