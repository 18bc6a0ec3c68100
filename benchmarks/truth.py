"""Brute force over `HookedLlava.run_with_hooks`, one whole run per cell: what errors are measured against.

Run inside `in_float64` it is in float64; the names, cells and windows are those of `benchmarks.baselines`. Unusual:
one block is widened at a time, for a float64 copy of a model of real size would not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.baselines import Cell, windows
from benchmarks.models import Study
from llava_lens import HookedLlava, Inputs
from llava_lens.hooked import HookFn, HookName

Edit = tuple[HookName, HookFn]


def name(layer: int, activation: str) -> str:
    """A hook's full name."""
    inside = activation if activation.startswith("resid") else f"attn.hook_{activation}"
    return f"blocks.{layer}.{inside if '.' in inside else f'hook_{inside}'}"


@torch.no_grad()
def loop(
    model: HookedLlava, study: Study, cells: Sequence[Cell], edits: Callable[[Cell], list[Edit]]
) -> Float[Tensor, " cell"]:
    """The metric of the corrupt prompt under each cell's edits."""
    inputs = study.corrupt.to(model.cfg.dtype)
    runs = (model.run_with_hooks(inputs, fwd_hooks=edits(cell), logits_to_keep=1) for cell in cells)
    return torch.stack([study.metric(logits[:, -1]) for logits in runs])


def patch(
    model: HookedLlava, study: Study, cells: Sequence[Cell], activation: str, place: Callable[[Cell], Any]
) -> Float[Tensor, " cell"]:
    """The clean `activation` of the cell's layer, put where `place(cell)` points in `[batch, pos, …]`."""
    with torch.no_grad():
        _, cache = model.run_with_cache(
            study.clean.to(model.cfg.dtype), names_filter=lambda each: each.endswith(f"hook_{activation}")
        )

    def edits(cell: Cell) -> list[Edit]:
        def put(act: Tensor, hook: Any) -> None:
            act[place(cell)] = cache[hook.name][place(cell)]

        return [(name(cell[0], activation), put)]

    return loop(model, study, cells, edits)


def patch_resid(model: HookedLlava, study: Study, cells: Sequence[Cell]) -> Float[Tensor, " cell"]:
    """Cells `(layer, position)`."""
    return patch(model, study, cells, "resid_pre", lambda cell: (slice(None), cell[1]))


def patch_heads(
    model: HookedLlava, study: Study, cells: Sequence[Cell], at: slice = slice(None)
) -> Float[Tensor, " cell"]:
    """Cells `(layer, head)`."""
    return patch(model, study, cells, "z", lambda cell: (slice(None), at, cell[1]))


def knock_out(
    model: HookedLlava, study: Study, cells: Sequence[Cell], sources: Sequence[Sequence[int]], width: int
) -> Float[Tensor, " cell"]:
    """Cells `(layer, source)`: the last position's scores on a source become -inf in the window around a layer."""
    blocked = windows(study.size.layers, width)

    def edits(cell: Cell) -> list[Edit]:
        def blind(scores: Tensor, hook: Any) -> None:
            scores[:, :, -1, list(sources[cell[1]])] = -torch.inf

        return [(name(i, "attn_scores"), blind) for i in blocked[cell[0]]]

    return loop(model, study, cells, edits)


@torch.no_grad()
def ask(model: HookedLlava, prompts: Sequence[Inputs]) -> Float[Tensor, "prompt d_vocab"]:
    """One forward per question."""
    return torch.cat([model(inputs.to(model.cfg.dtype), logits_to_keep=1)[:, -1] for inputs in prompts])


@contextmanager
def in_float64(model: HookedLlava) -> Iterator[HookedLlava]:
    """Runs inside are in float64 throughout: each part's weights are widened when its turn comes and put back after.

    Hugging Face's own `.double()` would not do: its norms and its rotary angles go through float32.
    """
    narrow: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    cfg, path = model.cfg, getattr(model, "path", "reference")

    def widen(part: Any, _: Any) -> None:
        narrow[part] = [(weight, weight.data) for weight in part.parameters()]
        for weight, data in narrow[part]:
            weight.data = data.double()

    def put_back(part: Any, *_: Any) -> None:
        for weight, data in narrow.pop(part):
            weight.data = data

    parts = [*model.blocks, *(part for name, part in model.named_children() if name != "blocks")]
    handles = [part.register_forward_pre_hook(widen) for part in parts]
    handles += [part.register_forward_hook(put_back) for part in parts]
    if path != "reference":
        model.use("reference")  # type: ignore[attr-defined]
    model.cfg = replace(cfg, dtype=torch.float64)
    try:
        yield model
    finally:
        model.cfg = cfg
        if path != "reference":
            model.use(path)  # type: ignore[attr-defined]
        for handle in handles:
            handle.remove()
        for part in list(narrow):
            put_back(part)


@torch.no_grad()
def last_logits(model: HookedLlava, inputs: Inputs) -> Float[Tensor, "batch d_vocab"]:
    """Float64 logits of the last position, from a model of any dtype, on the reference path."""
    with in_float64(model):
        return model(inputs.to(torch.float64), logits_to_keep=1)[:, -1]
