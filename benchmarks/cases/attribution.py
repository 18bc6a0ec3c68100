"""Attribution patching of the residual grid, beside a loop of exact patches.

Unusual: the estimate is no exact patch, so its error here is that of the first order, not of rounding.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import baselines, floors, ours, truth
from benchmarks.cases import Case
from benchmarks.cases.sweeps import Found, Grid, size_for
from benchmarks.compare import Settings, Variant, compare
from benchmarks.models import Study, make_study

AGAINST = "exact patches, one whole run per cell, in float64 (an estimate differs from them by what is not linear)"


def estimates(study: Study, top_k: int = 0) -> Tensor:
    """The metric of every cell by first order, exact for the `top_k` that were run."""
    found = ours.screen(study, top_k)
    return torch.where(found.exact.values.isnan(), found.estimate.values, found.exact.values)


def resid(settings: Settings) -> Found:
    """Every layer and position."""
    study = make_study(size_for(settings), device=settings.device)
    size, top_k = study.size, 5 if settings.quick else 100
    grid = Grid(size.layers, size.positions, visit=12 if settings.quick else 48)
    clean = baselines.clean_activations(study)["resid_pre"]
    run = floors.prefill(size, 1, settings.dtype.itemsize)
    loop = grid.looped("hf loop", lambda cells: baselines.patch_resid(study, cells, clean))
    estimate = grid.whole("llava_lens estimate", partial(estimates, study))
    checked = grid.whole(f"llava_lens + exact {top_k}", partial(estimates, study, top_k))
    exact = truth.patch_resid(study.exact, study, grid.part)
    variants = [
        Variant(loop.name, loop.run, loop.share, run * len(grid.cells)),
        Variant(estimate.name, estimate.run, work=run * 3),  # clean, corrupt, and back through corrupt
        Variant(checked.name, checked.run),
    ]
    params = {"of": "resid_pre"}
    return [*compare("attribution/resid", size, params, len(grid.cells), variants, exact, settings, AGAINST)]


CASES = [Case("attribution/resid", "first order of the clean stream into the corrupt run at (layer, position)", resid)]
