"""The one way anything is timed here: variants interleaved for some rounds after a warm-up, then set side by side."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

MEMORY = {
    "cpu": "growth of the process's peak resident set over the resident set before the call (VmHWM, reset through "
    "/proc/self/clear_refs after the heap is trimmed), in one run of its own after the warm-up; None outside Linux",
    "cuda": "torch.cuda.max_memory_allocated over what was allocated before the call, in one run after the warm-up",
}
"""What `peak_bytes` means, by device."""
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Spread:
    """The middle of some numbers, and their smallest and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Timing:
    """One variant's numbers: seconds, and how many times faster than the baseline it is.

    `times_faster` divides the medians; `times_faster_by_round` divides within each round first, which cancels what
    slows a whole round down.
    """

    seconds: Spread
    rounds: int
    baseline: str
    times_faster: float
    times_faster_by_round: Spread
    peak_bytes: int | None
    result: Any


@dataclass(frozen=True)
class Own:
    """What a run returns that measured itself: only a part of it counts, or it was another process."""

    result: Any
    seconds: float
    peak_bytes: int | None = None


def measure(
    variants: Mapping[str, Callable[[], Any]],
    baseline: str,
    rounds: int = 3,
    warmup: int = 1,
    device: str = "cpu",
    scale: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Time each variant once per round, every other round in reverse order.

    `scale` multiplies the seconds of a variant that does only a part of the work. `result` is what the variant
    returned in its last run. Without a warm-up there is no run for the peak either, and it is unknown where the runs
    do not measure it themselves (`Own`).
    """
    if baseline not in variants:
        raise ValueError(f"the baseline {baseline!r} is not among {', '.join(variants)}")
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    results: dict[str, Any] = {}
    names = list(variants)
    with settled_heap():
        peaks = {name: peak_bytes(run, device) if warmup else None for name, run in variants.items()}
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else names[::-1]:
                results.pop(name, None)
                taken, results[name] = timed(variants[name], device)
                if isinstance(results[name], Own):
                    own = results[name]
                    taken, results[name], peaks[name] = own.seconds, own.result, own.peak_bytes or peaks[name]
                seconds[name].append(taken * (scale or {}).get(name, 1.0))
    return summarise(seconds, baseline, peaks, results)


def summarise(
    seconds: Mapping[str, Sequence[float]],
    baseline: str,
    peaks: Mapping[str, int | None] | None = None,
    results: Mapping[str, Any] | None = None,
) -> dict[str, Timing]:
    """Medians, spreads and ratios of the seconds that each variant took in each round."""
    base = seconds[baseline]
    return {
        name: Timing(
            seconds=Spread.of(own),
            rounds=len(own),
            baseline=baseline,
            times_faster=median(base) / median(own),
            times_faster_by_round=Spread.of([b / o for b, o in zip(base, own, strict=True)]),
            peak_bytes=(peaks or {}).get(name),
            result=(results or {}).get(name),
        )
        for name, own in seconds.items()
    }


@contextmanager
def settled_heap() -> Iterator[None]:
    """What is there already is no garbage: collecting before every call then looks at what the calls leave alone."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of one call and what it returned: wall time, or between two CUDA events."""
    gc.collect()
    if not device.startswith("cuda"):
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000, result


def peak_bytes(run: Callable[[], Any], device: str) -> int | None:
    """Bytes that one call held at most beyond what was held before it (see `MEMORY`)."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR_REFS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return None
    before = resident("VmRSS")
    run()
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
