"""How time and peak memory of the residual sweep grow with positions, layers and images, beside the naive loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks import baselines, ours, truth
from benchmarks.cases import Case, Found
from benchmarks.cases.sweeps import Grid
from benchmarks.compare import Settings, compare
from benchmarks.models import SIZES, Size, make_study


def sizes(axis: str, quick: bool) -> list[Size]:
    """A series of models and prompts that grow along one axis; four layers where layers do not grow."""
    base = SIZES["toy"] if quick else replace(SIZES["bench"], layers=4)
    series: dict[str, Sequence[int]] = {
        "positions": (2, 4) if quick else (4, 8, 12),  # side of the picture's grid
        "layers": (2, 4) if quick else (2, 4, 8),
        "images": (1, 2) if quick else (1, 2, 3),
    }
    return [replace(base, **{"grid" if axis == "positions" else axis: value}) for value in series[axis]]


def curve(axis: str, settings: Settings) -> Found:
    """One row per variant and size."""
    name = f"curves/{axis}"
    for size in sizes(axis, settings.quick):
        study = make_study(size, "picture", settings.device)
        grid = Grid(size.layers, size.positions, settings=settings, visit=6 if settings.quick else 12)
        clean = baselines.clean_activations(study)["resid_pre"]
        own = grid.whole("llava_lens", partial(ours.patch_resid, study))
        loop = grid.looped("hf loop", partial(baselines.patch_resid, study, clean=clean))
        with truth.in_float64(study.reference) as model:
            exact = truth.patch_resid(model, study, grid.checked)
        params = {axis: getattr(size, axis)}
        yield from compare(name, size, params, len(grid.cells), [loop, own], exact, settings)


CASES = [
    Case(f"curves/{axis}", f"the residual sweep as the number of {axis} grows", partial(curve, axis))
    for axis in ("positions", "layers", "images")
]
