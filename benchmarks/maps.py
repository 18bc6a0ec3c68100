"""`python -m benchmarks.maps`: every map scored on held-out scenes of the embedded model, on wrong answers, on traps.

Unusual: it goes on where it was interrupted (`--work` keeps every finished item), and the JSON holds means, intervals
and differences, not the items.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import peak_bytes
from benchmarks.rows import machine
from llava_lens import HookedLlava
from llava_lens.maps.evaluate import MapItem, MapReport, Way, evaluate_maps
from llava_lens.maps.importance import METHODS
from llava_lens.maps.masking import OPERATORS
from llava_lens.maps.report import ARROWS, markdown
from llava_lens.maps.scoring import better
from llava_lens.tiny import questions, render_scene
from llava_lens.tiny.questions import Question
from llava_lens.tiny.scenes import Scene
from llava_lens.tiny.vocabulary import COLORS, SHAPES

FIRST = {"held_out": 4_000_000, "other_kinds": 7_000_000, "wrong": 8_000_000, "absent": 6_000_000}
"""The first scene of each set; training takes seeds from 0, its tests from 1,000,000, pairs from 3,000,000."""
ABOUT = {
    "held_out": "colour questions about one object of a scene; the contrast asks for another object's colour",
    "other_kinds": "questions that are not about colours, as many of each kind: how many, is there, what shape, where",
    "wrong": "questions of every kind that the model answers wrong, about objects that are there",
    "absent": "the colour of a shape that is not there, answered with a colour that is: the mask is the object of it",
}
SETTINGS: dict[str, Any] = {"steps": 5, "k": (0.05, 0.1, 0.2), "max_bytes": 2**24, "seed": 0}
CONTRASTS, SANITY, FEW = 60, 30, 25
"""How many scenes have a contrast, how many the randomised copy, and how many items the two other sets have."""
OTHERS, OTHER_KINDS = 100, ("count", "exists", "shape", "where")
"""How many questions of other kinds, and which."""
SCANNED = 2000
"""The most scenes that are looked through for one of the other sets."""
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lpi_top": [{"k": 1}, {"k": 10}],
    "occlusion": [{}, {"size": 3}],
    "rise": [{"n": 200}],
    "gradient": [{}, {"at": "embedding"}],
    "integrated_gradients": [
        {"steps": 32},
        {"at": "embedding", "steps": 32},
        {"at": "embedding", "steps": 32, "of": "prob"},
        {"at": "embedding", "steps": 4, "of": "prob"},
    ],
    "causal_tracing": [{"repeats": 3}],
}
"""Variants of a method, and options that keep the whole run in its budget; the other methods have their defaults."""


def methods() -> list[Way]:
    """Every method, with the options of this run."""
    return [(name, options) for name in METHODS for options in OPTIONS.get(name, [{}])]


def held_out(model: Any, n: int, contrasts: int) -> list[MapItem]:
    """One colour question for each scene, the first `contrasts` of those that have another one with that."""
    items: list[MapItem] = []
    for seed in range(FIRST["held_out"], FIRST["held_out"] + n):
        scene = render_scene(seed)
        asked = [question for question in questions(scene) if question.text.startswith("What is the color of")]
        first = item(model, scene, asked[0], f"scene {seed}")
        others = sorted(asked[1:], key=lambda other: other.answer == asked[0].answer)  # another colour where there is
        if others and contrasts:
            contrasts -= 1
            first = MapItem(first.inputs, mask=first.mask, name=first.name, contrast=item(model, scene, others[0]))
        items.append(first)
    return items


def item(model: Any, scene: Scene, question: Question, name: str = "") -> MapItem:
    """A question about objects, with all their pixels."""
    return MapItem(model.prepare(question.text, scene.image), mask=mask_of(scene, question.about or ()), name=name)


def other_kinds(model: Any, n: int) -> list[MapItem]:
    """One question for each scene, the kinds in turn."""
    items: list[MapItem] = []
    for seed in range(FIRST["other_kinds"], FIRST["other_kinds"] + n):
        scene, kind = render_scene(seed), OTHER_KINDS[seed % len(OTHER_KINDS)]
        asked = [question for question in questions(scene) if question.kind == kind]
        question = random.Random(seed).choice(asked)
        items.append(item(model, scene, question, f"scene {seed}: {question.text}"))
    return items


def mask_of(scene: Scene, about: Sequence[int]) -> Any:
    """The pixels of some objects, None for no object."""
    masks = [torch.from_numpy(scene.objects[i].mask) for i in about]
    return torch.stack(masks).any(0) if masks else None


def wrong(model: Any) -> Iterator[tuple[int, int, list[MapItem]]]:
    """For each scene how many questions were asked, how many answered wrong, and the first of these."""
    for seed in range(FIRST["wrong"], FIRST["wrong"] + SCANNED):
        scene = render_scene(seed)
        asked = [question for question in questions(scene) if question.about]
        failed = [q for q in asked if answer(model, q.text, scene) != q.answer]
        found = [item(model, scene, q, f"scene {seed}: {q.text} {q.answer}") for q in failed[:1]]
        yield len(asked), len(failed), found


def absent(model: Any) -> Iterator[tuple[int, int, list[MapItem]]]:
    """For each scene one trap: how many were asked, how many were answered with the colour of something there."""
    for seed in range(FIRST["absent"], FIRST["absent"] + SCANNED):
        scene = render_scene(seed)
        missing = [shape for shape in SHAPES if not scene.find(shape=shape)]
        text = f"What is the color of the {missing[seed % len(missing)]}?"
        said = answer(model, text, scene)
        there = scene.find(color=said) if said in COLORS else ()
        found = MapItem(
            model.prepare(text, scene.image), mask=mask_of(scene, there), name=f"scene {seed}: {text} {said}"
        )
        yield 1, int(bool(there)), [found] if there else []


@torch.no_grad()
def answer(model: Any, text: str, scene: Scene) -> str:
    """The likeliest next word."""
    logits = model(model.prepare(text, scene.image), logits_to_keep=1)
    return model.token_string(int(logits[0, -1].argmax())).strip()


def gathered(
    scenes: Iterator[tuple[int, int, list[MapItem]]], n: int, what: str
) -> tuple[list[MapItem], dict[str, int]]:
    """The first `n` items there are, and the counts of all scenes looked through for them."""
    items: list[MapItem] = []
    counts = {"scenes": 0, "asked": 0, "found": 0}
    with tqdm(total=n, desc=what, unit="item") as bar:
        for asked, found, new in scenes:
            counts = {
                "scenes": counts["scenes"] + 1,
                "asked": counts["asked"] + asked,
                "found": counts["found"] + found,
            }
            items += new
            bar.update(len(new))
            if len(items) >= n:
                break
    return items[:n], counts


def summary(report: MapReport) -> dict[str, Any]:
    """What the JSON holds of a report: all but the items."""
    means, to_best = report.means, report.differences()
    return {
        "method": report.method,
        "methods": report.methods,
        "measures": report.measures,
        "n": report.n,
        "best": {name: report.best(name) for name, n in report.n.items() if n},
        **{name: numbers(getattr(means, part)) for name, part in zip(MEANS, PARTS, strict=True)},
        **{f"to_best_{name}": numbers(getattr(to_best, part)) for name, part in zip(MEANS, PARTS, strict=True)},
        "chance": numbers(report.chances.values),
        "costs": numbers(report.cost.values),
    }


MEANS, PARTS = ("mean", "low", "high"), ("values", "low", "high")


OVERALL = ("between", *(f"between/{operator}" for operator in OPERATORS))
OF_OPERATORS = ("deletion", "insertion", "comprehensiveness@0.1", "sufficiency@0.1", "flips@0.1", "occlusion")
OF_MASKS = ("pointing", "energy", "contrast_pointing", "contrast_moved", "contrast_correlation", "randomised_size")


def text(found: dict[str, Any]) -> str:
    """The numbers to read, as markdown: for each set its counts and its main measures, then what a map costs."""
    parts = []
    for name, each in found["sets"].items():
        counts = ", ".join(f"{count} {what}" for what, count in each["counts"].items())
        parts += [f"### {name.replace('_', ' ').capitalize()}", f"{each['about'].capitalize()}. {counts}."]
        if "mean" in each:
            by_operator = [[f"{one}/{operator}" for one in OF_OPERATORS] for operator in OPERATORS]
            groups = [OVERALL, *(by_operator if each is found["sets"].get("held_out") else ()), OF_MASKS]
            parts += [table(each, names) for names in groups if any(map(each["n"].get, names))]
    costly, facts = next(each for each in found["sets"].values() if "costs" in each), found["machine"]
    rows = [
        [method, *("?" if v is None else f"{v * by:.4g}" for v, by in zip(costs, (1, 1, 1e3, 2**-20), strict=True))]
        for method, costs in zip(costly["methods"], costly["costs"], strict=True)
    ]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return "\n\n".join(
        [
            *parts,
            "### Cost of one map",
            markdown([["method", "forward", "backward", "milliseconds", "peak MiB"], *rows]),
            f"{facts['device']}; {facts['cpu']}, {facts['threads']} threads; {versions}; {facts['date']}. Peak: "
            f"{facts['peak_bytes']}. Median time of one map after a warm-up.",
        ]
    )


def table(each: dict[str, Any], names: Sequence[str]) -> str:
    """Means with their 95 % intervals; bold where the paired difference to the best holds 0."""
    places = [(each["measures"].index(name), name) for name in names if each["n"].get(name)]
    body = [["items", *(str(each["n"][name]) for _, name in places)]]
    for m, method in enumerate(each["methods"]):
        row = [method]
        for i, _ in places:
            mean, low, high, below, above = (
                each[part][m][i] for part in ("mean", "low", "high", "to_best_low", "to_best_high")
            )
            level = below is not None and below <= 0 <= above
            shown = "" if mean is None else f"**{mean:.3f}**" if level else f"{mean:.3f}"
            row.append(shown if low is None else f"{shown} [{low:.3f}, {high:.3f}]")
        body.append(row)
    chances = [each["chance"][i] for i, _ in places]
    if any(level is not None for level in chances):
        body.append(["chance", *("" if level is None else f"{level:.3f}" for level in chances)])
    return markdown([["method", *(f"{name} {ARROWS[better(name)]}" for _, name in places)], *body])


def numbers(values: Tensor) -> Any:
    """Numbers with five digits in nested lists, None where there is none."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        return None if math.isnan(value) else float(f"{value:.5g}")

    return plain(values.tolist())


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line, on one thread."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.maps", description=__doc__)
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes")
    parser.add_argument("--quick", action="store_true", help="2 scenes: does everything work?")
    parser.add_argument("--json", metavar="FILE", help="write the summary there")
    parser.add_argument("--sets", metavar="NAMES", default=",".join(ABOUT), help="only these, by comma (%(default)s)")
    parser.add_argument("--work", metavar="FOLDER", help="keep finished items there, and go on from them")
    given = parser.parse_args(argv)
    n, sanity = (2, 1) if given.quick else (given.scenes, SANITY)
    few, others = min(n, FEW), min(n, OTHERS)
    torch.set_num_threads(1)
    if given.work:
        Path(given.work).mkdir(parents=True, exist_ok=True)
    model = HookedLlava.tiny()
    makers: dict[str, Callable[[], tuple[list[MapItem], dict[str, int]]]] = {
        "held_out": lambda: (held_out(model, n, CONTRASTS), {"scenes": n}),
        "other_kinds": lambda: (other_kinds(model, others), {"scenes": others}),
        "wrong": lambda: gathered(wrong(model), few, "looking for wrong answers"),
        "absent": lambda: gathered(absent(model), few, "asking for what is not there"),
    }
    chosen = given.sets.split(",")
    if unknown := [name for name in chosen if name not in makers]:
        parser.error(f"no set {unknown[0]!r}; expected {', '.join(makers)}")
    found: dict[str, Any] = {"machine": machine("cpu"), "sets": {}}
    for name in chosen:
        items, counts = makers[name]()
        if not items:
            found["sets"][name] = {"about": ABOUT[name], "counts": counts}
            continue
        work = None if given.work is None else Path(given.work) / f"{name}.jsonl"
        report = evaluate_maps(
            model,
            items,
            methods(),
            sanity=sanity if name == "held_out" else False,
            memory=lambda run: peak_bytes(run, "cpu"),
            file=work,
            what=name,
            **SETTINGS,
        )
        found["sets"][name] = {"about": ABOUT[name], "counts": counts, **summary(report)}
        if given.json:
            Path(given.json).write_text(json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    print(text(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
