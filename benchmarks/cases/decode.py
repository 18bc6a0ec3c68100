"""Tokens per second of greedy decoding behind a prompt with a picture.

Unusual: both write as many tokens as asked, no ending among them, and only the time from the first new token to the
last counts, so the prompt's own forward is outside; whether the tokens are the same is the error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.cases import Case
from benchmarks.cases.sweeps import Found
from benchmarks.compare import Settings, Variant, compare
from benchmarks.floors import Work
from benchmarks.measure import Own
from benchmarks.models import SIZES, Size, Study, make_study

AGAINST = "the tokens that hf sdpa wrote (decode: 0 for a token that is the same, 1 for another)"
Tick = Callable[[], None]
"""To be called when a new token is there."""


class Streamer:
    """What Hugging Face's `generate` calls with the prompt and then with every token."""

    def __init__(self, tick: Tick):
        self.tick, self.prompt_is_next = tick, True

    def put(self, _: Tensor) -> None:
        """The prompt comes first and is no new token."""
        if not self.prompt_is_next:
            self.tick()
        self.prompt_is_next = False

    def end(self) -> None:
        """Nothing is held back."""


def by_hf(study: Study, count: int, tick: Tick) -> Tensor:
    """With its default cache."""
    never = dict(eos_token_id=[], pad_token_id=0, suppress_tokens=[study.size.image_token])
    how: Any = dict(max_new_tokens=count, do_sample=False, streamer=Streamer(tick), **never)
    return study.hf.generate(**study.clean.for_hf(), **how)[0, -count:]


def by_ours(study: Study, count: int, tick: Tick) -> Tensor:
    """With its own cache; it never writes `<image>`."""
    return study.model.generate(study.clean, count, stop_tokens=(), on_step=lambda _: tick())[0, -count:]


def between_tokens(write: Callable[[Tick], Tensor], wanted: Tensor) -> Own:
    """Seconds from the first new token to the last, and which tokens are not those wanted."""
    stamps: list[float] = []

    def tick() -> None:
        if wanted.is_cuda:
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    written = write(tick)
    assert len(stamps) == len(wanted), f"{len(stamps)} ticks for {len(wanted)} tokens"
    return Own((written != wanted).double(), stamps[-1] - stamps[0])


def sizes(settings: Settings) -> tuple[list[Size], int]:
    """Models, and how many tokens they write after the first."""
    if settings.quick:
        return [SIZES["toy"]], 8
    return [SIZES["7b"]] if settings.device.startswith("cuda") else [SIZES["toy"], SIZES["gemm"]], 64


def steps(size: Size, new: int, itemsize: int) -> Work:
    """Each of `new` positions behind all that came before it."""
    return sum((floors.decoder(size, 1, 1, itemsize, seen=size.positions + i) for i in range(new)), Work())


def greedy(settings: Settings) -> Found:
    """Batch 1."""
    found: Found = []
    models, new = sizes(settings)
    for size in models:
        study = make_study(size, device=settings.device, dtype=settings.dtype)
        wanted = by_hf(study, new + 1, lambda: None)
        work = steps(size, new, settings.dtype.itemsize)
        ways = {"hf sdpa": by_hf, "llava_lens": by_ours}
        runs = {way: partial(between_tokens, partial(by, study, new + 1), wanted) for way, by in ways.items()}
        variants = [Variant(way, run, work=work) for way, run in runs.items()]
        same = torch.zeros(new + 1)
        rows = compare("decode/greedy", size, {"size": size.name}, new, variants, same, settings, AGAINST)
        found += [replace(row, per_second=f"{new / row.seconds.median:.1f} tokens") for row in rows]
    return found


CASES = [Case("decode/greedy", "tokens behind a prompt with a picture, one at a time", greedy)]
