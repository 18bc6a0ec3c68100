"""Causal tracing of BLIP: corrupt picture or question, put clean states back one by one, see which restore the answer.

Unusual: a run starts at the stack that is restored, from what the corrupted stacks before it gave; the cells of a layer
run as one batch, and all cells of a repeat share its noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.interventions.corruptions import Corruption, Noise, Pair, gaussian
from llava_lens.analysis.interventions.study import over_repeats
from llava_lens.analysis.interventions.where import layers_of, windows
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError
from llava_lens.kernels import upcast
from llava_lens.models.blip import HookedBlip
from llava_lens.models.blip_asking import (
    Groups,
    answer_ids,
    bind,
    groups_of,
    hooks_of,
    noise_hook,
    position_names,
    select,
    settled,
    spelled,
)
from llava_lens.models.blip_inputs import BlipInputs
from llava_lens.roles import Roles
from llava_lens.sweep.journal import digest
from llava_lens.sweep.metrics import Bound


def blip_trace(
    model: HookedBlip,
    inputs: BlipInputs,
    corruption: Corruption | None = None,
    restore: str = "encoder.resid_post",
    *,
    at: Any = None,
    noise_at: str | None = None,
    metric: Any = None,
    layers: Any = None,
    window: int = 1,
    repeats: int = 10,
    seed: int = 0,
    max_rows: int = 64,
) -> Scores:
    """Restore clean states in a corrupted run, one cell at a time: `Scores[layer, position]` (arXiv 2308.14179).

    `corruption` is `gaussian(…)` or `multiplicative(…)` of `llava_lens.analysis.interventions.corruptions`, by default
    `gaussian(3.0, at="all")`, or `pair(other inputs)`. Its `at` selects positions of the picture ("all", "image" for
    the patches, "class", `Patches(…)`) or of the question (a role, a word, numbers); `noise_at` is the hook whose
    embeddings are corrupted: by default "vision.hook_features", what the question looks at, or "encoder.hook_embed",
    its words. "vision.hook_embed" comes before the tower, whose states can be restored then.

    `restore` is a stack and a hook's short name: "encoder.resid_post" for what a block gives (its norm comes after it),
    "encoder.attn_out", "decoder.cross_attn_out", "vision.mlp_out" …; `window` neighbouring layers are restored
    together. `at` restricts the positions; a mapping from names to positions restores groups: `Scores[layer, group]`.

    The metric, by default `prob()`, is that of the answer, the clean run's own next token where none is named. The
    noise is drawn `repeats` times, by seeds made from `seed`; the result is the mean, with its 95 % interval.
    `recovery(prob())` scales each repeat by its own corrupt run. `method` is as in `causal_trace`. `max_rows` cells run
    at once. Raises `LensError` for a batch of several, and for what cannot be corrupted or restored.
    """
    corruption = gaussian(3.0, at="all") if corruption is None else corruption
    if not isinstance(corruption, Noise | Pair):
        raise LensError(f"{type(corruption).__name__} as corruption; expected gaussian(…), multiplicative(…), pair(…)")
    if repeats < 1 or max_rows < 1:
        raise LensError(f"repeats={repeats}, max_rows={max_rows}; expected 1 or more")
    hooks, stack = hooks_of(model, restore)
    if isinstance(corruption, Noise):
        noise_at = noise_hook(corruption, noise_at, restore, stack)
    ids = answer_ids(model, metric)
    clean = Run.of(model, one_row(model, inputs, ids), hooks)
    bound = bind(model, metric, ids, clean.logits)
    roles = clean.inputs.roles_in(stack)
    axis, groups = groups_of(roles, at, stack)
    chosen = layers_of(layers, len(hooks))
    draws = []
    for repeat in range(repeats if isinstance(corruption, Noise) else 1):
        generator = torch.Generator().manual_seed(int(digest(seed, 0, repeat), 16))
        given = corrupted(clean, corruption, noise_at, generator)
        trial = Trial(clean, given, stack, settled(bound, clean.logits, given.logits))
        cells = [
            trial.cells([hooks[each] for each in window_], list(groups.values()), max_rows)
            for window_ in windows(chosen, window, len(hooks))
        ]
        facts = {"score": f"causal trace {restore}", "corruption": said(corruption, noise_at), "seed": seed}
        facts |= {"window": window, "answer": spelled(model, bound.ids)} | trial.facts(len(cells) * len(groups))
        draws.append(scores_of(torch.stack(cells), axis, groups, roles, chosen, len(hooks), bound.unit, facts))
    return over_repeats(draws)


# ---- runs


@dataclass(frozen=True)
class Run:
    """A run of the whole model: its inputs, the edits it was made with, its logits, and what is restored from it."""

    model: HookedBlip
    inputs: BlipInputs
    edits: tuple[tuple[str, Any], ...]
    logits: Float[Tensor, "1 pos d_vocab"]
    acts: Mapping[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedBlip, inputs: BlipInputs, hooks: Sequence[str], edits: tuple[Any, ...] = ()) -> Run:
        with model.hooks(fwd_hooks=edits) if edits else nullcontext():
            logits, cache = model.run_with_cache(inputs, names_filter=list(hooks))
        return cls(model, inputs, edits, logits, {name: cache[name] for name in hooks})

    @torch.no_grad()
    def entering(self, stack: str) -> Tensor | None:
        """What this run gives to a stack; None for the tower, which starts from pixels."""
        if stack == "vision":
            return None
        with self.model.hooks(fwd_hooks=self.edits):
            picture = self.model.vision(self.inputs.pixels)
            return picture if stack == "encoder" else self.model.encode_question(self.inputs, picture)

    @torch.no_grad()
    def again(self, stack: str, entering: Tensor | None, n: int, edits: Sequence[Any]) -> Tensor:
        """Logits `[n, pos, d_vocab]` of `n` copies of this run, with further edits from a stack on."""

        def copies(tensor: Any) -> Tensor:
            return tensor.expand(n, *tensor.shape[1:])

        tokens = self.model.answer_tokens(self.inputs)
        with self.model.hooks(fwd_hooks=[*self.edits, *edits]):
            x = self.model.vision(copies(self.inputs.pixels)) if entering is None else copies(entering)
            if stack != "decoder":
                x = self.model.encoder(copies(self.inputs.tokens), x)
            return self.model.read_answer(copies(tokens), x)


@dataclass(frozen=True)
class Trial:
    """One corrupt run beside the clean one, and the metric bound to both."""

    clean: Run
    corrupt: Run
    stack: str
    bound: Bound

    def cells(self, hooks: Sequence[str], groups: list[list[int]], max_rows: int) -> Float[Tensor, " group"]:
        """The metric with the clean states of some hooks at each group of positions."""
        entering, values = self.corrupt.entering(self.stack), []
        for start in range(0, len(groups), max_rows):
            part = groups[start : start + max_rows]
            rows = torch.tensor([row for row, group in enumerate(part) for _ in group])
            columns = torch.tensor([column for group in part for column in group])

            def put(act: Tensor, hook: Any, rows: Tensor = rows, columns: Tensor = columns) -> Tensor:
                act[rows, columns] = self.clean.acts[hook.name][0, columns]
                return act

            logits = self.corrupt.again(self.stack, entering, len(part), [(name, put) for name in hooks])
            values.append(self.measured(logits))
        return torch.cat(values)

    def measured(self, logits: Tensor) -> Float[Tensor, " run"]:
        return self.bound(logits[:, self.bound.places(logits.shape[1])]).cpu()

    def facts(self, n_cells: int) -> dict[str, Any]:
        """What a result says of its runs; the noise floor is what a batch of unedited copies misses by."""
        raw = replace(self.bound, span=None)
        clean, corrupt = (float(raw(run.logits[:, raw.places(run.logits.shape[1])])[0]) for run in self.runs)
        baseline = self.measured(self.corrupt.logits)
        copies = self.corrupt.again(self.stack, self.corrupt.entering(self.stack), 2, [])
        floor = float((self.measured(copies) - baseline).abs().max())
        return {
            **{"metric": self.bound.name, "clean": clean, "corrupt": corrupt, "baseline": float(baseline[0])},
            **{"noise_floor": floor, "cells": n_cells, "ran": n_cells},
        }

    @property
    def runs(self) -> tuple[Run, Run]:
        return self.clean, self.corrupt


# ---- what is run, and on what


def one_row(model: HookedBlip, inputs: BlipInputs, ids: list[int]) -> BlipInputs:
    """The inputs without padding, the answer's tokens but for the last behind them; raises for a batch of several."""
    if not isinstance(inputs, BlipInputs):
        raise LensError(f"inputs of type {type(inputs).__name__}; expected BlipInputs: model.prepare(question, image)")
    if inputs.batch_size > 1:
        raise LensError(f"a batch of {inputs.batch_size}; trace one at a time: inputs.row(i)")
    inputs = inputs.with_roles(model.cfg).row(0).check(model.cfg).to(model.cfg.device)
    if len(ids) < 2 or inputs.answers is None:
        return inputs
    tokens, roles = model.answer_tokens(inputs), inputs.answers[0]
    more = torch.tensor([ids[:-1]], device=tokens.device)
    labels = (*roles.labels, *("answer",) * more.shape[1])
    words = [spelled(model, [each]) for each in ids[:-1]] if roles.tokens else []
    said = Roles(labels, (*roles.tokens, *map(str, words)))
    return replace(inputs, decoder_tokens=torch.cat((tokens, more), 1), answers=(said,)).check(model.cfg)


