"""Maps from what happens when patches are taken away: one window at a time, or many at random.

Unusual: both work with every masking operator.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_lens.errors import LensError
from llava_lens.maps.case import MAX_BYTES, Case
from llava_lens.maps.masking import Masking


def occlusion(
    case: Case, *, size: int = 1, operator: str = "embedding", max_bytes: int = MAX_BYTES
) -> Float[Tensor, " patch"]:
    """How much the score falls when the window of `size` × `size` patches around each patch is taken out."""
    masking = Masking(case, operator, max_bytes=max_bytes, bar="occlusion" if case.progress else "")
    return case.whole.score - masking.run(~windows(case.grid, size)).score


def windows(grid: tuple[int, int], size: int) -> Bool[Tensor, "window patch"]:
    """The patches around each patch, cut off at the picture's edge."""
    if size < 1 or size % 2 == 0:
        raise LensError(f"size={size}; expected an odd number of patches, 1 or more")
    y, x = (each.flatten() for each in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    near = [(each[:, None] - each).abs() <= size // 2 for each in (y, x)]
    return near[0] & near[1]


def rise(
    case: Case,
    *,
    n: int = 1000,
    cell: int | None = None,
    keep: int | float = 0.5,
    operator: str = "embedding",
    max_bytes: int = MAX_BYTES,
) -> Float[Tensor, " patch"]:
    """`Σ f(mask) · mask / (n · keep)` over random masks: the expected answer given that a patch is there (eq. 6).

    A mask keeps each cell of `cell` × `cell` patches (a seventh of the picture's side unless given) with probability
    `keep`, the cells shifted at random. `f` is the answer's probability, or the difference of logits with a second
    answer.
    """
    if n < 1 or not 0 < keep <= 1:
        raise LensError(f"n={n}, keep={keep}; expected 1 mask or more, and a probability above 0")
    cell = max(1, round(max(case.grid) / 7)) if cell is None else cell
    if not 1 <= cell <= max(case.grid):
        raise LensError(f"cell={cell}; expected 1 … {max(case.grid)} patches")
    case.notes |= {"cell": cell}
    kept = random_masks(case.grid, n, cell, keep, case.generator())
    runs = Masking(case, operator, max_bytes=max_bytes, bar="RISE" if case.progress else "").run(kept)
    f = (runs.prob if case.versus is None else runs.score).cpu()
    return f @ kept.to(f) / (n * keep)


def random_masks(
    grid: tuple[int, int], n: int, cell: int, keep: int | float, generator: torch.Generator
) -> Bool[Tensor, "mask patch"]:
    """Cells of patches kept at random, each mask with a shift of its own; any patch stays with probability `keep`."""
    cells = [length // cell + 2 for length in grid]
    coarse = torch.rand(n, *cells, generator=generator) < keep
    shift = torch.randint(cell, (n, 2), generator=generator)
    y, x = ((torch.arange(length) + shift[:, axis, None]) // cell for axis, length in enumerate(grid))
    return coarse[torch.arange(n)[:, None, None], y[:, :, None], x[:, None]].flatten(1)
