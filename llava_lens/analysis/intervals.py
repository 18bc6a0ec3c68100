"""Bootstrap intervals of a mean.

Unusual: every cell is averaged over the same resampled rows, and so are other scores with as many rows and the same
seed: what two cells share row by row cancels in their difference, as it does in a paired test.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

RESAMPLES = 2000
"""How often the rows are drawn anew."""
LEVEL = 0.95
"""The share of resampled means that the interval holds."""
BLOCK = 2048
"""Cells worked on at once; more would only take more memory."""


def bootstrap(
    rows: Shaped[Tensor, "row *cell"], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
    """The lower and upper end of the 95 % percentile interval of each cell's mean over the rows, in float64.

    Rows are drawn with replacement, `resamples` times, by a generator of its own that starts from `seed`. A cell with
    a NaN gets NaN. The interval is approximate: below about 20 rows it is too narrow.

    >>> low, high = bootstrap(torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]]))
    >>> high
    tensor([3., 5.], dtype=torch.float64)
    """
    n = len(rows)
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    found = []
    for block in rows.reshape(n, -1).double().split(BLOCK, 1):
        mean = block.mean(0)
        means = (block - mean).T @ counts.T / n  # around the mean, so that equal rows give it exactly
        found.append(means.quantile(ends, 1) + mean)
    low, high = torch.cat(found, 1).reshape(2, *rows.shape[1:])
    return low, high
