"""`evaluate_maps`: every map of every item, made, timed and scored in all ways, into one report.

Unusual: an item counts for all methods or the evaluation stops: a map of a wrong shape or with a NaN, a mask of
another size and an item without a picture raise, naming item and method.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError, nearest
from llava_lens.maps import scoring
from llava_lens.maps.case import MAX_BYTES, Case
from llava_lens.maps.importance import METHODS, Method, check_options, method_of, scores_of
from llava_lens.maps.items import Checked, Kept, MapItem, naming
from llava_lens.maps.masking import OPERATORS, Masking
from llava_lens.maps.randomise import randomised
from llava_lens.maps.report import COSTS, MapReport
from llava_lens.sweep.journal import digest, source_of, weights_of

__all__ = ["MapItem", "MapReport", "evaluate_maps"]

Way = str | Callable[..., Tensor] | tuple[str | Callable[..., Tensor], dict[str, Any]]
"""A method: a name in `METHODS` or a function of a `Case` that gives one number per patch; with options or without."""
Memory = Callable[[Callable[[], Any]], int | None]
"""The peak bytes of a call, None where they cannot be measured."""
CONTRAST = ("contrast_pointing", "contrast_moved", "contrast_correlation")
RANDOMISED = ("randomised", "randomised_size")


def evaluate_maps(
    model: Any,
    items: Sequence[MapItem],
    methods: Sequence[Way] | Mapping[str, Way] | None = None,
    *,
    operators: Sequence[str] = tuple(OPERATORS),
    steps: int = 10,
    k: Sequence[float] = (0.05, 0.1, 0.2),
    occlusion: bool = True,
    sanity: bool | int = True,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
    memory: Memory | None = None,
    file: str | os.PathLike[str] | None = None,
    progress: bool = True,
    what: str = "scoring maps",
) -> MapReport:
    """How good the maps of `methods` (by default all) are on `items`, by every measure of `scoring`.

    With patches taken out by each operator: areas under the answer's probability in the map's order, read at `steps`
    even steps, at small counts and at the top shares `k`; what is lost without and with the top `k`; how often the
    answer flips; rank correlation with single-patch `occlusion` (a run per patch). `sanity`: rank correlation with the
    map that a copy with randomised weights gives for the same token, on all items or the first so many.

    `seed` draws the order of ties, the copy's weights, the methods' own random numbers and the bootstrap. `memory`
    measures peak bytes; without it torch's count is used on CUDA, and elsewhere they are NaN. `file` keeps finished
    items as JSON lines, and the same call later goes on from there. Raises `LensError` naming the item, and the
    method, for whatever cannot be counted.
    """
    unknown = next((each for each in operators if each not in OPERATORS), None)
    if unknown is not None or not operators or len(set(operators)) != len(operators):
        hint = "" if unknown is None else nearest(unknown, OPERATORS)
        raise LensError(f"operators {list(operators)}{hint}; expected some of {', '.join(OPERATORS)}, each once")
    scoring.counts_of(1, steps, k)
    if len({f"{share:.3g}" for share in k}) < len(k) or sanity < 0:
        raise LensError(f"k={tuple(k)}, sanity={sanity}; expected shares that differ, and how many items or a boolean")
    named = labelled(tuple(METHODS) if methods is None else methods)
    checked = [Checked.of(model, item, item.name or f"item {i}") for i, item in enumerate(items)]
    names = tuple(each.name for each in checked)
    if not names or len(set(names)) != len(names):
        raise LensError(f"{len(names)} items with {len(set(names))} names; expected at least one item, no name twice")
    n_sane = len(names) if sanity is True else min(int(sanity), len(names))
    twin = randomised(model, seed=seed) if n_sane else None
    scorer = Scorer(twin, named, tuple(operators), steps, tuple(k), occlusion, seed, max_bytes, memory)
    facts = {"n": len(names), "randomised_items": n_sane, **scorer.facts()}
    key = ""
    if file is not None:
        whose = [model.cfg.fingerprint, weights_of(model)]
        key = digest(whose, scorer.key(), str(facts), [each.key for each in checked])
    labels = {"item": names, "method": tuple(named), "measure": scorer.measures(), "cost": COSTS}
    shapes = {part: tuple(len(labels[axis]) for axis in axes[1:]) for part, axes in PARTS.items()}
    kept, found = Kept(file, key, shapes), []
    for i, item in tqdm(list(enumerate(checked)), desc=what, unit="item", disable=not progress):
        found.append(kept.get(i) or kept.add(i, scorer.row(item, i, sane=i < n_sane)))
    return MapReport(
        *(
            Scores(
                torch.tensor([row[part] for row in found], dtype=torch.float64),
                axes,
                {axis: labels[axis] for axis in axes},
                method=facts,
            )
            for part, axes in PARTS.items()
        )
    )


PARTS = {"items": ("item", "method", "measure"), "chance": ("item", "measure"), "costs": ("item", "method", "cost")}
"""The parts of a report and their axes; a row of a file holds them without the axis `item`."""


def labelled(methods: Sequence[Way] | Mapping[str, Way]) -> dict[str, tuple[Method, dict[str, Any]]]:
    """Each method with its options, by its label: yours, or its name and options.

    Raises `LensError` for one that does not exist, an option that it does not take, and a label that comes twice.
    """
    given = list(methods.items()) if isinstance(methods, Mapping) else [("", way) for way in methods]
    found: dict[str, tuple[Method, dict[str, Any]]] = {}
    for label, way in given:
        chosen, options = way if isinstance(way, tuple) else (way, {})
        name, method = method_of(chosen)
        check_options(name, method, options)
        label = label or " ".join([name, *(f"{key}={value}" for key, value in options.items())])
        if label in found:
            raise LensError(f"method {label!r} comes twice; give labels: {{label: method}}")
        found[label] = method, dict(options)
    if not found:
        raise LensError("no methods; expected at least one")
    return found


@dataclass
class Scorer:
    """All measures of one item after another."""

    twin: Any
    methods: dict[str, tuple[Method, dict[str, Any]]]
    operators: tuple[str, ...]
    steps: int
    k: tuple[float, ...]
    occlusion: bool
    seed: int
    max_bytes: int
    memory: Memory | None
    warm: set[str] = field(default_factory=set)

    def measures(self) -> tuple[str, ...]:
        """The names of all measures, in the report's order."""
        at_k = [f"{name}@{share:.3g}" for share in self.k for name in ("comprehensiveness", "sufficiency", "flips")]
        areas = ["deletion", "insertion", "deletion_share", "insertion_share", "between"]
        each = [*areas, *at_k, *["occlusion"] * self.occlusion]
        masked = [f"{name}/{operator}" for operator in self.operators for name in each]
        return ("between", *masked, "pointing", "energy", *CONTRAST, *(RANDOMISED if self.twin is not None else ()))

    def facts(self) -> dict[str, Any]:
        """What the numbers rest on."""
        return {
            "operators": list(self.operators),
            "steps": self.steps,
            "k": list(self.k),
            "seed": self.seed,
            "methods": {
                label: plain({**method.options, **options}) for label, (method, options) in self.methods.items()
            },
        }

    def key(self) -> list[Any]:
        """What tells these methods from others."""
        known = list(METHODS.values())
        said = [
            [label, "" if method in known else source_of(method.run)] for label, (method, _) in self.methods.items()
        ]
        return [*said, self.occlusion]

    def row(self, item: Checked, i: int, sane: bool) -> dict[str, Any]:
        """Everything about one item: values, chance levels and costs, as plain numbers."""
        with naming(item.name), torch.inference_mode(False), torch.no_grad():
            case = item.case(i, self.seed)
            made = {label: self.made(case, label) for label in self.methods}
            maps = torch.stack([values for values, _ in made.values()])
            found = {name: values for operator in self.operators for name, values in self.masked(case, maps, operator)}
            between = [found[f"between/{operator}"] for operator in self.operators]
            found["between"] = torch.stack(between).mean(0)
            chance = {f"occlusion/{operator}": 0.0 for operator in self.operators}
            if (mask := item.mask) is not None:
                found |= each_map(maps, of=lambda one: scoring.against(one, mask))
                chance |= dict.fromkeys(("pointing", "energy"), float(mask.double().mean()))
            if item.contrast is not None:
                found |= self.moved(item, item.contrast, maps, i)
                if item.mask is not None and item.contrast.mask is not None:
                    chance["contrast_moved"] = 0.0
                    chance["contrast_pointing"] = chance["pointing"] * float(item.contrast.mask.double().mean())
            if sane:
                found |= self.randomised(case, maps)
                chance["randomised"] = 0.0
        nan = torch.full((len(maps),), torch.nan).double()
        return {
            "items": torch.stack([found.get(name, nan) for name in self.measures()], 1).tolist(),
            "chance": [chance.get(name, torch.nan) for name in self.measures()],
            "costs": [costs for _, costs in made.values()],
        }

    def made(self, case: Case, label: str) -> tuple[Float[Tensor, " patch"], list[float]]:
        """One map, checked, and its `COSTS`; a method's first map is made before it, to warm up, and for its memory."""
        method, options = self.methods[label]

        def one() -> tuple[Case, Scores]:
            mine = replace(case, notes={}, passes={"forward": 0, "backward": 0})  # nothing that another map has made
            return mine, scores_of(mine, label, method, options)

        peak = None
        with naming(f"method {label!r}"):
            if label not in self.warm:
                one()
                peak = self.memory(one) if self.memory else cuda_peak(one, case.model.cfg.device)
                self.warm.add(label)
            wait_for(case.model.cfg.device)
            start = time.perf_counter()
            mine, scores = one()
            wait_for(case.model.cfg.device)
        seconds = time.perf_counter() - start
        passes = [float(mine.passes[way]) for way in ("forward", "backward")]
        return scores.values.flatten().double(), [*passes, seconds, torch.nan if peak is None else float(peak)]

    def masked(
        self, case: Case, maps: Float[Tensor, "map patch"], operator: str
    ) -> list[tuple[str, Float[Tensor, " map"]]]:
        """What runs with patches taken out say of all maps, by name."""
        n = maps.shape[1]
        ties = torch.randperm(
            n, generator=torch.Generator().manual_seed(int(digest(self.seed, "ties", case.number), 16))
        )
        orders = torch.stack([scoring.ordered(one, ties) for one in maps])
        run = Masking(case, operator, max_bytes=self.max_bytes).run  # type: ignore[arg-type]
        found = scoring.curves(run, orders, scoring.counts_of(n, self.steps, self.k), self.occlusion)
        if not bool(found.deletion.isfinite().all() and found.insertion.isfinite().all()):
            raise LensError(f"probabilities with patches taken out by {operator!r} are not finite")
        return [(f"{name}/{operator}", each) for name, each in scoring.faithfulness(found, maps, self.k).items()]

    def moved(self, item: Checked, other: Checked, maps: Float[Tensor, "map patch"], i: int) -> dict[str, Tensor]:
        """How the maps move when the second question is asked; the methods' random numbers stay."""
        with naming("contrast"):
            case = other.case(i, self.seed)
            second = torch.stack([self.made(case, label)[0] for label in self.methods])
        return each_map(maps, second, of=lambda a, b: scoring.contrasted(a, b, item.mask, other.mask))

    def randomised(self, case: Case, maps: Float[Tensor, "map patch"]) -> dict[str, Tensor]:
        """How much like the maps are those of the copy with randomised weights."""
        twins = replace(case, model=self.twin)
        with naming("with randomised weights"):
            second = torch.stack([self.made(twins, label)[0] for label in self.methods])
        alike = each_map(maps, second, of=lambda a, b: {"randomised": scoring.likeness(a, b)})
        return alike | {"randomised_size": alike["randomised"].abs()}


def each_map(
    *maps: Float[Tensor, "map patch"], of: Callable[..., dict[str, float]]
) -> dict[str, Float[Tensor, " map"]]:
    """Measures of every map (or pair of maps), by name."""
    rows = [of(*each) for each in zip(*maps, strict=True)]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they can be written into a file."""
    return {k: v if v is None or isinstance(v, bool | int | float | str) else repr(v) for k, v in options.items()}


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cuda_peak(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call held at most beyond what was held before, by torch's own count; None without CUDA."""
    if device.type != "cuda":
        return None
    wait_for(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    wait_for(device)
    return torch.cuda.max_memory_allocated(device) - before
