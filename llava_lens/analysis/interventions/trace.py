"""Causal tracing: corrupt a prompt, put clean states back one by one, and see which bring the answer back.

Unusual: a repeat's corruption is one corrupt run that all its cells start from, so cells differ in what they restore
and in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch

from llava_lens.analysis.interventions.corruptions import EMBED, Corruption, gaussian
from llava_lens.analysis.interventions.grid import Grid, Reach, Sweep
from llava_lens.analysis.interventions.study import Running, Turn, check_pair, each_row, over_repeats, read, taken
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.sweep.edits import FRONT
from llava_lens.sweep.rows import Row
from llava_lens.sweep.setting import Setting


def causal_trace(
    model: Any,
    inputs: Any,
    corruption: Any = None,
    restore: str = "resid_post",
    sweep: Sweep = ("layer", "position"),
    *,
    at: Any = None,
    metric: Any = None,
    layers: Any = None,
    heads: Any = None,
    neurons: Any = None,
    window: int = 1,
    image: int = 0,
    repeats: int = 10,
    seed: int = 0,
    **how: Unpack[Running],
) -> Scores:
    """Restore clean activations in a corrupted run, one cell at a time; `Scores` of the metric (arXiv 2202.05262).

    `corruption` is one of `llava_lens.analysis.interventions.corruptions`, by default `gaussian(3.0)` on the pictures'
    embeddings.
    `restore` is a hook as in `patch`: "resid_pre", "resid_mid", "resid_post" for states; "attn_out" or "mlp_out" with
    `window=10` for the attention or the MLPs of ten layers; "z" with a sweep over heads. Hooks of tower and projector
    can be restored where the pictures themselves are corrupted.

    The corruption is drawn `repeats` times, by seeds made from `seed`, the row's number and the repeat's; all cells of
    a repeat share one. One that draws nothing runs once. The result is the mean over the repeats, with its 95 %
    interval if there are several. `metric=recovery(…)` scales each repeat by its own corrupt run: the indirect effect
    as a share of the total one.

    Other arguments are as in `patch`. In `method`, `corrupt` is the mean over the repeats and `corrupt_each` are all,
    `noise_floor` is the largest, and `cells` and `ran` count all repeats together. With `file` each repeat has its
    own, numbered; more repeats go on from there. Raises `LensError` as `patch` does, and for a corruption that changes
    nothing where it is restored.
    """
    corruption = gaussian() if corruption is None else corruption
    if not isinstance(corruption, Corruption):
        given = type(corruption).__name__
        raise LensError(
            f"corruption of type {given}; expected one of corruptions: gaussian(3.0), blur(4), pair(other) …"
        )
    if repeats < 1:
        raise LensError(f"repeats={repeats}; expected 1 or more")
    inputs = read(model, inputs)
    own = [corruption.of_row(model, inputs, i) for i in range(inputs.batch_size)]
    reach = Reach(restore, sweep, at, layers, heads, neurons, window, image)
    told = str(corruption) if corruption.drawn else f"{corruption}, nothing drawn: one run"

    def study(turn: Turn) -> Scores:
        row = turn.row(inputs)
        grid = reach.grid(model, row, turn.n_pos)
        n = repeats if corruption.drawn else 1
        draws = []
        for repeat in range(n):
            generator = turn.generator(seed, repeat)
            setting = corrupted(turn, row, own[turn.i], generator, grid, image)
            cells = [cell.edits(partial(taken, setting.clean)) for cell in grid.cells]
            facts = {"score": f"causal trace {restore}", "corruption": told, "seed": seed}
            part = f"repeat{repeat}" if corruption.drawn else ""
            draws.append(turn.measure(setting, grid, cells, "corrupt", part, **facts))
        return over_repeats(draws)

    return each_row(model, inputs, metric, how, study)


def corrupted(
    turn: Turn, row: Row, corruption: Corruption, generator: torch.Generator, grid: Grid, image: int
) -> Setting:
    """The clean and the corrupt run of a row; raises `LensError` where both hold the same in all that is restored."""
    hooks = grid.hooks
    with turn.model.hooks(fwd_hooks=list(turn.how.get("fwd_hooks", ()))):
        made = corruption(turn.model, row, generator)
    early = [hook for hook in hooks if hook.startswith(FRONT) or hook == "hook_text_embed"]
    if isinstance(made, Inputs):
        check_pair(turn.model, row.inputs, made)
        setting = turn.settle(row, replace(row, inputs=made), [*hooks, EMBED])
    elif early:
        raise LensError(
            f"{early[0]!r} lies before the embedding, which {corruption} corrupts: restore a hook of the decoder, or "
            "corrupt the picture: blur(…), pair(other), resample(other, at=None)"
        )
    else:
        setting = turn.settle(row, names=[*hooks, EMBED], corruption=made)
    _refuse_what_is_clean(setting, corruption, hooks, image)
    return setting


def _refuse_what_is_clean(setting: Setting, corruption: Corruption, hooks: Sequence[str], image: int) -> None:
    clean, corrupt = setting.clean.acts, setting.corrupt.acts
    if torch.equal(clean[EMBED], corrupt[EMBED]):
        raise LensError(f"{corruption} changes nothing in this prompt")
    which = {hook: image if hook.startswith(FRONT) else 0 for hook in hooks}
    if all(torch.equal(clean[hook][i], corrupt[hook][i]) for hook, i in which.items()):
        of = f" of image {image}" if hooks[0].startswith(FRONT) else ""
        raise LensError(f"nothing to restore at {hooks[0]!r}{of}: {corruption} changes nothing there")