# ---- what is corrupted


def corrupted(clean: Run, corruption: Noise | Pair, noise_at: str | None, generator: torch.Generator) -> Run:
    """A corrupt run; raises `LensError` where it holds the same as the clean one in all that is restored."""
    model, hooks = clean.model, list(clean.acts)
    if isinstance(corruption, Noise):
        assert noise_at is not None
        run = Run.of(model, clean.inputs, hooks, ((noise_at, noise(clean, corruption, noise_at, generator)),))
    else:
        other = replace(
            corruption.other.row(0), decoder_tokens=clean.inputs.decoder_tokens, answers=clean.inputs.answers
        )
        if other.tokens.shape != clean.inputs.tokens.shape:
            n, m = clean.inputs.n_pos, other.n_pos
            raise LensError(f"clean has {n} question tokens, the pair {m}; they must correspond one to one")
        run = Run.of(model, other.to(model.cfg.device).check(model.cfg), hooks)
    if all(torch.equal(clean.acts[name], run.acts[name]) for name in hooks):
        raise LensError(f"nothing to restore at {hooks[0]!r}: {said(corruption, noise_at)} changes nothing there")
    return run


def noise(clean: Run, corruption: Noise, hook: str, generator: torch.Generator) -> Any:
    """A hook function that corrupts some positions, the same in every copy of a batch.

    Drawn in float32 on the CPU. Added noise is in units of the standard deviation of the embedding matrix for words,
    and of the picture's own vectors at that hook for patches.
    """
    model, stack = clean.model, hook.partition(".")[0]
    where = select(clean.inputs.roles_in(stack), corruption.at, stack)
    drawn = torch.randn(len(where), model.cfg.text.d_model, generator=generator, dtype=torch.float32).double()
    drawn, at = (corruption.sigma * drawn).to(model.cfg.device), torch.tensor(where)
    if corruption.how == "add":
        drawn = drawn * spread(clean, hook)

    def corrupt(act: Tensor, hook: Any) -> Tensor:
        wide = act[:, at].double()
        act[:, at] = (wide + drawn if corruption.how == "add" else wide * (1 + drawn)).to(act.dtype)
        return act

    return corrupt


