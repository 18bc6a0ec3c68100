"""On the embedded model the map points at the object that is asked about, and moves with the question."""

from __future__ import annotations

import random
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_lens import HookedLlava
from llava_lens.analysis import log_prob_increase, mean_attention, names_for
from llava_lens.tiny import questions, render_scene
from llava_lens.tiny.evaluate import HELD_OUT, wilson

N_PAIRS, BATCH = 240, 40
FIRST = HELD_OUT + 50_000
"""Scenes that neither training nor the choice of the map has seen."""


class Pair(NamedTuple):
    """One scene asked about two of its objects: each map's strongest patch, each object's patches, right answers."""

    strongest: tuple[int, int]
    attended: tuple[int, int]
    objects: tuple[Tensor, Tensor]
    right: tuple[bool, bool]


def scenes(n: int) -> list[tuple[Any, list[Any]]]:
    """The first `n` held-out scenes with two objects whose colour can be asked, and these two questions."""
    found, seed = [], FIRST
    while len(found) < n:
        scene = render_scene(seed)
        asked = [q for q in questions(scene) if q.kind == "color" and q.text.startswith("What is")]
        random.Random(seed).shuffle(asked)
        found += [(scene, asked[:2])] if len(asked) > 1 else []
        seed += 1
    return found


@cache
def pairs() -> list[Pair]:
    model = HookedLlava.tiny()
    names = names_for(model, "position")
    found = []
    every = scenes(N_PAIRS)
    for start in range(0, N_PAIRS, BATCH):
        part = every[start : start + BATCH]
        asked = [question for _, both in part for question in both]
        pictures = [scene.image for scene, both in part for _ in both]
        inputs = model.prepare([question.text for question in asked], pictures)
        with torch.no_grad():
            logits, cache = model.run_with_cache(inputs, names_filter=names)
        maps = log_prob_increase(cache, by="position").over_image().values.flatten(1)
        looks = mean_attention(cache).over_image().values.flatten(1)
        words = [model.token_string(int(row[-1].argmax())) for row in logits]
        for i, (scene, both) in enumerate(part):
            rows = slice(2 * i, 2 * i + 2)
            roles = inputs.roles_of(2 * i)
            objects = tuple(roles.patches_of_mask(scene.objects[q.about[0]].mask).flatten() for q in both)
            right = tuple(word == q.answer for word, q in zip(words[rows], both, strict=True))
            strongest, attended = tuple(maps[rows].argmax(-1).tolist()), tuple(looks[rows].argmax(-1).tolist())
            found.append(Pair(strongest, attended, objects, right))  # type: ignore[arg-type]
    return found


def rate(name: str, hits: list[bool]) -> tuple[float, float]:
    """Prints a rate with Wilson's 95 % interval (`pytest -s` shows it); returns the interval."""
    low, high = wilson(sum(hits), len(hits))
    print(f"{name}: {sum(hits) / len(hits):.1%} ({low:.1%} – {high:.1%}) of {len(hits)}")
    return low, high


def test_the_strongest_patch_lies_on_the_asked_object() -> None:
    found = pairs()
    assert sum(pair.right[0] for pair in found) > 0.9 * len(found)
    chance = sum(float(pair.objects[0].float().mean()) for pair in found) / len(found)
    on = [bool(pair.objects[0][pair.strongest[0]]) for pair in found]
    low, _ = rate(f"strongest patch on the asked object, by chance {chance:.1%}", on)
    assert 0.05 < chance < 0.25 and low > 0.8


def test_the_strongest_patch_moves_when_the_other_object_is_asked() -> None:
    found = pairs()
    moved = [all(bool(pair.objects[i][pair.strongest[i]]) for i in range(2)) for pair in found]
    crossed = [bool(pair.objects[1][pair.strongest[0]]) for pair in found]
    low, _ = rate("on the one object, then on the other", moved)
    _, high = rate("on the object that was not asked about", crossed)
    assert low > 0.75 and high < 0.15


def test_mean_attention_shows_it_less_often() -> None:
    found = pairs()
    moved = [all(bool(pair.objects[i][pair.strongest[i]]) for i in range(2)) for pair in found]
    attended = [all(bool(pair.objects[i][pair.attended[i]]) for i in range(2)) for pair in found]
    rate("most attended patch on the one object, then on the other", attended)
    assert sum(moved) > sum(attended)
