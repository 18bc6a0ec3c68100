"""Sweeps over one prompt pair or one picture: who finds all cells fastest, and how exactly.

Unusual: at 7B exact sweeps of the whole grid take a minute, so there ours visits an evenly spread part of the layers or
positions too, and all seconds are scaled up to the grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks import baselines, batched, floors, ours, truth
from benchmarks.baselines import Cell
from benchmarks.bridge import CANNOT, Bridge
from benchmarks.cases import Case, Found
from benchmarks.compare import Settings, Variant, compare, spread_out
from benchmarks.floors import Work
from benchmarks.models import SIZES, Study, make_study, questions
from benchmarks.rows import LeftOut

Differ = Literal["picture", "words"]
WIDTH, SOURCES = 3, 5
"""Layers that a knockout window takes, and parts that the picture is cut into."""


def study_for(settings: Settings, differ: Differ) -> Study:
    """The toy for a quick check, the real size on a GPU, else one that a CPU can sweep."""
    name = "toy" if settings.quick else "7b" if settings.cuda else "bench"
    return make_study(SIZES[name], differ, settings.device, settings.dtype)


def rows_at_once(settings: Settings) -> int:
    """Cells that a batched loop puts in one forward."""
    return 4 if settings.quick else 32 if settings.cuda else 8


class Grid:
    """A grid of cells, `lengths` along its axes: `part` of it is visited by the loops, `checked` is compared.

    `every` of one axis (axis, step) is all that ours visits where the whole would take too long.
    """

    def __init__(
        self,
        *lengths: int,
        settings: Settings,
        every: tuple[int, int] = (0, 1),
        visit: int | None = None,
        check: int | None = None,
    ):
        axis, step = every
        self.axes = [spread_out(n, -(-n // step)) if i == axis else list(range(n)) for i, n in enumerate(lengths)]
        self.cells: list[Cell] = list(itertools.product(*map(range, lengths)))
        self.own: list[Cell] = list(itertools.product(*self.axes))
        visits, checks = (12, 12) if settings.quick else (64, 8) if settings.cuda else (48, 48)
        self.visited = spread_out(len(self.own), visit or visits)
        self.part = [self.own[i] for i in self.visited]
        self.compared = spread_out(len(self.part), check or checks)
        self.checked = [self.part[i] for i in self.compared]

    def looped(self, name: str, run: Callable[..., Tensor], each: Work | None = None) -> Variant:
        """A variant that pays for each of its `cells` (`each` at least) and visits only some."""
        share, work = len(self.part) / len(self.cells), None if each is None else each * len(self.cells)
        return Variant(name, partial(run, cells=self.part), share, work, read=lambda found: found[self.compared])

    def whole(self, name: str, run: Callable[[], Tensor], work: Work | None = None) -> Variant:
        """A variant that computes every cell, or every one of ours."""
        at = [self.visited[i] for i in self.compared]
        share = len(self.own) / len(self.cells)
        return Variant(name, run, share, work, read=lambda found: found.flatten()[at])


def first_difference(study: Study) -> int:
    """The first position where clean and corrupt differ: before it there is nothing to run."""
    words = (study.clean.tokens != study.corrupt.tokens)[0].nonzero()[:, 0].tolist()
    return min(words) if words else study.image[0]


def resid(differ: Differ, settings: Settings) -> Found:
    """The residual stream at every layer and position."""
    name = "sweeps/resid" if differ == "picture" else "sweeps/resid-words"
    study, rows = study_for(settings, differ), rows_at_once(settings)
    size = study.size
    long = settings.cuda and differ == "picture" and not settings.quick
    grid = Grid(size.layers, size.positions, settings=settings, every=(1, 16 if long else 1))
    bridge, clean = Bridge(study), baselines.clean_activations(study)["resid_pre"]
    bridge_clean, itemsize = bridge.clean_cache("resid_pre"), study.hf.dtype.itemsize
    run, first = floors.prefill(size, 1, itemsize), first_difference(study)
    reruns = (floors.rerun(size, layer, size.positions - at) for layer, at in grid.cells if at >= first)
    least = floors.sweep(size, itemsize, reruns, 2 if differ == "picture" else 1)
    variants = [
        grid.looped("hf loop", partial(baselines.patch_resid, study, clean=clean), run),
        grid.looped("hf batched", partial(batched.patch_resid, study, clean=clean, rows=rows)),
        grid.looped("transformer_lens", partial(bridge.patch_resid, clean=bridge_clean)),
        grid.whole("llava_lens", partial(ours.patch_resid, study, grid.axes[1] if long else None), least),
    ]
    with truth.in_float64(study.reference) as model:
        exact = truth.patch_resid(model, study, grid.checked)
    yield from compare(name, size, {"differ": differ}, len(grid.cells), variants, exact, settings)


def heads(at: Literal["all", "last"], settings: Settings) -> Found:
    """Every head's output."""
    name = "sweeps/heads" if at == "all" else "sweeps/heads-last"
    where = slice(None) if at == "all" else slice(-1, None)
    study, rows = study_for(settings, "picture"), rows_at_once(settings)
    size = study.size
    long = settings.cuda and at == "all" and not settings.quick
    grid = Grid(size.layers, size.heads, settings=settings, every=(0, 4 if long else 1))
    bridge, clean = Bridge(study), baselines.clean_activations(study)["z"]
    bridge_clean, itemsize = bridge.clean_cache("z"), study.hf.dtype.itemsize
    moved = 1 if at == "last" else size.positions - first_difference(study)
    reruns = (floors.rerun(size, layer, moved, from_middle=True) for layer, _ in grid.cells)
    run, least = floors.prefill(size, 1, itemsize), floors.sweep(size, itemsize, reruns)
    theirs = bridge.patch_heads if at == "all" else bridge.patch_heads_last
    mine = partial(ours.patch_heads, study, None if at == "all" else "last", grid.axes[0] if long else None)
    variants = [
        grid.looped("hf loop", partial(baselines.patch_heads, study, clean=clean, at=where), run),
        grid.looped("hf batched", partial(batched.patch_heads, study, clean=clean, rows=rows, at=where)),
        grid.looped("transformer_lens", partial(theirs, clean=bridge_clean)),
        grid.whole("llava_lens", mine, least),
    ]
    with truth.in_float64(study.reference) as model:
        exact = truth.patch_heads(model, study, grid.checked, where)
    yield from compare(name, size, {"at": at}, len(grid.cells), variants, exact, settings)