@torch.no_grad()
def spread(clean: Run, hook: str) -> float:
    """The standard deviation that noise at a hook is measured in."""
    if hook.startswith("encoder."):
        return float(upcast(clean.model.encoder.embed.weight.detach()).std())
    _, cache = clean.model.run_with_cache(clean.inputs, names_filter=hook)
    return float(upcast(cache[hook]).std())


def scores_of(
    values: Float[Tensor, "layer group"],
    axis: str,
    groups: Groups,
    roles: Roles,
    layers: list[int],
    n_layers: int,
    unit: str,
    method: dict[str, Any],
) -> Scores:
    """The cells as labelled scores; positions that were not swept are NaN."""
    labels: dict[str, Any] = {} if layers == list(range(n_layers)) else {"layer": tuple(layers)}
    if axis == "group":
        return Scores(values, ("layer", axis), labels | {axis: tuple(groups)}, unit, method)
    whole = torch.full((len(layers), len(roles)), torch.nan, dtype=torch.float64)
    whole[:, [i for (i,) in groups.values()]] = values
    return Scores(whole, ("layer", axis), labels | {axis: position_names(roles)}, unit, method, roles=(roles,))


def said(corruption: Noise | Pair, noise_at: str | None) -> str:
    return f"{corruption} in {noise_at}" if noise_at else f"{corruption}, nothing drawn: one run"
