"""How good a map is, as numbers: what its order of patches does to the answer, and whether it lies on the object.

Unusual: all maps of one case are scored from one list of masked runs, in which a set of patches that several of them
ask for stands once; and no map gains from ties, which are broken at random, the same way for all maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llava_lens.errors import LensError
from llava_lens.maps.case import Runs

FLOOR = 0.2
"""An area is not divided by a difference of probabilities, full minus empty, below this."""
SMALL = (1,)
"""Counts of patches at which every curve is read, however wide its steps are."""
BETTER: dict[str, Literal["higher", "lower", "zero"]] = {
    "deletion": "lower",
    "insertion": "higher",
    "deletion_share": "lower",
    "insertion_share": "higher",
    "between": "higher",
    "comprehensiveness": "higher",
    "sufficiency": "lower",
    "flips": "higher",
    "occlusion": "higher",
    "pointing": "higher",
    "energy": "higher",
    "contrast_pointing": "higher",
    "contrast_moved": "higher",
    "contrast_correlation": "lower",
    "randomised": "zero",
    "randomised_size": "lower",
}
"""Which way each measure is good; `better` takes names with `@k` and `/operator` too."""


def better(measure: str) -> Literal["higher", "lower", "zero"]:
    """Which way a measure is good; raises `LensError` for a name that is none.

    >>> better("comprehensiveness@10%/pixel"), better("randomised")
    ('higher', 'zero')
    """
    name = measure.split("/")[0].split("@")[0]
    if name not in BETTER:
        raise LensError(f"no measure {measure!r}; expected {', '.join(BETTER)}")
    return BETTER[name]


# ---- orders and correlations


def ordered(scores: Float[Tensor, " patch"], ties: Int[Tensor, " patch"]) -> Int[Tensor, " patch"]:
    """The patches from the strongest to the weakest; equal ones in the order of `ties`, a permutation.

    >>> ordered(torch.tensor([1.0, 3.0, 1.0]), torch.tensor([2, 1, 0]))
    tensor([1, 2, 0])
    """
    return ties[scores[ties].argsort(descending=True, stable=True)]


def ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks from 0; equal values share the mean of theirs.

    >>> ranks(torch.tensor([5.0, 1.0, 5.0]))
    tensor([1.5000, 0.0000, 1.5000], dtype=torch.float64)
    """
    _, place, sizes = values.unique(return_inverse=True, return_counts=True)
    return (sizes.cumsum(0).double() - (sizes.double() + 1) / 2)[place]


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float | None:
    """The rank correlation of two maps, ties at their mean rank; None where one of them is flat."""
    x, y = (each - each.mean() for each in (ranks(a), ranks(b)))
    spread = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / spread if spread else None


