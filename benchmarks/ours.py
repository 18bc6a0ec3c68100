"""The one place that knows how llava_lens is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.models import Study
from llava_lens import HookedLlava, Inputs, LlavaCache, analysis


@torch.inference_mode()
def last_logits(model: HookedLlava, inputs: Inputs) -> Float[Tensor, "batch d_vocab"]:
    """A plain forward for a single answer."""
    return model(inputs, logits_to_keep=1)[:, -1]


@torch.inference_mode()
def encode(model: HookedLlava, pixels: Tensor) -> Float[Tensor, "image feature d_model"]:
    """Tower and projector."""
    return model.encode_image(pixels)


@torch.inference_mode()
def cached(model: HookedLlava, inputs: Inputs, names: Any = None) -> tuple[Float[Tensor, "batch d_vocab"], LlavaCache]:
    """The last logits, and a cache of everything or of what `names` selects."""
    logits, cache = model.run_with_cache(inputs, names_filter=names, logits_to_keep=1)
    return logits[:, -1], cache


@torch.inference_mode()
def last_patterns(model: HookedLlava, inputs: Inputs) -> Float[Tensor, "layer batch head key"]:
    """What the last position looks at, in every layer and head of the decoder."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(inputs, names_filter=names, pos_slice=-1, logits_to_keep=1)
    return torch.stack([cache[name][:, :, 0] for name in names])


def patch_resid(study: Study, positions: Sequence[int] | None = None) -> Float[Tensor, "layer position"]:
    """The clean stream before each layer at each of some positions (None: all), put into the corrupt run."""
    found = _patch(study, "resid_pre", ("layer", "position"), positions)
    return found if positions is None else found[:, list(positions)]  # NaN where no run was asked for


def patch_heads(
    study: Study, at: Literal["last"] | None = None, layers: Sequence[int] | None = None
) -> Float[Tensor, "layer head"]:
    """Each head's clean z, at all positions or at the last, in all layers or in some."""
    return _patch(study, "z", ("layer", "head"), at, layers)


def knock_out(study: Study, sources: Sequence[Sequence[int]], width: int) -> Float[Tensor, "layer source"]:
    """The last position blind to each of some sets of keys, in a sliding window of layers."""
    to = {str(i): list(keys) for i, keys in enumerate(sources)}
    how: Any = dict(window=width, metric=_difference(study), progress=False)
    return analysis.knock_out(study.model, study.corrupt, "last", to, **how).values


def ask(study: Study, prompts: Sequence[Inputs]) -> Float[Tensor, "prompt d_vocab"]:
    """Each prompt's last logits."""
    return analysis.ask(study.model, list(prompts))


def screen(study: Study, top_k: int = 0) -> analysis.Screened:
    """The residual grid of `patch_resid` by first order, the `top_k` cells that it puts first run exactly."""
    how: Any = dict(metric=_difference(study), progress=False, top_k=top_k)
    return analysis.attribution_patch(study.model, study.clean, study.corrupt, "resid_pre", **how)


def _patch(study: Study, hook: str, sweep: tuple[str, ...], at: Any = None, layers: Any = None) -> Tensor:
    how: Any = dict(sweep=sweep, at=at, layers=layers, metric=_difference(study), progress=False)
    return analysis.patch(study.model, study.clean, study.corrupt, hook, **how).values


def _difference(study: Study) -> Any:
    return analysis.logit_diff(study.a, study.b)
