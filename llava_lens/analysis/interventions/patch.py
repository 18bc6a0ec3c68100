"""Activation patching: put one run's activations into another, cell by cell, and see what the answer does."""

from __future__ import annotations

from typing import Any, Unpack

from llava_lens.analysis.interventions.grid import Cell, Grid, Reach, Sweep
from llava_lens.analysis.interventions.study import Direction, Running, Turn, each_row, read, read_pair, taken
from llava_lens.analysis.interventions.where import Ground, layers_of
from llava_lens.analysis.scores import Scores
from llava_lens.sweep.edits import Edit


def patch(
    model: Any,
    clean: Any,
    corrupt: Any,
    hook: str = "resid_pre",
    sweep: Sweep = ("layer", "position"),
    *,
    at: Any = None,
    metric: Any = None,
    direction: Direction = "denoise",
    layers: Any = None,
    heads: Any = None,
    neurons: Any = None,
    window: int = 1,
    image: int = 0,
    **how: Unpack[Running],
) -> Scores:
    """Patch activations between two runs that differ in one thing, one cell at a time; `Scores` of the metric.

    "denoise" puts clean activations into the corrupt run (what suffices to bring the answer back?), "noise" corrupt
    ones into the clean run (what is needed for it?). `hook` is one of decoder, projector or tower, by
    TransformerLens's short name (`"resid_pre"`, `"z"`, `"vision.resid_post"`) or in full (`"projector.hook_out"`).

    `sweep` names the result's axes: "layer" (with `window`, that many neighbouring layers at once), "position", "patch"
    (a picture's, as row and column), "group", "head" (key/value heads for k and v), "neuron". Axes that are not swept
    are patched whole, or where `at`, `layers`, `heads`, `neurons` say. `at` is a role, a word of the question,
    positions, `Patches(mask, buffer)`, or a list of them; for groups a mapping from names, or roles and words.

    `metric` is a name ("log_prob", "prob", "logit", "kl"), one of `llava_lens.sweep`'s (`logit_diff(a, b)`,
    `recovery(…)`), or a function of logits `[1, pos, d_vocab]`; by default the log-probability of the clean answer.

    Only what a cell can change is run; the result's `method` says how (`path`), how many cells had to run, and the
    noise floor. `how` are the options of `Running`.

    Raises `LensError`, before any long work, for inputs that do not correspond, a role that the prompt lacks, a layer,
    head or position that is not there, and a metric that is not one finite number.
    """
    clean, corrupt = read_pair(model, clean, corrupt, direction)
    reach = Reach(hook, sweep, at, layers, heads, neurons, window, image)

    def study(turn: Turn) -> Scores:
        rows = turn.row(clean), turn.row(corrupt)
        grid = reach.grid(model, rows[0], turn.n_pos)
        setting = turn.settle(*rows, grid.hooks)
        source, on = (setting.clean, "corrupt") if direction == "denoise" else (setting.corrupt, "clean")
        cells = [cell.edits(lambda edit: taken(source, edit)) for cell in grid.cells]
        return turn.measure(setting, grid, cells, on, score=f"patch {hook}", direction=direction)

    return each_row(model, clean, metric, how, study)


def back_patch(
    model: Any,
    inputs: Any,
    at: Any = "image",
    *,
    sources: Any = None,
    targets: Any = None,
    metric: Any = None,
    **how: Unpack[Running],
) -> Scores:
    """Put the stream after a late layer back into an early one at some positions: `Scores[source, target]`.

    The stream after layer `source` replaces the one before layer `target` in the same prompt (arXiv 2406.12775). All
    pairs of `sources` and `targets` are run, by default every layer. `at`, `metric`, `how` and the errors are as in
    `patch`.
    """
    inputs = read(model, inputs)
    late, early = (layers_of(given, model.cfg.n_layers) for given in (sources, targets))
    places = tuple(Cell((a, b), ()) for a in range(len(late)) for b in range(len(early)))
    labels: dict[str, tuple[int | str, ...]] = {"source": tuple(late), "target": tuple(early)}
    grid = Grid(places, ("source", "target"), (len(late), len(early)), labels)

    def study(turn: Turn) -> Scores:
        row = turn.row(inputs)
        where = Ground(model, row).select(at)
        after, before = "blocks.{}.hook_resid_post", "blocks.{}.hook_resid_pre"
        names = [after.format(layer) for layer in late] + [before.format(layer) for layer in early]
        setting = turn.settle(row, names=names)
        states = [taken(setting.clean, Edit(after.format(layer), 0.0, pos=where)) for layer in late]
        cells = [(Edit(before.format(layer), state, pos=where),) for state in states for layer in early]
        return turn.measure(setting, grid, cells, score="back-patch")

    return each_row(model, inputs, metric, how, study)
