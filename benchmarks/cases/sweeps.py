"""Sweeps over one prompt pair or one picture: who finds all cells fastest, and how exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks import baselines, ours, truth
from benchmarks.baselines import Cell
from benchmarks.bridge import CANNOT, Bridge
from benchmarks.cases import Case
from benchmarks.compare import Settings, Variant, compare, spread_out
from benchmarks.models import SIZES, Size, make_study, questions
from benchmarks.rows import LeftOut, Row

Found = list[Row | LeftOut]
WIDTH, SOURCES = 3, 5
"""Layers that a knockout window takes, and parts that the picture is cut into."""


def size_for(settings: Settings) -> Size:
    """The toy for a quick check, else the size that is measured."""
    return SIZES["toy" if settings.quick else "bench"]


class Grid:
    """A grid of cells, of which the loops visit an evenly spread part."""

    def __init__(self, *lengths: int, visit: int):
        self.cells: list[Cell] = list(itertools.product(*map(range, lengths)))
        self.visited = spread_out(len(self.cells), visit)
        self.part = [self.cells[i] for i in self.visited]
        self.share = len(self.part) / len(self.cells)

    def looped(self, name: str, run: Callable[[Sequence[Cell]], Tensor]) -> Variant:
        """A variant that pays for each cell and visits only some."""
        return Variant(name, lambda: run(self.part), self.share)

    def whole(self, name: str, run: Callable[[], Tensor]) -> Variant:
        """A variant that computes every cell."""
        return Variant(name, lambda: run().flatten()[self.visited])


def resid(differ: Literal["picture", "words"], settings: Settings) -> Found:
    """The residual stream at every layer and position."""
    name = "sweeps/resid" if differ == "picture" else "sweeps/resid-words"
    study = make_study(size_for(settings), differ, settings.device)
    grid = Grid(study.size.layers, study.size.positions, visit=12 if settings.quick else 48)
    bridge, clean = Bridge(study), baselines.clean_activations(study)["resid_pre"]
    bridge_clean = bridge.clean_cache("resid_pre")
    variants = [
        grid.looped("hf loop", lambda cells: baselines.patch_resid(study, cells, clean)),
        grid.looped("transformer_lens", lambda cells: bridge.patch_resid(cells, bridge_clean)),
        grid.whole("llava_lens", lambda: ours.patch_resid(study)),
    ]
    exact = truth.patch_resid(study.exact, study, grid.part)
    return [*compare(name, study.size, {"differ": differ}, len(grid.cells), variants, exact, settings)]


def heads(at: Literal["all", "last"], settings: Settings) -> Found:
    """Every head's output."""
    name = "sweeps/heads" if at == "all" else "sweeps/heads-last"
    where = slice(None) if at == "all" else slice(-1, None)
    study = make_study(size_for(settings), "picture", settings.device)
    grid = Grid(study.size.layers, study.size.heads, visit=12 if settings.quick else 32)
    bridge, clean = Bridge(study), baselines.clean_activations(study)["z"]
    bridge_clean = bridge.clean_cache("z")
    theirs = bridge.patch_heads if at == "all" else bridge.patch_heads_last
    mine = partial(ours.patch_heads, study, None if at == "all" else "last")
    variants = [
        grid.looped("hf loop", lambda cells: baselines.patch_heads(study, cells, clean, where)),
        grid.looped("transformer_lens", lambda cells: theirs(cells, bridge_clean)),
        grid.whole("llava_lens", mine),
    ]
    exact = truth.patch_heads(study.exact, study, grid.part, where)
    return [*compare(name, study.size, {"at": at}, len(grid.cells), variants, exact, settings)]


def knockout(settings: Settings) -> Found:
    """The last position blind to each part of the picture in a window of layers."""
    name = "sweeps/knockout"
    study = make_study(size_for(settings), "picture", settings.device)
    sources = [part.tolist() for part in torch.tensor(study.image).tensor_split(SOURCES)]
    grid = Grid(study.size.layers, SOURCES, visit=12 if settings.quick else 40)
    variants = [
        grid.looped("hf loop", lambda cells: baselines.knock_out(study, cells, sources, WIDTH)),
        grid.whole("llava_lens", lambda: ours.knock_out(study, sources, WIDTH)),
    ]
    exact = truth.knock_out(study.exact, study, grid.part, sources, WIDTH)
    params = {"window": WIDTH, "sources": SOURCES}
    rows = compare(name, study.size, params, len(grid.cells), variants, exact, settings)
    return [*rows, LeftOut(name, "transformer_lens", CANNOT["knockout"])]


def several_questions(settings: Settings) -> Found:
    """Five questions of different lengths on one picture."""
    name = "sweeps/questions"
    study = make_study(size_for(settings), "picture", settings.device)
    prompts = questions(study, 5)
    variants = [
        Variant("hf one by one", lambda: baselines.ask_each(study.hf, prompts)),
        Variant("hf batch", lambda: baselines.ask_batch(study.hf, prompts)),
        Variant("hf shared start", lambda: baselines.ask_prefix(study.hf, prompts)),
        Variant("llava_lens", lambda: ours.ask(study, prompts)),
    ]
    exact = truth.ask(study.exact, prompts)
    rows = compare(name, study.size, {"questions": len(prompts)}, len(prompts), variants, exact, settings)
    return [*rows, LeftOut(name, "transformer_lens", CANNOT["questions"])]


CASES = [
    Case("sweeps/resid", "clean stream into the corrupt run at (layer, position)", partial(resid, "picture")),
    Case("sweeps/resid-words", "the same where only words of the question differ", partial(resid, "words")),
    Case("sweeps/heads", "every head's z at all positions", partial(heads, "all")),
    Case("sweeps/heads-last", "every head's z at the last position", partial(heads, "last")),
    Case("sweeps/knockout", "last position → parts of the picture blocked in a window of layers", knockout),
    Case("sweeps/questions", "five questions on one picture", several_questions),
]
