"""The one place that knows how llava_lens's sweeps are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from benchmarks.models import Study
from llava_lens import Inputs, analysis


def patch_resid(study: Study) -> Float[Tensor, "layer position"]:
    """The clean stream before each layer at each position, put into the corrupt run."""
    return _patch(study, "resid_pre", ("layer", "position"))


def patch_heads(study: Study, at: Literal["last"] | None = None) -> Float[Tensor, "layer head"]:
    """Each head's clean z, at all positions or at the last."""
    return _patch(study, "z", ("layer", "head"), at)


def knock_out(study: Study, sources: Sequence[Sequence[int]], width: int) -> Float[Tensor, "layer source"]:
    """The last position blind to each of some sets of keys, in a sliding window of layers."""
    to = {str(i): list(keys) for i, keys in enumerate(sources)}
    how: Any = dict(window=width, metric=_difference(study), progress=False)
    return analysis.knock_out(study.model, study.corrupt, "last", to, **how).values


def ask(study: Study, prompts: Sequence[Inputs]) -> Float[Tensor, "prompt d_vocab"]:
    """Each prompt's last logits."""
    return analysis.ask(study.model, list(prompts))


def _patch(study: Study, hook: str, sweep: tuple[str, ...], at: str | None = None) -> Tensor:
    how: Any = dict(sweep=sweep, at=at, metric=_difference(study), progress=False)
    return analysis.patch(study.model, study.clean, study.corrupt, hook, **how).values


def _difference(study: Study) -> Any:
    return analysis.logit_diff(study.a, study.b)
