"""Scenes are what they say they are: masks, boxes, sentences, questions, counterfactuals."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from llava_lens.tiny import COLORS, SHAPES, Question, Scene, questions, render_scene
from llava_lens.tiny.vocabulary import NUMBERS, PLACES, PLURALS

SEEDS = range(40)
SINGULAR = {plural: shape for shape, plural in PLURALS.items()}


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(scene.image).astype(int)


def test_scenes_are_the_same_everywhere():
    assert render_scene(3).text == "The triangle is blue, at the left. The star is red, at the right."
    assert render_scene(3) == render_scene(3) != render_scene(4)
    assert render_scene(3).image.tobytes() == render_scene(3).image.tobytes()


def test_scenes_vary():
    scenes = [render_scene(seed) for seed in range(300)]
    objects = [thing for scene in scenes for thing in scene.objects]
    assert {len(scene.objects) for scene in scenes} == {2, 3, 4}
    assert {o.shape for o in objects} == set(SHAPES) and len(SHAPES) >= 6
    assert {o.color for o in objects} == set(COLORS) and len(COLORS) >= 8
    assert {o.where for o in objects} == {place for row in PLACES for place in row}
    assert len({scene.ground.rgb for scene in scenes}) > 250


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_are_disjoint_and_show_the_drawn_colour(seed: int):
    scene = render_scene(seed)
    assert np.sum([thing.mask for thing in scene.objects], axis=0).max() == 1
    for thing in scene.objects:
        assert (pixels(scene)[thing.coverage == 1] == thing.rgb).all()
        nearest = min(COLORS, key=lambda name: np.abs(np.subtract(COLORS[name], thing.rgb)).sum())
        assert nearest == thing.color


@pytest.mark.parametrize("seed", SEEDS)
def test_the_masks_hold_everything_that_is_drawn(seed: int):
    scene = render_scene(seed)
    bare = pixels(Scene((), scene.ground))
    drawn = np.sum([thing.coverage for thing in scene.objects], axis=0) > 0
    assert (pixels(scene)[~drawn] == bare[~drawn]).all()
    changed = (pixels(scene) != bare).any(-1)
    inside = np.logical_or.reduce([thing.coverage == 1 for thing in scene.objects])
    assert changed[inside].mean() > 0.999


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_bound_their_masks(seed: int):
    for thing in render_scene(seed).objects:
        left, top, right, bottom = thing.box
        assert thing.mask[top:bottom, left:right].sum() == thing.mask.sum()
        for edge in (thing.mask[top], thing.mask[bottom - 1], thing.mask[:, left], thing.mask[:, right - 1]):
            assert edge.any()
        assert abs((left + right) / 2 - thing.center[0]) < 1.5 and abs((top + bottom) / 2 - thing.center[1]) < 1.5


@pytest.mark.parametrize("seed", SEEDS)
def test_sentences_say_what_the_masks_show(seed: int):
    scene = render_scene(seed)
    assert scene.text == " ".join(scene.sentences)
    for said, thing in zip(scene.sentences, scene.objects, strict=True):
        left, top, right, bottom = thing.box
        row, column = int((top + bottom) / 2 // (256 / 3)), int((left + right) / 2 // (256 / 3))
        assert said == f"The {thing.shape} is {thing.color}, at the {PLACES[row][column]}."


def test_shapes_differ_from_each_other():
    scene = render_scene(5)
    upright = [scene.reshaped(0, shape).objects[0].mask for shape in SHAPES]
    for i, one in enumerate(upright):
        for other in upright[:i]:
            assert (one & other).sum() / (one | other).sum() < 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_a_counterfactual_differs_in_one_fact(seed: int):
    scene = render_scene(seed)
    color = next(c for c in COLORS if c not in {o.color for o in scene.objects})
    there = scene.objects[0].coverage > 0
    for other in (scene.recolored(0, color), scene.removed(0), scene.reshaped(0, _another(scene.objects[0].shape))):
        beyond = there if len(other.objects) < len(scene.objects) else there | (other.objects[0].coverage > 0)
        changed = (pixels(scene) != pixels(other)).any(-1)
        assert changed.any() and not changed[~beyond].any()
    assert scene.recolored(0, color).sentences[1:] == scene.sentences[1:] == scene.removed(0).sentences
    assert scene.recolored(0, color).objects[0].color == color


def _another(shape: str) -> str:
    return SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)]


def test_swapping_colours_exchanges_two_facts():
    scene = render_scene(11, 3, distinct=True)
    swapped = scene.swapped(0, 2)
    assert [o.color for o in swapped.objects] == [scene.objects[i].color for i in (2, 1, 0)]
    assert [o.mask.tobytes() for o in swapped.objects] == [o.mask.tobytes() for o in scene.objects]


def test_moving_keeps_all_but_the_place():
    scene = render_scene(1, 1)
    moved = scene.moved(0, (60.0, 60.0))
    assert moved.objects[0].where == "top-left" and moved.objects[0].color == scene.objects[0].color
    with pytest.raises(ValueError, match=r"\(5, 5\) is not free for object 0"):
        scene.moved(0, (5, 5))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="n_objects is 7; a scene holds 1 to 4"):
        render_scene(0, 7)
    with pytest.raises(ValueError, match="unknown color 'mauve'; known are red, orange"):
        render_scene(0).recolored(0, "mauve")


def test_what_is_fixed_stays_fixed():
    for seed in SEEDS:
        scene = render_scene(seed, 4, distinct=True)
        assert len({o.shape for o in scene.objects}) == len({o.color for o in scene.objects}) == 4


def answer_by_reading(text: str, facts: list[tuple[str, str, str]]) -> set[str]:
    """The answers to a question that (shape, colour, place) facts allow, worked out from its words alone."""
    words = re.findall(r"[a-z-]+", text.lower())
    wanted_shape = next((SINGULAR.get(w, w) for w in words if w in SHAPES or w in SINGULAR), None)
    wanted_color = next((w for w in words if w in COLORS), None)
    fitting = [f for f in facts if wanted_shape in (None, f[0]) and wanted_color in (None, f[1])]
    if words[:2] == ["how", "many"]:
        return {NUMBERS[len(fitting)]}
    if words[:2] == ["is", "there"]:
        return {"yes" if fitting else "no"}
    return {fact[2 if words[0] == "where" else 1 if "color" in words else 0] for fact in fitting}


@pytest.mark.parametrize("seed", SEEDS)
def test_questions_have_the_one_right_answer(seed: int):
    scene = render_scene(seed)
    facts = [(o.shape, o.color, o.where) for o in scene.objects]
    asked = questions(scene)
    assert {q.kind for q in asked} == {"color", "shape", "count", "where", "exists"}
    for question in asked:
        assert answer_by_reading(question.text, facts) == {question.answer}, question
        if question.kind in ("color", "shape", "where"):
            assert question.about is not None and len(question.about) == 1
            assert question.answer in facts[question.about[0]]
        if question.kind == "count":
            assert question.answer == NUMBERS[len(question.about or ())]
        if question.kind == "exists":
            assert (question.about is None) == (question.answer == "no")


@pytest.mark.parametrize("seed", SEEDS)
def test_yes_and_no_are_asked_alike(seed: int):
    told = [q.answer for q in questions(render_scene(seed)) if q.kind == "exists"]
    assert told.count("yes") == told.count("no")


def test_a_stem_leads_to_the_answer():
    by_kind: dict[str, Question] = {q.kind: q for q in questions(render_scene(3))}
    assert by_kind["color"].stem == "The color of the star is"
    assert by_kind["shape"].stem == "The shape of the red object is"


def test_questions_follow_the_scene_when_it_changes():
    rng = random.Random(0)
    for seed in SEEDS:
        scene = render_scene(seed, 3, distinct=True)
        i = rng.randrange(3)
        color = next(c for c in COLORS if c not in {o.color for o in scene.objects})
        before = next(q for q in questions(scene) if q.kind == "color" and q.about == (i,))
        after = next(q for q in questions(scene.recolored(i, color)) if q.text == before.text)
        assert (before.answer, after.answer) == (scene.objects[i].color, color)
