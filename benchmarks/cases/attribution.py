"""Attribution patching of the residual grid: first order by ours and by hand, beside a loop of exact patches.

Unusual: the estimate is no exact patch, so its error here is that of the first order, not of rounding.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import baselines, batched, floors, ours, truth
from benchmarks.cases import Case, Found
from benchmarks.cases.sweeps import Grid, study_for
from benchmarks.compare import Settings, compare
from benchmarks.models import Study

AGAINST = "exact patches, one whole run per cell, in float64 (an estimate differs from them by what is not linear)"


def estimates(study: Study, top_k: int = 0) -> Tensor:
    """The metric of every cell by first order, exact for the `top_k` that were run."""
    found = ours.screen(study, top_k)
    return torch.where(found.exact.values.isnan(), found.estimate.values, found.exact.values)


def resid(settings: Settings) -> Found:
    """Every layer and position."""
    study = study_for(settings, "picture")
    size, top_k, itemsize = study.size, 5 if settings.quick else 100, study.hf.dtype.itemsize
    grid = Grid(size.layers, size.positions, settings=settings)
    clean = baselines.clean_activations(study)["resid_pre"]
    run = floors.prefill(size, 1, itemsize)
    back = floors.decoder(size, 1, size.positions, itemsize)
    variants = [
        grid.looped("hf loop", partial(baselines.patch_resid, study, clean=clean), run),
        grid.whole("hf first order", partial(batched.first_order, study), run * 2 + back),
        grid.whole("llava_lens first order", partial(estimates, study), run * 2 + back),
        grid.whole(f"llava_lens + exact {top_k}", partial(estimates, study, top_k)),
    ]
    with truth.in_float64(study.reference) as model:
        exact = truth.patch_resid(model, study, grid.checked)
    yield from compare(
        "attribution/resid", size, {"of": "resid_pre"}, len(grid.cells), variants, exact, settings, AGAINST
    )


CASES = [Case("attribution/resid", "first order of the clean stream into the corrupt run at (layer, position)", resid)]
