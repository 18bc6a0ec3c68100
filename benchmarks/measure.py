"""The one way anything is timed here: variants interleaved for some rounds after a warm-up, then set side by side."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

MEMORY = {
    "cpu": "growth of the process's peak resident set over the resident set before the call (VmHWM, reset through "
    "/proc/self/clear_refs after the heap is trimmed), in one run of its own after the warm-up; None outside Linux",
    "cuda": "torch.cuda.max_memory_allocated over what was allocated before the call, in the first timed round",
}
"""What `peak_bytes` means, by device."""
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
"""What the host calls to start work on the device; a replayed graph is one call."""
BRIEF = 1.0
"""Seconds up to which the launches of a run are counted: the profiler keeps every one of them."""
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
    launches: int | None = None


@dataclass(frozen=True)
class Patience:
    """How often to measure: `rounds` times; further rounds while they have not taken `enough` seconds together, up to
    ten times as many; no new round that would end after `limit` seconds (warm-up included), but one in any case."""

    rounds: int = 3
    enough: float = 0.0
    limit: float = math.inf

    def goes_on(self, done: int, in_rounds: float, in_all: float) -> bool:
        """Whether another round follows `done` of them, which took `in_rounds` seconds of `in_all`."""
        if done == 0:
            return True
        wanted = done < self.rounds or (in_rounds < self.enough and done < 10 * self.rounds)
        return wanted and in_all + in_rounds / done <= self.limit


@dataclass(frozen=True)
class Own:
    """What a run returns that measured itself: only a part of it counts, or it was another process."""

    result: Any
    seconds: float
    peak_bytes: int | None = None


def measure(
    variants: Mapping[str, Callable[[], Any]],
    baseline: str,
    patience: Patience | None = None,
    warmup: int = 1,
    device: str = "cpu",
    scale: Mapping[str, float] | None = None,
    read: Mapping[str, Callable[[Any], Any]] | None = None,
) -> dict[str, Timing]:
    """Time each variant once per round, every other round in reverse order.

    `scale` multiplies the seconds of a variant that does only a part of the work. `result` is what `read` makes, after
    the time, of what the variant returned in its last run; nothing else of a run stays in memory. Without a warm-up
    there is no run for the peak of the CPU either, and it is unknown where the runs do not measure it themselves.
    """
    if baseline not in variants:
        raise ValueError(f"the baseline {baseline!r} is not among {', '.join(variants)}")
    patience, start = patience or Patience(), time.perf_counter()
    cuda = device.startswith("cuda")
    for _ in range(warmup):
        for run in variants.values():
            run()
    tries = {name: Tries(run, device, (read or {}).get(name, _same)) for name, run in variants.items()}
    names = list(variants)
    with settled_heap():
        if warmup and not cuda:
            for each in tries.values():
                each.peak = peak_bytes(each.run, device)
        begin = time.perf_counter()
        turn = 0
        while patience.goes_on(turn, (now := time.perf_counter()) - begin, now - start):
            for name in names if turn % 2 == 0 else names[::-1]:
                tries[name].once_more((scale or {}).get(name, 1.0))
            turn += 1
        for each in tries.values():
            each.count_launches()
    return summarise(tries, baseline)


@dataclass
class Tries:
    """What the runs of one variant have shown so far."""

    run: Callable[[], Any]
    device: str
    read: Callable[[Any], Any]
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    result: Any = None
    launches: int | None = None
    brief: bool = False

    def once_more(self, scale: float) -> None:
        """One timed run; the device's peak is read beside the first."""
        self.result = None
        first_on_cuda = self.device.startswith("cuda") and not self.seconds
        before = reset_peak() if first_on_cuda else 0
        taken, found = timed(self.run, self.device)
        if first_on_cuda:
            self.peak = torch.cuda.max_memory_allocated() - before
        self.brief = taken < BRIEF
        if isinstance(found, Own):
            taken, self.peak, found = found.seconds, found.peak_bytes or self.peak, found.result
        self.result = self.read(found)
        self.seconds.append(taken * scale)

    def count_launches(self) -> None:
        """In one more run, where runs are short; None on the CPU."""
        if self.device.startswith("cuda") and self.brief:
            self.launches = launches(self.run)


def _same(found: Any) -> Any:
    return found


def summarise(tries: Mapping[str, Tries], baseline: str) -> dict[str, Timing]:
    """Medians, spreads and ratios of the seconds that each variant took in each round."""
    base = tries[baseline].seconds
    return {
        name: Timing(
            seconds=Spread.of(own.seconds),
            rounds=len(own.seconds),
            baseline=baseline,
            times_faster=median(base) / median(own.seconds),
            times_faster_by_round=Spread.of([b / o for b, o in zip(base, own.seconds, strict=True)]),
            peak_bytes=own.peak,
            result=own.result,
            launches=own.launches,
        )
        for name, own in tries.items()
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


def reset_peak() -> int:
    """Start to watch the device's peak; returns the bytes that are held now."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_bytes(run: Callable[[], Any], device: str) -> int | None:
    """Bytes that one call held at most beyond what was held before it (see `MEMORY`)."""
    gc.collect()
    if device.startswith("cuda"):
        before = reset_peak()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR_REFS.exists():
        return None
    with contextlib.suppress(AttributeError):  # a C library without it keeps what was freed
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return None
    before = resident("VmRSS")
    run()
    return max(0, resident("VmHWM") - before)


def launches(run: Callable[[], Any]) -> int:
    """How often one call starts work on the device (`LAUNCHES`)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return launches_among({each.key: each.count for each in seen.key_averages()})


def launches_among(calls: Mapping[str, int]) -> int:
    """The launches among counted calls by name."""
    return sum(count for name, count in calls.items() if name in LAUNCHES)


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
