"""Facts about a scene as sentences and as questions with one-word answers; the same for pictures and for text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from llava_lens.tiny.vocabulary import COLORS, NO, NUMBERS, PLURALS, SHAPES, YES

KINDS = ("color", "shape", "count", "where", "exists")


@runtime_checkable
class Fact(Protocol):
    """What questions need to know about one object."""

    @property
    def shape(self) -> str: ...
    @property
    def color(self) -> str: ...
    @property
    def where(self) -> str: ...


@runtime_checkable
class Described(Protocol):
    """Anything with objects, such as a scene."""

    @property
    def objects(self) -> Sequence[Fact]: ...


class Said(NamedTuple):
    """An object known from its description alone, without a picture."""

    shape: str
    color: str
    where: str


@dataclass(frozen=True)
class Question:
    """One question: its text, its one-word answer, and `stem`, the start of a sentence that the answer ends.

    `about` holds the indices of the objects that decide the answer, or None where no object does (absent things).
    """

    kind: str
    text: str
    answer: str
    stem: str
    about: tuple[int, ...] | None


def sentence(fact: Fact) -> str:
    """The facts of one object in one sentence.

    >>> sentence(Said("circle", "red", "top-left"))
    'The circle is red, at the top-left.'
    """
    return f"The {fact.shape} is {fact.color}, at the {fact.where}."


def questions(scene: Described | Sequence[Fact]) -> tuple[Question, ...]:
    """Every question that `scene` (or a sequence of its objects) answers without ambiguity, in a fixed order.

    Yes/no questions come as many with "yes" as with "no"; the first "no" asks for a colour that is there with a shape
    that is there, but not together.
    """
    facts = scene.objects if isinstance(scene, Described) else scene
    return (*_attributes(facts), *_counts(facts), *_existence(facts))


def _attributes(facts: Sequence[Fact]) -> list[Question]:
    found = []
    shapes, colors = [fact.shape for fact in facts], [fact.color for fact in facts]
    for i, (shape, color) in enumerate(zip(shapes, colors, strict=True)):
        if shapes.count(shape) == 1:
            stem, place = f"The color of the {shape} is", f"The {shape} is at the"
            found.append(Question("color", f"What is the color of the {shape}?", color, stem, (i,)))
            found.append(Question("color", f"What color is the {shape}?", color, stem, (i,)))
            found.append(Question("where", f"Where is the {shape}?", facts[i].where, place, (i,)))
        if colors.count(color) == 1:
            stem, place = f"The shape of the {color} object is", f"The {color} object is at the"
            found.append(Question("shape", f"What is the shape of the {color} object?", shape, stem, (i,)))
            found.append(Question("shape", f"What shape is the {color} object?", shape, stem, (i,)))
            found.append(Question("where", f"Where is the {color} object?", facts[i].where, place, (i,)))
    return found


def _counts(facts: Sequence[Fact]) -> list[Question]:
    shapes, colors = [fact.shape for fact in facts], [fact.color for fact in facts]
    asked = [("objects", tuple(range(len(facts))))]
    for color in _present_and_one_absent(colors, tuple(COLORS)):
        asked.append((f"{color} objects", tuple(i for i, c in enumerate(colors) if c == color)))
    for shape in _present_and_one_absent(shapes, SHAPES):
        asked.append((PLURALS[shape], tuple(i for i, s in enumerate(shapes) if s == shape)))
    return [
        Question("count", f"How many {what} are there?", NUMBERS[len(about)], f"The number of {what} is", about or None)
        for what, about in asked
    ]


def _existence(facts: Sequence[Fact]) -> list[Question]:
    """Pairs of a "yes" and a "no": colour with shape, shape alone, colour alone."""
    shapes, colors = [fact.shape for fact in facts], [fact.color for fact in facts]
    pairs = set(zip(colors, shapes, strict=True))
    crossed = [(c, s) for c in dict.fromkeys(colors) for s in dict.fromkeys(shapes) if (c, s) not in pairs]
    asked: list[tuple[str, tuple[int, ...] | None]] = []
    for (color, shape), wrong in zip(zip(colors, shapes, strict=True), crossed, strict=False):
        same = tuple(i for i, pair in enumerate(zip(colors, shapes, strict=True)) if pair == (color, shape))
        asked += [(f"{color} {shape}", same), (f"{wrong[0]} {wrong[1]}", None)]
    absent_shape, absent_color = _absent(shapes, SHAPES), _absent(colors, tuple(COLORS))
    asked.append((shapes[0], tuple(i for i, s in enumerate(shapes) if s == shapes[0])))
    asked.append((absent_shape, None))
    asked.append((f"{colors[-1]} object", tuple(i for i, c in enumerate(colors) if c == colors[-1])))
    asked.append((f"{absent_color} object", None))
    return [
        Question("exists", f"Is there {_a(what)} {what}?", YES if about else NO, "The answer is", about)
        for what, about in asked
    ]


def _a(what: str) -> str:
    return "an" if what[0] in "aeiou" else "a"


def _absent(present: Sequence[str], every: Sequence[str]) -> str:
    """One name that is not there; which one varies with what is there."""
    missing = [name for name in every if name not in present]
    return missing[sum(every.index(name) * (k + 2) for k, name in enumerate(present)) % len(missing)]


def _present_and_one_absent(present: Sequence[str], every: Sequence[str]) -> list[str]:
    return [*dict.fromkeys(present), _absent(present, every)]