def knockout(settings: Settings) -> Found:
    """The last position blind to each part of the picture in a window of layers."""
    name = "sweeps/knockout"
    study = study_for(settings, "picture")
    rows = rows_at_once(settings)
    sources = [part.tolist() for part in torch.tensor(study.image).tensor_split(SOURCES)]
    grid = Grid(study.size.layers, SOURCES, settings=settings)
    size, itemsize = study.size, study.hf.dtype.itemsize
    run, begin = floors.prefill(size, 1, itemsize), [span[0] for span in baselines.windows(size.layers, WIDTH)]
    least = run + sum((floors.rerun(size, begin[layer], 1) for layer, _ in grid.cells), Work())
    variants = [
        grid.looped("hf loop", partial(baselines.knock_out, study, sources=sources, width=WIDTH), run),
        grid.looped("hf batched", partial(batched.knock_out, study, sources=sources, width=WIDTH, rows=rows)),
        grid.whole("llava_lens", partial(ours.knock_out, study, sources, WIDTH), least),
    ]
    with truth.in_float64(study.reference) as model:
        exact = truth.knock_out(model, study, grid.checked, sources, WIDTH)
    params = {"window": WIDTH, "sources": SOURCES}
    yield from compare(name, study.size, params, len(grid.cells), variants, exact, settings)
    yield LeftOut(name, "transformer_lens", CANNOT["knockout"])


def several_questions(settings: Settings) -> Found:
    """Five questions of different lengths on one picture."""
    name = "sweeps/questions"
    study = study_for(settings, "picture")
    prompts = questions(study, 5)
    variants = [
        Variant("hf one by one", lambda: baselines.ask_each(study.hf, prompts)),
        Variant("hf batch", lambda: baselines.ask_batch(study.hf, prompts)),
        Variant("hf shared start", lambda: baselines.ask_prefix(study.hf, prompts)),
        Variant("llava_lens", lambda: ours.ask(study, prompts)),
    ]
    with truth.in_float64(study.reference) as model:
        exact = truth.ask(model, prompts)
    yield from compare(name, study.size, {"questions": len(prompts)}, len(prompts), variants, exact, settings)
    yield LeftOut(name, "transformer_lens", CANNOT["questions"])


CASES = [
    Case("sweeps/resid", "clean stream into the corrupt run at (layer, position)", partial(resid, "picture")),
    Case("sweeps/resid-words", "the same where only words of the question differ", partial(resid, "words")),
    Case("sweeps/heads", "every head's z at all positions", partial(heads, "all")),
    Case("sweeps/heads-last", "every head's z at the last position", partial(heads, "last")),
    Case("sweeps/knockout", "last position → parts of the picture blocked in a window of layers", knockout),
    Case("sweeps/questions", "five questions on one picture", several_questions),
]
