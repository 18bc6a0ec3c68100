"""Pairs of scenes that differ in one fact, the colour of the object that is asked about, for interventions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from llava_lens.tiny.questions import Question, questions
from llava_lens.tiny.scenes import Scene, render_scene
from llava_lens.tiny.vocabulary import COLORS

FIRST = 3_000_000
"""Scenes from this seed on were used neither in training nor in choosing any method."""


class Pair(NamedTuple):
    """A question about object `about` of two scenes in which it has another colour, and nothing else differs."""

    question: Question
    clean: Scene
    corrupt: Scene
    about: int

    @property
    def answer(self) -> str:
        """The right word for the clean scene."""
        return self.question.answer

    @property
    def other(self) -> str:
        """The right word for the corrupt scene."""
        return self.corrupt.objects[self.about].color


def color_pairs(n: int, first: int = FIRST) -> Iterator[Pair]:
    """`n` pairs, always the same for the same `first`: one per scene with an object whose colour can be asked.

    >>> pair = next(color_pairs(1))
    >>> pair.answer != pair.other, pair.clean.objects[pair.about].shape in pair.question.text
    (True, True)
    """
    found, seed = 0, first
    while found < n:
        scene, draw = render_scene(seed), random.Random(seed)
        asked = [q for q in questions(scene) if q.text.startswith("What is the color") and q.about is not None]
        seed += 1
        if not asked:
            continue
        question = draw.choice(asked)
        assert question.about is not None
        index = question.about[0]
        free = [color for color in COLORS if color not in {thing.color for thing in scene.objects}]
        yield Pair(question, scene, scene.recolored(index, draw.choice(free)), index)
        found += 1
