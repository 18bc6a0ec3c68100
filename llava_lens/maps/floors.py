"""Maps that know nothing of the model: what any map must beat."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.maps.case import Case


def random(case: Case) -> Float[Tensor, " patch"]:
    """Numbers drawn evenly from 0 … 1, others for each row and seed."""
    return torch.rand(len(case.patches), generator=case.generator())


def centre(case: Case) -> Float[Tensor, " patch"]:
    """1 in the middle of the picture, falling with the distance to 0 in its corners."""
    rows, cols = case.grid
    y, x = torch.arange(rows) - (rows - 1) / 2, torch.arange(cols) - (cols - 1) / 2
    distance = (y[:, None] ** 2 + x[None] ** 2).sqrt().flatten()
    return 1 - distance / distance.max().clamp(min=1e-9)
