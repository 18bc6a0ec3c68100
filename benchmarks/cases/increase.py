"""Log-probability increases of every head × position from one cache: all projected to the vocabulary, or screened.

Unusual: random weights move the answer little, so the same is measured once more with weights that make the top head
as strong as in trained models (near 1 nat), where more cells need to be computed exactly. The cache is collected
outside the time of every variant.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Found
from benchmarks.cases.sweeps import Grid
from benchmarks.compare import Settings, compare
from benchmarks.models import SIZES, Size, Study, make_study
from benchmarks.rows import LeftOut
from llava_lens import HookedLlava, LlavaCache
from llava_lens.analysis import log_prob_increase, names_for
from llava_lens.kernels import upcast

BY = ("head", "position")
SIZE = Size("increase", 4, 1024, 2816, 16, 16, 32000, 24, 2, 128, 2)
"""Products of matrices are most of the work, as in the real model; the prompt is as long as its own."""
STRONG = {"unembed.weight": 3.0, "q_proj.weight": 2.0}
"""What weights are multiplied by so that attention is sharper and the answer likelier."""
ROWS = 256
"""Vectors that the dense way projects at a time."""


@torch.no_grad()
def strengthened(study: Study) -> Study:
    """The same study on a copy of its model with the decoder's weights named in `STRONG` multiplied."""
    hf = copy.deepcopy(study.hf)
    model = HookedLlava.from_hf(hf)
    for name, weight in model.named_parameters():
        if not name.startswith("vision."):
            weight.mul_(next((factor for end, factor in STRONG.items() if name.endswith(end)), 1.0))
    return replace(study, hf=hf, paths={"reference": model})


@torch.no_grad()
def cache_of(study: Study) -> LlavaCache:
    """What the increases read, of the clean prompt."""
    return study.model.run_with_cache(study.clean, names_filter=names_for(study.model, "head", BY))[1]


def vectors(cache: LlavaCache, layer: int, cells: list[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    """What some (head, position) of one layer add to the stream at the last position, `[cell, d_model]`."""
    attn = cache.model.blocks[layer].attn
    share = cache.model.cfg.n_heads // cache.model.cfg.n_key_value_heads
    pattern, v = cache["pattern", layer][0, :, -1].to(dtype), cache["v", layer][0].to(dtype)
    W_O = attn.W_O.detach().to(dtype)
    found = v.new_empty(len(cells), W_O.shape[-1])
    for head in {head for head, _ in cells}:
        own = [i for i, cell in enumerate(cells) if cell[0] == head]
        at = [cells[i][1] for i in own]
        found[own] = (pattern[head, at, None] * v[at, head // share]) @ W_O[head]
    return found


def dense(cache: LlavaCache, cells: list[Any], token: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every vector added to its base, normed by the model's final stream, projected, and put through a log-softmax."""
    model = cache.model
    unembed, gain = model.unembed.weight.detach().to(dtype), model.ln_final.w.detach().to(dtype)
    final = cache["resid_post", -1][0, -1].to(dtype)
    factor = gain / (final.pow(2).mean() + model.cfg.eps).sqrt()

    def log_p(stream: Tensor) -> Tensor:
        return upcast((stream * factor) @ unembed.T).log_softmax(-1)[..., token]

    def parts() -> Iterator[Tensor]:
        for layer in range(model.cfg.n_layers):
            base = cache["resid_pre", layer][0, -1].to(dtype)
            added = vectors(cache, layer, [cell[1:] for cell in cells if cell[0] == layer], dtype)
            yield from (log_p(base + some) - log_p(base) for some in added.split(ROWS))

    return torch.cat(list(parts()))


def cells(strong: bool, settings: Settings) -> Found:
    """Every head × position, a sample of them the dense way."""
    name = "increase/cells-strong" if strong else "increase/cells"
    size = SIZES["toy"] if settings.quick else SIZES["7b"] if settings.cuda else SIZE
    study = make_study(size, "picture", settings.device, settings.dtype)
    if strong and size.name == "7b":
        yield LeftOut(name, "every variant", "a second copy of weights of real size, changed, would be held")
        return
    cache = cache_of(strengthened(study) if strong else study)
    visit = 60 if settings.quick else 1024
    grid = Grid(size.layers, size.heads, size.positions, settings=settings, visit=visit, check=visit)
    heads = log_prob_increase(cache, by="head", exact=True)
    token = heads.method["answer_id"]
    screened = log_prob_increase(cache, token, BY)
    variants = [
        grid.looped("dense", lambda cells: dense(cache, list(cells), token)),
        grid.whole("llava_lens", lambda: log_prob_increase(cache, token, BY).values),
        grid.whole("llava_lens exact", lambda: log_prob_increase(cache, token, BY, exact=True).values),
    ]
    if settings.dtype == torch.bfloat16:
        narrow = partial(dense, cache, token=token, dtype=settings.dtype)
        variants.insert(1, grid.looped("dense bf16", lambda cells: narrow(list(cells))))
    params = {
        "top_head": round(heads.top(1)[0].value, 2),
        "first_order": f"{1 - screened.method['exact'] / screened.method['of']:.2%}",
    }
    exact = dense(cache, grid.checked, token, torch.float64)
    against = "two log-softmaxes in float64 of the same cache, collected outside all times (increases, in nats)"
    yield from compare(name, size, params, len(grid.cells), variants, exact, settings, against)


CASES = [
    Case("increase/cells", "log-probability increase of every head × position", partial(cells, False)),
    Case("increase/cells-strong", "the same where the top head has about 1 nat", partial(cells, True)),
]