def likeness(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """The rank correlation of two maps that should differ: of two flat ones it is 1, of a flat one and another 0."""
    found = spearman(a, b)
    if found is None:
        return float(bool((a == a[0]).all() and (b == b[0]).all()))
    return found


# ---- against the object's mask


def pointing(scores: Float[Tensor, " patch"], mask: Bool[Tensor, " patch"]) -> float:
    """Whether the strongest patch lies in the mask; of several equally strong ones, the share that does.

    The pointing game of Zhang et al. (2018, arXiv 1608.00507), without a tolerance. A flat map gets the chance level.
    """
    return float(mask[scores == scores.max()].double().mean())


def energy(scores: Float[Tensor, " patch"], mask: Bool[Tensor, " patch"]) -> float:
    """The share of the map's positive part that lies in the mask; 0 where nothing is positive.

    The energy-based pointing game of Wang et al. (2020, arXiv 1910.01279).
    """
    positive = scores.double().clamp(min=0)
    whole = float(positive.sum())
    return float(positive[mask].sum()) / whole if whole else 0.0


def against(scores: Float[Tensor, " patch"], mask: Bool[Tensor, " patch"]) -> dict[str, float]:
    """How a map lies on its object, by name; by chance both are the mask's share of the patches."""
    return {"pointing": pointing(scores, mask), "energy": energy(scores, mask)}


def contrasted(
    first: Float[Tensor, " patch"],
    second: Float[Tensor, " patch"],
    mask: Bool[Tensor, " patch"] | None,
    other: Bool[Tensor, " patch"] | None,
) -> dict[str, float]:
    """Does the map move with the question? Two maps of one picture, each with the mask of the object it asks about.

    `contrast_pointing`: both strongest patches lie on their own object. `contrast_moved`: the share of the positive
    part that an object gains when it is the one asked about, the mean of both objects. `contrast_correlation`: how
    much alike the maps are, which needs no masks.
    """
    found = {"contrast_correlation": likeness(first, second)}
    if mask is None or other is None:
        return found
    gained = energy(first, mask) - energy(second, mask), energy(second, other) - energy(first, other)
    return {
        "contrast_pointing": pointing(first, mask) * pointing(second, other),
        "contrast_moved": sum(gained) / 2,
        **found,
    }


# ---- against the model, with patches taken out


def counts_of(n: int, steps: int, k: Sequence[float]) -> list[int]:
    """At how many of `n` patches curves are read: `steps` even steps, small counts, and the top shares `k`.

    Raises `LensError` for steps below 1 and for shares that are not between 0 and 1.

    >>> counts_of(64, 4, (0.05,))
    [0, 1, 3, 16, 32, 48, 64]
    """
    if steps < 1 or any(not 0 < share < 1 for share in k):
        raise LensError(f"steps={steps}, k={tuple(k)}; expected 1 step or more, and shares between 0 and 1")
    even = {round(step * n / steps) for step in range(steps + 1)}
    return sorted(even | {count for count in SMALL if count < n} | {top(n, share) for share in k})


def top(n: int, share: float) -> int:
    """How many patches the top share of `n` is, at least 1."""
    return max(1, round(share * n))


@dataclass(frozen=True)
class Curves:
    """What the model says while patches are taken out in a map's order (`deletion`), or put back (`insertion`).

    Probabilities of the answer `[map, count]`, for each number of patches in `counts`; `choice` are the likeliest
    tokens of the deletion. `singles` `[patch]` is what the score loses with one patch out, None where not asked for.
    """

    counts: tuple[int, ...]
    deletion: Float[Tensor, "map count"]
    insertion: Float[Tensor, "map count"]
    choice: Int[Tensor, "map count"]
    singles: Float[Tensor, " patch"] | None

    @property
    def full(self) -> float:
        """The answer's probability with every patch."""
        return float(self.deletion[0, 0])

    @property
    def empty(self) -> float:
        """The answer's probability with no patch."""
        return float(self.deletion[0, -1])

    def at(self, share: float) -> int:
        """Where in `counts` the top share stands."""
        return self.counts.index(top(self.counts[-1], share))


def curves(
    run: Callable[[Bool[Tensor, "run patch"]], Runs],
    orders: Int[Tensor, "map patch"],
    counts: Sequence[int],
    singles: bool = True,
) -> Curves:
    """The curves of several maps from one call of `run` (`Masking.run`), with each set of patches in it once."""
    n_maps, n = orders.shape
    place = orders.argsort(1)
    out = torch.stack([place < count for count in counts], 1)  # [map, count, patch]
    sets = [(~out).reshape(-1, n), out.reshape(-1, n), *([~torch.eye(n, dtype=torch.bool)] if singles else [])]
    asked, where = torch.cat(sets).unique(dim=0, return_inverse=True)
    runs = run(asked)
    score, prob, choice = runs.score.cpu().double()[where], runs.prob.cpu().double()[where], runs.choice.cpu()[where]
    size, shape = n_maps * len(counts), (n_maps, len(counts))
    return Curves(
        counts=tuple(counts),
        deletion=prob[:size].reshape(shape),
        insertion=prob[size : 2 * size].reshape(shape),
        choice=choice[:size].reshape(shape),
        singles=score[0] - score[2 * size :] if singles else None,
    )


def area(values: Float[Tensor, "*map count"], counts: Sequence[int]) -> Float[Tensor, "*map"]:
    """The area under curves over the share of patches, 0 to 1, by the trapezium rule."""
    return torch.trapezoid(values.double(), torch.tensor(counts, dtype=torch.float64) / counts[-1])


def faithfulness(
    found: Curves, maps: Float[Tensor, "map patch"], k: Sequence[float]
) -> dict[str, Float[Tensor, " map"]]:
    """Every measure that runs with patches taken out give, by name.

    `deletion`, `insertion`: area under the answer's probability (Petsiuk et al. 2018, arXiv 1806.07421); `…_share`:
    the same with empty at 0 and full at 1, NaN where those differ by less than `FLOOR`. `between`: insertion minus
    deletion, the area between both curves. `comprehensiveness@k`,
    `sufficiency@k`: probability lost without the top k and with the top k alone (DeYoung et al. 2020, arXiv
    1911.03429). `flips@k`: the likeliest token is another one without the top k. `occlusion`: rank correlation with
    what each patch alone takes away, 0 for a flat map.
    """
    deletion, insertion = area(found.deletion, found.counts), area(found.insertion, found.counts)
    span = found.full - found.empty
    share = span if span >= FLOOR else torch.nan
    measures = {
        "deletion": deletion,
        "insertion": insertion,
        "deletion_share": (deletion - found.empty) / share,
        "insertion_share": (insertion - found.empty) / share,
        "between": insertion - deletion,
    }
    for each in k:
        at = found.at(each)
        measures[f"comprehensiveness@{each:.3g}"] = found.full - found.deletion[:, at]
        measures[f"sufficiency@{each:.3g}"] = found.full - found.insertion[:, at]
        measures[f"flips@{each:.3g}"] = (found.choice[:, at] != found.choice[:, 0]).double()
    if found.singles is not None:
        each_rank = [spearman(scores, found.singles) or 0.0 for scores in maps]
        measures["occlusion"] = torch.tensor(each_rank, dtype=torch.float64)
    return measures
