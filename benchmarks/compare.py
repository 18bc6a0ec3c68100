"""From variants of one case to its rows: measured together, each with its error beside its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.floors import Work, ceilings, floor
from benchmarks.measure import Patience, measure
from benchmarks.models import Size
from benchmarks.rows import LeftOut, Row

Run = TypeVar("Run", bound=Callable[..., Any])
ENOUGH = 2.0
"""Seconds of timed rounds after which three are enough (`Patience`)."""


def parted(case: str, ways: Mapping[str, Run | str]) -> tuple[dict[str, Run], list[LeftOut]]:
    """The ways that can be run, and those that are the reason why not."""
    runs = {way: run for way, run in ways.items() if not isinstance(run, str)}
    return runs, [LeftOut(case, way, why) for way, why in ways.items() if isinstance(why, str)]


@dataclass(frozen=True)
class Settings:
    """How a run of the benchmarks was asked for; `limit` are the seconds that one comparison may go on measuring."""

    quick: bool = False
    device: str = "cpu"
    rounds: int = 3
    limit: float = math.inf
    precision: torch.dtype | None = None

    @property
    def cuda(self) -> bool:
        """On a GPU, where the model of real size is run."""
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        """What models are run in: half precision on a GPU, unless another was asked for."""
        return self.precision or (torch.bfloat16 if self.cuda else torch.float32)

    @property
    def patience(self) -> Patience:
        """More rounds of what is soon done."""
        return Patience(self.rounds, 0.0 if self.quick else ENOUGH, self.limit)


@dataclass(frozen=True)
class Variant:
    """One way to get the numbers. `read` makes those that are compared out of what `run` returned, outside the time.

    `share` is the part of the work that it does, less than 1 where it visits only some cells. `work` is what all of
    it takes at least, from the shapes; `held_bytes` what is kept of it.
    """

    name: str
    run: Callable[[], Any]
    share: float = 1.0
    work: Work | None = None
    held_bytes: int | None = None
    read: Callable[[Any], Tensor] = lambda found: found


def spread_out(total: int, count: int) -> list[int]:
    """Up to `count` of the numbers below `total`, evenly spread, both ends among them."""
    return torch.linspace(0, total - 1, min(total, count), dtype=torch.float64).round().long().unique().tolist()


def compare(
    case: str,
    size: Size,
    params: dict[str, Any],
    cells: int,
    variants: Sequence[Variant],
    truth: Tensor | None,
    settings: Settings,
    against: str = "run_with_hooks, one whole run per cell, in float64",
    warmup: int = 1,
) -> list[Row]:
    """Measure the variants, the first being the baseline, and hold what they return against `truth`, if there is one.

    Floors are of the size's arithmetic in `settings.dtype`.
    """
    timings = measure(
        {variant.name: variant.run for variant in variants},
        baseline=variants[0].name,
        patience=settings.patience,
        warmup=warmup,
        device=settings.device,
        scale={variant.name: 1 / variant.share for variant in variants},
        read={variant.name: variant.read for variant in variants},
    )
    wanted = None if truth is None else truth.detach().double().cpu()
    limits = ceilings(settings.device, settings.dtype, settings.quick) if any(v.work for v in variants) else None
    rows = []
    for variant in variants:
        timing = timings[variant.name]
        found = timing.result.detach().double().cpu()
        if wanted is not None and found.shape != wanted.shape:
            raise ValueError(f"{case}, {variant.name}: {tuple(found.shape)} numbers, expected {tuple(wanted.shape)}")
        rows.append(
            Row(
                case=case,
                variant=variant.name,
                size=str(size),
                params=params,
                cells=cells,
                cells_measured=round(cells * variant.share),
                rounds=timing.rounds,
                seconds=timing.seconds,
                baseline=timing.baseline,
                times_faster=timing.times_faster,
                times_faster_by_round=timing.times_faster_by_round,
                peak_bytes=timing.peak_bytes,
                error=None if wanted is None else float((found - wanted).abs().max()),
                error_against=against,
                span=0.0 if wanted is None else float(wanted.max() - wanted.min()),
                floor_seconds=floor(variant.work, limits) if variant.work and limits else None,
                ceilings=str(limits or ""),
                held_bytes=variant.held_bytes,
                launches=timing.launches,
            )
        )
    return rows
