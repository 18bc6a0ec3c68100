"""One forward to the logits of the last position: Hugging Face in four guises, TransformerLens's bridge, llava_lens.

Unusual: compiling takes minutes where the rest takes seconds, so a compiled twin is made for the smallest batch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import floors, ours, truth, twins
from benchmarks.bridge import Bridge
from benchmarks.cases import Case, Found
from benchmarks.compare import Settings, Variant, compare, parted
from benchmarks.models import SIZES, Size, batch_of, make_study
from benchmarks.twins import Forward

AGAINST = "llava_lens on the same weights in float64, one block at a time (logits of the last position)"


def sizes(settings: Settings) -> list[tuple[Size, tuple[int, ...]]]:
    """Models and the batches that each is given."""
    if settings.quick:
        return [(SIZES["toy"], (1, 2))]
    if settings.cuda:
        return [(SIZES["7b"], (1, 8, 32))]
    return [(SIZES["toy"], (1, 8)), (SIZES["gemm"], (1, 8))]


def prefill(settings: Settings) -> Found:
    """Pictures and prompts to the last logits."""
    for size, batches in sizes(settings):
        for batch in batches:
            yield from of(size, batch, settings, batch == min(batches))


def of(size: Size, batch: int, settings: Settings, compiling: bool) -> Found:
    """One size and batch."""
    study = make_study(size, device=settings.device, dtype=settings.dtype)
    inputs = batch_of(study, batch)
    rarely = "compiled for the smallest batch alone: it takes minutes"
    ways: dict[str, Callable[[], Forward | str]] = {
        "hf sdpa": lambda: twins.plain(study.hf),
        "hf eager": lambda: twins.plain(twins.sharing(study.hf, "eager")),
        "hf compiled": lambda: twins.compiled(study.hf, inputs, settings) if compiling else rarely,
        "liger-kernel": lambda: twins.liger(study.hf),
        "transformer_lens": lambda: Bridge(study).last_logits,
    }
    made = {way: make() for way, make in ways.items()}
    made |= {way: partial(ours.last_logits, model) for way, model in study.variants.items()} | study.missing
    name, params = "forward/prefill", {"size": size.name, "batch": batch}
    work = floors.prefill(size, batch, settings.dtype.itemsize)
    runs, left_out = parted(f"{name} batch={batch}", made)
    variants = [Variant(way, partial(run, inputs), work=work) for way, run in runs.items()]
    exact = truth.last_logits(study.reference, inputs)
    yield from compare(name, size, params, batch, variants, exact, settings, AGAINST)
    yield from left_out


CASES = [Case("forward/prefill", "pictures and prompts to the logits of the last position", prefill)]
