"""Tokens per second of greedy decoding behind a prompt with a picture.

Unusual: all write as many tokens as asked, no ending among them, and only the time from the first new token to the
last counts, so the prompt's own forward is outside. Nothing waits for the device in between that would not wait anyway.
The error is by how much the likeliest token, in float64 behind the same text, beats the one that was written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors, truth
from benchmarks.cases import Case, Found
from benchmarks.compare import Settings, Variant, compare
from benchmarks.floors import Work
from benchmarks.measure import Own
from benchmarks.models import SIZES, Size, Study, make_study
from benchmarks.rows import LeftOut
from llava_lens import HookedLlava, Inputs

AGAINST = "the likeliest tokens in float64 behind the same text (decode: logits that a written token is behind)"
Tick = Callable[[], None]
"""To be called when a new token is on its way."""


class Clock:
    """The time of every tick, on the stream of the device where there is one."""

    def __init__(self, device: str):
        self.cuda, self.marks = device.startswith("cuda"), []

    def tick(self) -> None:
        """Now, or when the device gets here."""
        mark: Any = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            mark.record()
        self.marks.append(mark)

    @property
    def seconds(self) -> float:
        """From the first tick to the last."""
        if not self.cuda:
            return self.marks[-1] - self.marks[0]
        torch.cuda.synchronize()
        return self.marks[0].elapsed_time(self.marks[-1]) / 1000


def by_hf(study: Study, count: int, tick: Tick) -> Tensor:
    """With its default cache; asked after every token whether to stop, it ticks and says no."""

    def stop(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        tick()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    never = dict(eos_token_id=[], pad_token_id=0, suppress_tokens=[study.size.image_token])
    how: Any = dict(max_new_tokens=count, do_sample=False, stopping_criteria=[stop], **never)
    return study.hf.generate(**study.clean.for_hf(), **how)[0, -count:]


def by_ours(study: Study, model: HookedLlava, count: int, tick: Tick) -> Tensor:
    """With its own cache; it never writes `<image>`."""
    return model.generate(study.clean, count, stop_tokens=(), on_step=lambda _: tick())[0, -count:]


def between_tokens(write: Callable[[Tick], Tensor], count: int, device: str) -> Own:
    """The tokens, and the seconds from the first of them to the last."""
    clock = Clock(device)
    written = write(clock.tick)
    assert len(clock.marks) == len(written) == count, f"{len(clock.marks)} ticks for {count} tokens"
    return Own(written, clock.seconds)


@torch.no_grad()
def behind(study: Study, written: tuple[int, ...]) -> Tensor:
    """For each token written, how far its logit lies below the highest allowed one, in float64."""
    prompt, count = study.clean.tokens, len(written)
    new = torch.tensor([written], device=prompt.device)
    text = Inputs(torch.cat((prompt, new[:, :-1]), 1), study.clean.pixels)
    with truth.in_float64(study.reference) as model:
        logits = model(text.to(torch.float64), logits_to_keep=count)[0]
    logits[:, study.size.image_token] = -torch.inf
    return logits.amax(-1) - logits.gather(1, new.T)[:, 0]


def sizes(settings: Settings) -> tuple[list[Size], int]:
    """Models, and how many tokens they write after the first."""
    if settings.quick:
        return [SIZES["toy"]], 8
    return [SIZES["7b"]] if settings.cuda else [SIZES["toy"], SIZES["gemm"]], 64


def steps(size: Size, new: int, itemsize: int) -> Work:
    """Each of `new` positions behind all that came before it."""
    return sum((floors.decoder(size, 1, 1, itemsize, seen=size.positions + i) for i in range(new)), Work())


def greedy(settings: Settings) -> Found:
    """Batch 1."""
    models, new = sizes(settings)
    for size in models:
        study = make_study(size, device=settings.device, dtype=settings.dtype)
        work = steps(size, new, settings.dtype.itemsize)
        ways: dict[str, Callable[[int, Tick], Tensor]] = {"hf sdpa": partial(by_hf, study)}
        ways |= {way: partial(by_ours, study, model) for way, model in study.variants.items()}
        judge = lru_cache(partial(behind, study))  # every round writes the same
        variants = []
        for way, by in ways.items():
            run = partial(between_tokens, partial(by, new + 1), new + 1, settings.device)
            variants.append(
                Variant(way, run, work=work, read=lambda written, judge=judge: judge(tuple(written.tolist())))
            )
        best = torch.zeros(new + 1)
        rows = compare("decode/greedy", size, {"size": size.name}, new, variants, best, settings, AGAINST)
        yield from (replace(row, per_second=f"{new / row.seconds.median:.1f} tokens") for row in rows)
        yield from (LeftOut("decode/greedy", way, why) for way, why in study.missing.items())


CASES = [Case("decode/greedy", "tokens behind a prompt with a picture, one at a time", greedy)]
