"""The one place that knows how llava_lens's sweeps are called."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from benchmarks.models import Study
from llava_lens import Inputs

MISSING = "llava_lens.analysis does not have it yet"


def has(function: str) -> bool:
    """Whether `llava_lens.analysis` offers a function."""
    return hasattr(_analysis(), function)


def patch_resid(study: Study) -> Float[Tensor, "layer position"]:
    """The clean stream before each layer at each position, put into the corrupt run."""
    return _patch(study, "resid_pre", ("layer", "position"))


def patch_heads(study: Study, at: Literal["last"] | None = None) -> Float[Tensor, "layer head"]:
    """Each head's clean z, at all positions or at the last."""
    return _patch(study, "z", ("layer", "head"), at)


def knock_out(study: Study, keys: Sequence[int], width: int) -> Float[Tensor, " layer"]:
    """The last position blind to `keys` in a sliding window of layers."""
    metric = _difference(study)
    return (
        _analysis()
        .knock_out(study.model, study.corrupt, from_="last", to=list(keys), window=width, metric=metric)
        .values
    )


def ask(study: Study, prompts: Sequence[Inputs]) -> Float[Tensor, "prompt d_vocab"]:
    """Each prompt's last logits."""
    return _analysis().ask(study.model, list(prompts))


def _patch(study: Study, hook: str, sweep: tuple[str, ...], at: str | None = None) -> Tensor:
    scores = _analysis().patch(
        study.model, study.clean, study.corrupt, hook, sweep=sweep, at=at, metric=_difference(study)
    )
    return scores.values


def _difference(study: Study) -> Any:
    return importlib.import_module("llava_lens.analysis.metrics").logit_diff(study.a, study.b)


def _analysis() -> Any:
    return importlib.import_module("llava_lens.analysis")
