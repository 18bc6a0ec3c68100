"""From variants of one case to its rows: measured together, each with its error beside its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import measure
from benchmarks.models import Size
from benchmarks.rows import Row


@dataclass(frozen=True)
class Settings:
    """How a run of the benchmarks was asked for."""

    quick: bool = False
    device: str = "cpu"
    rounds: int = 3


@dataclass(frozen=True)
class Variant:
    """One way to get the numbers. `run` returns them at the cells that are compared; `share` is the part of the work
    that it does, less than 1 where it visits only those cells."""

    name: str
    run: Callable[[], Tensor]
    share: float = 1.0


def spread_out(total: int, count: int) -> list[int]:
    """Up to `count` of the numbers below `total`, evenly spread, both ends among them."""
    return torch.linspace(0, total - 1, min(total, count), dtype=torch.float64).round().long().unique().tolist()


def compare(
    case: str,
    size: Size,
    params: dict[str, Any],
    cells: int,
    variants: Sequence[Variant],
    truth: Tensor,
    settings: Settings,
    against: str = "run_with_hooks, one whole run per cell, in float64",
) -> list[Row]:
    """Measure the variants, the first being the baseline, and hold what they return against `truth`."""
    timings = measure(
        {variant.name: variant.run for variant in variants},
        baseline=variants[0].name,
        rounds=settings.rounds,
        device=settings.device,
        scale={variant.name: 1 / variant.share for variant in variants},
    )
    wanted = truth.detach().double().cpu()
    rows = []
    for variant in variants:
        timing = timings[variant.name]
        found = timing.result.detach().double().cpu()
        if found.shape != wanted.shape:
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
                error=float((found - wanted).abs().max()),
                error_against=against,
                span=float(wanted.max() - wanted.min()),
            )
        )
    return rows
