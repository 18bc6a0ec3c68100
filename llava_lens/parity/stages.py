"""The stages of a forward pass: which hook of ours stands beside which module, and both models run with them watched.

Unusual: ours runs twice. The second time every stage is overwritten, after it was compared, by what Hugging Face's
stage gave, so that each stage is fed Hugging Face's input and one run isolates them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from llava_lens.hooks import Hook, reader
from llava_lens.inputs import Inputs
from llava_lens.parity.report import Difference, Stage
from llava_lens.parity.twin import Twin, difference

Place = tuple[str, str]
"""Path of a Hugging Face module, and `input` or `output`."""
Seen = Mapping[Place, list[Tensor]]
APART = Difference(torch.inf, torch.inf, False)
"""Between tensors of different shapes."""


@dataclass(frozen=True)
class Watched:
    """A stage to compare, the place of Hugging Face's tensor, and the positions that count (None: all)."""

    stage: Stage
    place: Place | None
    keep: Bool[Tensor, "batch pos"] | None = None


def watched_stages(twin: Twin, inputs: Inputs) -> list[Watched]:
    """Every stage in the order of the forward; where Hugging Face has no module of its own the place is None."""
    model = twin.model
    seen = torch.ones_like(inputs.tokens) if inputs.attention_mask is None else inputs.attention_mask
    keep = seen.bool()
    found: list[Watched] = []

    def add(name: str, kind: str, ours: str, part: str, side: str = "output", keep: Tensor | None = None) -> None:
        path = twin.home(part) if part else ""
        place = None if path is None else (path, side)
        theirs = "" if path is None else f"input of {path}" if side == "input" else path or "logits"
        found.append(Watched(Stage(name, kind, ours, theirs), place, keep))

    add("text embeddings", "text", "hook_text_embed", "embed.", keep=keep & ~inputs.slots(model.cfg))
    if twin.has_tower:
        add("tower embeddings", "tower start", "vision.hook_embed", "vision.blocks.0.", "input")
        for i in range(len(model.vision.blocks)):
            add(f"tower block {i}", "tower block", f"vision.blocks.{i}.hook_resid_post", f"vision.blocks.{i}.")
        add("tower features", "features", "projector.hook_in", "projector.", "input")
        add("projector", "projector", "projector.hook_out", "projector.")
    add("spliced embeddings", "splice", "hook_embed", "blocks.0.", "input", keep)
    for i in range(len(model.blocks)):
        add(f"block {i}", "block", f"blocks.{i}.hook_resid_post", f"blocks.{i}.", keep=keep)
    add("final norm", "norm", "ln_final", "ln_final.", keep=keep)
    add("logits", "logits", "hook_logits", "", keep=keep)
    return found


def run_theirs(hf_model: nn.Module, given: Mapping[str, Tensor], places: set[Place]) -> dict[Place, list[Tensor]]:
    """One forward of Hugging Face's model: what passed at every place, a tensor per call of the module."""
    seen: dict[Place, list[Tensor]] = {place: [] for place in places}

    def before(_: Any, args: Any, kwargs: Any, *, place: Place) -> None:
        given = (*args, kwargs.get("hidden_states"), *kwargs.values())
        _note(seen[place], next((each for each in given if isinstance(each, Tensor)), None))

    def after(_: Any, args: Any, out: Any, *, place: Place) -> None:
        _note(seen[place], out if place[0] else getattr(out, "logits", None))

    device = next(hf_model.parameters()).device
    with ExitStack() as stack:
        for path, side in places:
            module = hf_model.get_submodule(path)
            if side == "input":
                hold = module.register_forward_pre_hook(partial(before, place=(path, side)), with_kwargs=True)
            else:
                hold = module.register_forward_hook(partial(after, place=(path, side)))
            stack.callback(hold.remove)
        hf_model(**{key: tensor.to(device) for key, tensor in given.items()}, use_cache=False)
    return seen


