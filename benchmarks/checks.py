"""Is what will be measured right on this device? Kernels, paths, repeated runs, decoding and caches on small models.

Unusual: errors are root mean squares over all numbers, which vary less from seed to seed than the largest, and are
held against float64 and against what Hugging Face, or the reference's steps, err in the same precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, ours, truth
from benchmarks.cases.decode import by_hf, by_ours
from benchmarks.cases.kernels import OPERATIONS, Operation, copied, maker, no_triton, once, pinned
from benchmarks.compare import Settings
from benchmarks.models import SIZES, Study, batch_of, make_study
from llava_lens import kernels
from llava_lens.kernels import fast

DTYPES = (torch.float32, torch.bfloat16)
WORSE = 1.10
"""How much larger than the rival's an error in half precision may be."""
CLOSE = 1e-5
"""How large it may be in float32, relative to the numbers themselves."""
SIZE = replace(SIZES["toy"], name="check", layers=4, d_model=96, d_mlp=176, heads=6, kv_heads=3, vocab=211, grid=5)
"""Odd on purpose: grouped heads, and widths that are no power of two."""


def rms(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.double().square().mean().sqrt())


def enough(found: Tensor, rival: Tensor, exact: Tensor) -> str | None:
    """What is wrong with numbers of some precision beside a rival's of the same; None if nothing is."""
    if found.shape != exact.shape:
        return f"shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    error, theirs = rms(found.double() - exact), rms(rival.double() - exact)
    rounding = CLOSE if found.dtype == torch.float32 else torch.finfo(found.dtype).eps / 4
    allowed = max(rounding * rms(exact), WORSE * theirs if found.dtype != torch.float32 else 0.0)
    return None if error <= allowed else f"error {error:.2e}, allowed {allowed:.2e}"


def kernels_agree(device: str) -> Iterator[tuple[str, str | None]]:
    """Every operation, served by torch and by Triton, against its steps in float64."""
    for operation in OPERATIONS:
        if not hasattr(fast, operation.name):
            continue
        for dtype in DTYPES:
            settings = Settings(True, device, precision=dtype)
            given = operation.inputs(SIZE, 3, maker(settings, 0))
            exact = operation.run(operation.reference, copied(given, torch.float64))
            rival = once(operation, given, operation.reference, nullcontext, None)
            for name, function, inside in served(operation, settings):
                found = once(operation, given, function, inside, None)
                yield f"{operation.name} by {name}, {dtype}", enough(found, rival, exact)


def served(
    operation: Operation, settings: Settings
) -> Iterator[tuple[str, Callable[..., Any], Callable[[], AbstractContextManager[Any]]]]:
    """Who serves an operation there."""
    yield "fast", getattr(fast, operation.name), nullcontext
    if no_triton(operation.name, settings) is None:
        yield "triton", getattr(kernels, operation.name), partial(pinned(), "triton")


def studies(device: str) -> Iterator[Study]:
    """The odd model in both precisions."""
    yield from (make_study(SIZE, device=device, dtype=dtype) for dtype in DTYPES)


def paths_agree(device: str) -> Iterator[tuple[str, str | None]]:
    """The reference equals Hugging Face to the bit; every path keeps to float64."""
    for study in studies(device):
        inputs = batch_of(study, 4)
        with torch.inference_mode():
            rival = baselines.last_logits(study.hf, inputs)
        exact = truth.last_logits(study.reference, inputs)
        for name, model in study.variants.items():
            found = ours.last_logits(model, inputs)
            yield f"{name}, {found.dtype}", enough(found, rival, exact)
            if model is study.reference:
                same = torch.equal(found, rival)
                yield f"{name}, {found.dtype}, to the bit", None if same else "logits differ from Hugging Face's"


def runs_repeat(device: str) -> Iterator[tuple[str, str | None]]:
    """A run does not touch an earlier one's result, and gives it again when asked again (replayed graphs)."""
    for study in studies(device):
        wide = batch_of(study, 3)
        for name, model in study.variants.items():
            first = ours.last_logits(model, study.clean)
            kept = first.clone()
            others = [ours.last_logits(model, each) for each in (study.corrupt, wide, study.corrupt)]
            again = ours.last_logits(model, study.clean)
            yield f"{name}, {first.dtype}, kept", None if torch.equal(first, kept) else "a later run changed a result"
            yield (
                f"{name}, {first.dtype}, again",
                None if torch.equal(again, kept) else "another result the second time",
            )
            differ = not torch.equal(others[0], kept) and torch.equal(others[0], others[2])
            yield f"{name}, {first.dtype}, others", None if differ else "other inputs gave no result of their own"


def decoding_agrees(device: str) -> Iterator[tuple[str, str | None]]:
    """In float32 the tokens are Hugging Face's."""
    study = make_study(SIZE, device=device)
    wanted = by_hf(study, 12, lambda: None)
    for name, model in study.variants.items():
        found = by_ours(study, model, 12, lambda: None)
        yield name, None if torch.equal(found, wanted) else f"wrote {found.tolist()}, expected {wanted.tolist()}"


def caches_agree(device: str) -> Iterator[tuple[str, str | None]]:
    """In float32 every entry of every path is the one of a float64 run, and listening does not change the logits."""
    study = make_study(SIZE, device=device)
    with truth.in_float64(study.reference) as model:
        exact = ours.cached(model, study.clean.to(torch.float64))[1]
    for name, model in study.variants.items():
        logits, cache = ours.cached(model, study.clean)
        same = torch.equal(logits, ours.last_logits(model, study.clean))
        yield f"{name}, logits", None if same else "a cached run's logits differ from a plain run's"
        missing = set(exact.cache_dict) ^ set(cache.cache_dict)
        yield f"{name}, names", f"differ by {sorted(missing)[:3]}" if missing else None
        for key in exact.cache_dict:
            if key not in missing:
                found, wanted = cache[key], exact[key]
                hidden = torch.equal(found.isinf(), wanted.isinf())
                seen = [torch.where(each.isinf(), 0, each) for each in (found, found, wanted)]
                yield f"{name}, {key}", enough(*seen) if hidden else "other scores are -inf"


CHECKS = {
    "kernels": kernels_agree,
    "paths": paths_agree,
    "repeated runs": runs_repeat,
    "decoding": decoding_agrees,
    "caches": caches_agree,
}


def failures(device: str) -> tuple[int, list[str]]:
    """How many checks were made, and a line for each that failed, also by an error."""
    made, failed = 0, []
    for subject, check in CHECKS.items():
        try:
            for what, wrong in check(device):
                made += 1
                if wrong:
                    failed.append(f"{subject}: {what}: {wrong}")
        except Exception as error:  # whatever breaks on a device is what has to be told
            failed.append(f"{subject}: {type(error).__name__}: {error}")
    return made, failed
