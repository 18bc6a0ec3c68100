"""What linear accounts of a logit share: which entries they read, and the direction they project on.

Unusual: a question is a direction per position and answer, so that differences, several answers and answers of several
tokens are all one sum of products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.answers import Several, Word, check_several, predicted_at, tokens_of, told
from llava_lens.analysis.attribution.needs import many, one_of, stack_names
from llava_lens.analysis.attribution.query import Place
from llava_lens.analysis.attribution.rebuild import beside
from llava_lens.analysis.scores import Label, Scores
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError
from llava_lens.kernels import upcast
from llava_lens.projector import Projector
from llava_lens.record import TOWER
from llava_lens.vision import Vision

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


def attribution_names(model: Any, *by: str, through: str | None = None) -> list[str]:
    """The cache entries that an attribution reads, for `names_filter`.

    Those of `direct_logit_attribution(by=…)`; with `through` those of `tower_attribution(by=…, through=…)`. Raises
    `LensError` for an unknown `by` or `through`, for a tower that the model does not have, and for one, or a projector,
    that is not computed as LLaVA's.

    >>> from llava_lens import HookedLlava, LlavaConfig
    >>> cfg = LlavaConfig(n_layers=1, d_model=8, n_heads=2, n_key_value_heads=2, d_head=4, d_mlp=8, act_fn="silu",
    ...                   eps=1e-5, normalization_type="RMS", n_ctx=16, d_vocab=11)
    >>> attribution_names(HookedLlava(cfg), "head")
    ['blocks.0.hook_resid_pre', 'blocks.0.attn.hook_z', 'blocks.0.hook_attn_out', 'blocks.0.hook_mlp_out',
     'blocks.0.hook_resid_post']
    """
    if through is None:
        return stack_names(model, PARTS, by)
    one_of("by", by, (each for each in PARTS if each != "layer"))
    decoder = stack_names(model, THROUGH, (through,), "through")
    if model.cfg.vision is None:
        raise LensError("this model has no vision tower; expected one that looks at pictures")
    suffixes = dict.fromkeys(suffix for each in by for suffix in PARTS[each])
    if type(model.projector).forward is not Projector.forward or type(model.vision).select is not Vision.select:
        kinds = f"{type(model.projector).__name__} behind {type(model.vision).__name__}"
        raise LensError(f"{kinds}; expected a projector of two layers that reads the tower's streams as they are")
    blocks = [f"{TOWER}blocks.{layer}.{s}" for layer in range(model.cfg.vision.n_layers) for s in suffixes]
    norm = () if model.projector.norm is None else ("norm.hook_scale",)
    tower = [f"{TOWER}hook_embed", *blocks, *(f"projector.{name}" for name in (*PROJECTOR, *norm))]
    return [*tower, *decoder]


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
        check_several(several)
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
                    Place.of(cache, row, at).same_logit(token)
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
        method = method if many(answer) is not None else {key: facts[0] for key, facts in method.items()}
        method["query"] = one_or_all([there.in_prompt for there, _ in terms])
        method["norm_scale"] = one_or_all([frozen_scale(there) for there, _ in terms])
        names = tuple(name_of(facts, many(versus) is not None) for facts in told_of)
        return cls(place, tuple(terms), logit, None if many(answer) is None else names, method)

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
    several, against = many(answer), many(versus)
    if [] in (several, against):
        raise LensError("no answer: an empty list; expected one or more, or None for the model's own choice")
    answers = [cast(Word, answer)] if several is None else several
    others = [cast(Word, versus)] * len(answers) if against is None else against
    if len(others) != len(answers):
        raise LensError(f"{len(others)} in versus=, {len(answers)} in answer=; expected one, or one for each answer")
    return answers, others


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