def _note(seen: list[Tensor], value: Any) -> None:
    """Keep a copy, since a later layer may write over it; of a tuple or an output object the first entry counts."""
    while isinstance(value, tuple | list | Mapping) and len(value):
        value = value[0]  # type: ignore[index]  # transformers' outputs are mappings that can be counted through
    if isinstance(value, Tensor):
        seen.append(value.detach().clone())


def compare(twin: Twin, inputs: Inputs) -> tuple[Stage, ...]:
    """Every stage compared, in a run of our own and fed by Hugging Face's values."""
    stages = watched_stages(twin, inputs)
    seen = run_theirs(twin.hf, twin.model.for_hf(inputs), {each.place for each in stages if each.place is not None})
    stages = [replace(each, stage=replace(each.stage, skipped=_why_not(twin.model, each, seen))) for each in stages]
    watched = {each.stage.ours: (each, seen[each.place][0]) for each in stages if each.place and not each.stage.skipped}
    whole = run_ours(twin.model, inputs, watched, overwrite=False)
    alone = whole if all(found.equal for _, found in whole.values()) else run_ours(twin.model, inputs, watched, True)
    return tuple(_found(each.stage, whole, alone, watched) for each in stages)


def _found(stage: Stage, whole: Mapping[str, Any], alone: Mapping[str, Any], watched: Mapping[str, Any]) -> Stage:
    if stage.ours not in whole:
        return stage if stage.skipped else replace(stage, skipped="our model did not run it")
    shape, first = whole[stage.ours]
    theirs = tuple(watched[stage.ours][1].shape)
    return replace(stage, shape=shape, their_shape=theirs, difference=first, alone=alone[stage.ours][1])


def _why_not(model: Any, each: Watched, seen: Seen) -> str:
    """Why a stage cannot be compared, empty where it can."""
    if each.place is None:
        return "no Hugging Face module owns its weights alone"
    if each.stage.ours not in model.hook_dict and each.stage.ours != "ln_final":
        return f"our model has no hook {each.stage.ours!r}"
    calls = len(seen[each.place])
    if calls == 1:
        return "" if each.keep is None or bool(each.keep.any()) else "no position is text"
    if calls:
        return f"Hugging Face ran it {calls} times"
    picture = each.stage.ours.startswith(("vision.", "projector."))
    return "no picture in these inputs" if picture else "Hugging Face ran it without a tensor to see"


def run_ours(
    model: Any, inputs: Inputs, watched: Mapping[str, tuple[Watched, Tensor]], overwrite: bool
) -> dict[str, tuple[tuple[int, ...], Difference]]:
    """One forward of ours: shape and difference at every stage; with `overwrite` each goes on as Hugging Face's did."""
    found: dict[str, tuple[tuple[int, ...], Difference]] = {}

    def look(x: Tensor, hook: Any = None, *, ours: str) -> Tensor | None:
        each, theirs = watched[ours]
        fits = theirs.numel() == x.numel() and theirs.shape[-1] == x.shape[-1]
        theirs = theirs.reshape(x.shape) if fits else theirs
        keep = each.keep if each.keep is not None and each.keep.shape == x.shape[:2] else ...
        found[ours] = tuple(x.shape), difference(x[keep], theirs.to(x.device)[keep]) if fits else APART
        return theirs.to(x.device, x.dtype) if overwrite and fits else None

    mark: Callable[[Any], Any] = (lambda fn: fn) if overwrite else reader
    with _listening(model, {ours: mark(partial(look, ours=ours)) for ours in watched}):
        model(inputs)
    return found


@contextmanager
def _listening(model: Any, listeners: Mapping[str, Any]) -> Iterator[None]:
    """Functions on hooks, and on modules whose output has no hook; a hook that stays silent is not an error here."""
    with ExitStack() as stack:
        stack.enter_context(model.hooks())
        for name, fn in listeners.items():
            place = model.get_submodule(name)
            if isinstance(place, Hook):
                place.add_hook(fn, level=model.context_level)
            else:
                handle = place.register_forward_hook(lambda _module, _args, out, fn=fn: fn(out))
                stack.callback(handle.remove)
        yield
