"""What the last position looks at: its row of the attention pattern in every layer and head of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import floors, ours, tracing, truth, twins
from benchmarks.bridge import Bridge
from benchmarks.cases import Case, Found
from benchmarks.cases.cached import size_for
from benchmarks.compare import Settings, Variant, compare, parted
from benchmarks.models import make_study
from llava_lens import Inputs

AGAINST = "llava_lens on the same weights in float64, one block at a time (attention weights)"


@torch.inference_mode()
def by_hf(hf: Any, inputs: Inputs) -> Float[Tensor, "layer batch head key"]:
    """From an eager forward that returns whole patterns."""
    out = hf(**inputs.for_hf(), logits_to_keep=1, use_cache=False, output_attentions=True)
    return torch.stack([pattern[:, :, -1] for pattern in out.attentions])


def by_bridge(bridge: Bridge, inputs: Inputs) -> Float[Tensor, "layer batch head key"]:
    """From a cache of the patterns."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)]
    cache = bridge.cached(inputs, names)[1]
    return torch.stack([cache[name][:, :, -1] for name in names])


def last_row(settings: Settings) -> Found:
    """Batch 1."""
    size, name = size_for(settings), "patterns/last"
    study = make_study(size, device=settings.device, dtype=settings.dtype)
    inputs = study.clean
    with truth.in_float64(study.reference) as model:
        exact = ours.last_patterns(model, inputs.to(torch.float64))
    ways: dict[str, Callable[[], Tensor] | str] = {
        "hf eager": partial(by_hf, twins.sharing(study.hf, "eager"), inputs),
        "transformer_lens": partial(by_bridge, Bridge(study), inputs),
        "nnsight": tracing.MISSING or partial(tracing.Traced(study.hf).last_rows, inputs),
    }
    ways |= {way: partial(ours.last_patterns, model, inputs) for way, model in study.variants.items()} | study.missing
    work = floors.prefill(size, 1, settings.dtype.itemsize)
    runs, left_out = parted(name, ways)
    variants = [Variant(way, run, work=work) for way, run in runs.items()]
    cells = size.layers * size.heads
    yield from compare(name, size, {"size": size.name}, cells, variants, exact, settings, AGAINST)
    yield from left_out


CASES = [Case("patterns/last", "the last position's attention in every layer and head", last_row)]
