"""One forward to the logits of the last position: Hugging Face in four guises, TransformerLens's bridge, llava_lens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmarks import floors, ours, truth, twins
from benchmarks.bridge import Bridge
from benchmarks.cases import Case
from benchmarks.cases.sweeps import Found
from benchmarks.compare import Settings, Variant, compare
from benchmarks.models import SIZES, Size, batch_of, make_study
from benchmarks.rows import LeftOut
from benchmarks.twins import Forward

AGAINST = "llava_lens on the same weights in float64, one block at a time (logits of the last position)"


def sizes(settings: Settings) -> list[tuple[Size, tuple[int, ...]]]:
    """Models and the batches that each is given."""
    if settings.quick:
        return [(SIZES["toy"], (1, 2))]
    if settings.device.startswith("cuda"):
        return [(SIZES["7b"], (1, 8, 32))]
    return [(SIZES["toy"], (1, 8)), (SIZES["gemm"], (1, 8))]


def steady(settings: Settings, size: Size) -> Settings:
    """Ten times the rounds for a toy, whose forwards take milliseconds."""
    small = size.name == "toy" and not settings.quick
    return replace(settings, rounds=10 * settings.rounds) if small else settings


def prefill(settings: Settings) -> Found:
    """Pictures and prompts to the last logits."""
    return [found for size, batches in sizes(settings) for batch in batches for found in of(size, batch, settings)]


def of(size: Size, batch: int, settings: Settings) -> Found:
    """One size and batch."""
    study = make_study(size, device=settings.device, dtype=settings.dtype)
    inputs = batch_of(study, batch)
    ways: dict[str, Callable[[], Forward | str]] = {
        "hf sdpa": lambda: twins.plain(study.hf),
        "hf eager": lambda: twins.plain(twins.sharing(study.hf, "eager")),
        "hf compiled": lambda: twins.compiled(study.hf, inputs, settings.quick),
        "liger-kernel": lambda: twins.liger(study.hf),
        "transformer_lens": lambda: Bridge(study).last_logits,
        "llava_lens": lambda: partial(ours.last_logits, study.model),
    }
    name, params = "forward/prefill", {"size": size.name, "batch": batch}
    made = {way: make() for way, make in ways.items()}
    work = floors.prefill(size, batch, settings.dtype.itemsize)
    variants = [Variant(way, partial(run, inputs), work=work) for way, run in made.items() if not isinstance(run, str)]
    exact = truth.last_logits(study.model, inputs)
    rows = compare(name, size, params, batch, variants, exact, steady(settings, size), AGAINST)
    left_out = [LeftOut(f"{name} batch={batch}", way, why) for way, why in made.items() if isinstance(why, str)]
    return [*rows, *left_out]


CASES = [Case("forward/prefill", "pictures and prompts to the logits of the last position", prefill)]
