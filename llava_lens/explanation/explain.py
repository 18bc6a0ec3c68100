"""The main question about one picture: what is the answer, and which heads, patches, layers and neurons produced it?

Unusual: the map sums all heads instead of drawing the single top one. On the embedded model, asked for a colour in 240
held-out scenes, the strongest patch then lies on the asked object in 97.1 % (Wilson 95 %: 94.1–98.6 %); summed over the
10, 5 and 1 heads with the highest increase in 96.7, 92.1 and 82.9 %, by mean attention in 89.2 %, by chance in 13.5 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.account import attribution_names
from llava_lens.analysis.attribution.answers import Several, Word, tokens_of
from llava_lens.analysis.attribution.direct import direct_logit_attribution
from llava_lens.analysis.attribution.log_prob import log_prob_increase, mean_attention, names_for
from llava_lens.analysis.interventions.study import read
from llava_lens.analysis.lenses.lens import logit_lens, names_for_lens
from llava_lens.analysis.lenses.words import word_of
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError, nearest
from llava_lens.explanation.findings import LISTED
from llava_lens.explanation.result import Explanation
from llava_lens.inputs import Inputs
from llava_lens.maps.importance import importance_map, method_of
from llava_lens.record import Cuts, Recorder
from llava_lens.roles import Roles

SPLITS = ("layer", "head", "neuron", "source")
"""What the direct contributions to the logit can be split by."""


@torch.no_grad()
def explain(
    model: Any,
    inputs: Any,
    answer: Word = None,
    versus: Word = None,
    *,
    method: str = "lpi",
    by: str | Sequence[str] = ("layer", "head"),
    several: Several = None,
    image: int = 0,
    top_k: int | None = None,
    max_new_tokens: int = 16,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Explanation:
    """Answer a question about a picture and say which heads, patches, layers and neurons produced the next token.

    All heads are scored by log-probability increase (arXiv 2411.10950), no number off by more than 1e-4 nats unless
    `top_k` says how many head × position cells are exact. `method` makes the map over the patches of picture `image`:
    a name in `llava_lens.maps.METHODS`, whose `options` may follow; "lpi" sums the increases over all heads. `by` says
    how the direct contributions to the logit are split: "layer", "head", "neuron" (which lists neurons by their
    increase too), "source".

    `answer` is the token to explain, an id or a string that is one token, by default the model's own choice; of several
    tokens `several` takes the "first" or "all", whose start must stand in the prompt. With `versus` the map (of methods
    that can) and the direct contributions explain the answer's lead over another one. `inputs` are one row with one
    picture or more, from `model.prepare` (of others it is not known which pixels a patch shows); a given start of the
    answer moves what is explained to the token after it.

    Raises `LensError` for several rows, no picture, an unknown method, option or split, a string of several tokens.
    """
    splits = splits_of(by)
    inputs = _one_row(read(model, inputs))
    roles = inputs.roles_of()
    roles.picture(image)
    about = method_of(method)[1].about
    kept = 1 if answer is None or several != "all" else len(tokens_of(model, answer, "all"))
    neurons = "neuron" in splits
    asked = ("layer", "head", "position", *(("neuron",) if neurons else ()))
    names = {*names_for(model, *asked), *names_for_lens(model, "logit_lens")}
    names |= set(attribution_names(model, *splits)) if splits else set()
    logits, cache = _look(model, inputs, names, min(kept, inputs.n_pos))
    heads = log_prob_increase(cache, answer, "head", several=several, exact=True)
    told = heads.method["answer_id"]
    token = told if isinstance(told, int) else told[-1]
    again: dict[str, Any] = {"answer": told if isinstance(told, int) else answer, "several": several}
    other = None if versus is None else tokens_of(model, versus, several, "versus")
    layers = log_prob_increase(cache, by="layer", **again)
    positions = log_prob_increase(cache, by="position", top_k=top_k, **again)
    if method == "lpi" and versus is None and not options:
        passes = {"forward": 1, "backward": 0}
        grid = positions.over_image(image)
        grid = replace(grid, method={**positions.method, "score": "lpi", "image": image, "passes": passes})
    else:
        how = {"image": image, "several": several, "seed": seed, "progress": progress}
        grid = importance_map(model, inputs, method, again["answer"], versus, **how, **options)
    log_p = logits.double().log_softmax(-1)
    best = log_p.topk(min(LISTED, len(log_p)))
    return Explanation(
        model=model.cfg.model_name,
        question=_question(roles),
        text=_greedy(model, inputs, max_new_tokens),
        answer=heads.method["answer"] or word_of(model, token),
        answer_id=told,
        probability=float(log_p[token].exp()) if isinstance(told, int) else math.exp(layers.method["log_prob"]),
        likeliest=tuple((word_of(model, int(i)), float(p.exp())) for p, i in zip(*best, strict=True)),
        layers=layers,
        heads=heads,
        positions=positions,
        attention=mean_attention(cache),
        map=grid,
        about=about,
        direct={each: direct_logit_attribution(cache, versus=versus, by=each, **again) for each in splits},
        neurons=log_prob_increase(cache, by="neuron", **again) if neurons else None,
        lens=logit_lens(cache, "last", token)[{"position": 0}],
        versus=None if other is None else "".join(word_of(model, i) for i in other),
        lead=None if other is None else float(log_p[token] - log_p[other[0]]),
        roles=roles,
        image=image,
    )


def splits_of(by: str | Sequence[str]) -> tuple[str, ...]:
    """The splits named, once each; raises `LensError` for one that there is not."""
    splits = tuple(dict.fromkeys([by] if isinstance(by, str) else by))
    wrong = next((each for each in splits if each not in SPLITS), None)
    if wrong is not None:
        raise LensError(f"by={wrong!r}{nearest(str(wrong), SPLITS)}; expected some of {', '.join(map(repr, SPLITS))}")
    return splits


def _one_row(inputs: Inputs) -> Inputs:
    """The only row, without its padding."""
    if inputs.batch_size != 1:
        raise LensError(f"a batch of {inputs.batch_size}; explain one at a time: inputs.row(0)")
    if inputs.pixels is None:
        raise LensError("no picture: pixels are missing; make the inputs with model.prepare(question, image)")
    return inputs.row(0)


def _look(model: Any, inputs: Inputs, names: set[str], kept: int) -> tuple[Float[Tensor, " d_vocab"], LlavaCache]:
    """The next token's logits `[d_vocab]`, and a cache of the last `kept` positions that holds all values."""
    everywhere, at_last = Recorder(Cuts()), Recorder(Cuts(slice(-kept, None)))
    hooks = [(name, everywhere if name.endswith("hook_v") else at_last) for name in sorted(names)]
    with model.hooks(fwd_hooks=hooks):
        logits = model(inputs, logits_to_keep=1)[0, -1]
    positions = tuple(range(inputs.n_pos - kept, inputs.n_pos))
    stored = everywhere.stored | at_last.stored
    return logits, LlavaCache(stored, model, inputs=inputs, asked=frozenset(names), kept=positions)


def _question(roles: Roles) -> str:
    spans = [span for span, label in zip(roles.spans, roles.labels, strict=False) if label == "question"]
    return roles.text[min(s for s, _ in spans) : max(e for _, e in spans)] if spans else roles.text


def _greedy(model: Any, inputs: Inputs, max_new_tokens: int) -> str:
    """What the model says, as far as the context has room for it; nothing where it has no tokenizer."""
    if model.processor is None:
        return ""
    room = max_new_tokens
    if model.cfg.max_positions is not None:
        room = min(room, model.cfg.max_positions - inputs.n_pos)
    return model.generate(inputs, max_new_tokens=room, return_type="text")[0] if room > 0 else ""
