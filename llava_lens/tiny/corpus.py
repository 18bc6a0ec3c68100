"""Training sequences: scenes described in words or shown, asked about over several turns, as padded token batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from llava_lens.tiny.layout import BOS, EOS, IMAGE, IMAGE_SIZE, PAD, PATCH, build_tokenizer
from llava_lens.tiny.questions import Question, Said, questions, sentence
from llava_lens.tiny.vocabulary import COLORS, PLACES, SHAPES, words

N_IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
IGNORE = -100
KIND_WEIGHTS = {"color": 3.0, "shape": 2.0, "count": 1.5, "where": 2.0, "exists": 2.0}
TUNING_WEIGHTS = KIND_WEIGHTS | {"count": 5.0}  # what is learned last, in text as in pictures


_CONTENT = range(IMAGE + 1, len(words()))


class Example(NamedTuple):
    """Token ids and, for each, the id if it is to be learned, else `IGNORE`."""

    ids: list[int]
    labels: list[int]


@lru_cache(maxsize=1)
def _tokenizer():
    return build_tokenizer()


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    """Ids of a piece of text without `<s>`; pieces may be joined, since every word is one token."""
    return tuple(_tokenizer().encode(text, add_special_tokens=False))


def random_facts(rng: random.Random, n_objects: int | None = None, distinct: bool = False) -> tuple[Said, ...]:
    """2–4 described objects, no two of the same shape and colour, no two at the same place."""
    n = n_objects or rng.choice((2, 3, 4))
    places = rng.sample([place for row in PLACES for place in row], n)
    if distinct:
        shapes = rng.sample(SHAPES, n)
        return tuple(Said(s, rng.choice(tuple(COLORS)), w) for s, w in zip(shapes, places, strict=True))
    pairs = rng.sample([(s, c) for s in SHAPES for c in COLORS], n)
    return tuple(Said(s, c, w) for (s, c), w in zip(pairs, places, strict=True))


def pick(asked: Sequence[Question], rng: random.Random, kinds: dict[str, float] = KIND_WEIGHTS) -> Question:
    """One question: first its kind by weight, then among the kind's answers evenly, then any with that answer."""
    there = {q.kind for q in asked}
    weights = {kind: weight for kind, weight in kinds.items() if kind in there}
    kind = rng.choices(tuple(weights), tuple(weights.values()))[0]
    pool = [q for q in asked if q.kind == kind]
    if kind in ("count", "exists"):
        answer = rng.choice(sorted({q.answer for q in pool}))
        pool = [q for q in pool if q.answer == answer]
    return rng.choice(pool)


def copied(rng: random.Random) -> Example:
    """Any words at all: a passage said twice, or pairs ("the X is Y.") some of which are asked again.

    With many words and long lists there is far more to gain from looking back than scenes offer; the heads that look
    back form here within some hundred steps, and binding in scenes then starts from them.
    """
    if rng.random() < 0.4:
        passage = rng.choices(_CONTENT, k=rng.randint(10, 20))
        return Example([BOS, *passage, *passage], [IGNORE] * (len(passage) + 1) + passage)
    n = rng.randint(3, 8)
    drawn = rng.sample(_CONTENT, 2 * n)
    the, is_, stop = encode("the is .")
    ids = [BOS, *(t for x, y in zip(drawn[:n], drawn[n:], strict=True) for t in (the, x, is_, y, stop))]
    labels = [IGNORE] * len(ids)
    for _ in range(8):
        k = rng.randrange(n)
        ids += [the, drawn[k], is_, drawn[n + k], stop]
        labels += [IGNORE, IGNORE, IGNORE, drawn[n + k], IGNORE]
    return Example(ids, labels)


def recited(facts: Sequence[Said], rng: random.Random, turns: int, full: float) -> Example:
    """Statements, then some of them again, every token to be learned: what binding is learned from first.

    Objects are drawn with replacement and colours may repeat, so no answer follows from the answers before it.
    `full` is the share of sequences whose first half are whole sentences with places.
    """
    whole = rng.random() < full
    ids = [BOS]
    for fact in facts:
        ids += encode(sentence(fact) if whole else f"The {fact.shape} is {fact.color}.")
    asked = [q for q in questions(facts) if q.kind in ("color", "shape") or (whole and q.kind == "where")]
    asked = asked or list(questions(facts))
    for _ in range(turns):
        question = rng.choice(asked)
        short = question.stem.replace("color of the ", "") if question.kind == "color" else question.stem
        stem = short if rng.random() < 0.7 else question.stem
        ids += encode(f"{stem} {question.answer}.")
    return Example(ids, list(ids))


def conversation(
    facts: Sequence[Said],
    rng: random.Random,
    turns: int,
    *,
    picture: bool,
    stem: float = 0.25,
    kinds: dict[str, float] = KIND_WEIGHTS,
) -> Example:
    """`USER: … ASSISTANT: answer</s>` over several questions; only answers and `</s>` are to be learned.

    With probability `stem` an answer is the end of a full sentence whose start is given.
    """
    ids, labels = [BOS, *encode("USER:")], [IGNORE] * 3
    ids += [IMAGE] * N_IMAGE_TOKENS if picture else [t for fact in facts for t in encode(sentence(fact))]
    asked = questions(facts)
    for turn in range(turns):
        question = pick(asked, rng, kinds)
        prompt = f"{question.text} ASSISTANT:" if turn == 0 else f"USER: {question.text} ASSISTANT:"
        ids += encode(prompt)
        if rng.random() < stem:
            ids += encode(question.stem)
        labels += [IGNORE] * (len(ids) - len(labels))
        ids += [*encode(question.answer), EOS]
        labels += ids[len(labels) :]
    return Example(ids, labels)


def text_batch(rng: random.Random, size: int, progress: float) -> list[Example]:
    """The text stage's curriculum at `progress` in 0..1: copying, then reciting, then conversations about sentences."""
    copying = _ramp(progress, 0.29, 0.38, start=1.0, end=0.1)
    talking = _ramp(progress, 0.38, 0.61, start=0.0, end=0.8)
    batch = []
    for _ in range(size):
        if rng.random() < copying:
            batch.append(copied(rng))
        elif rng.random() < talking:
            batch.append(conversation(random_facts(rng), rng, 4, picture=False))
        else:
            batch.append(recited(random_facts(rng), rng, 6, full=0.2 + 0.75 * talking))
    return batch


def _ramp(progress: float, begin: float, finish: float, *, start: float, end: float) -> float:
    """Linear from `start` at `begin` to `end` at `finish`."""
    share = min(max((progress - begin) / (finish - begin), 0.0), 1.0)
    return start + (end - start) * share


def pad(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels `[batch, pos]`, padded on the right: causal attention never looks there, so no mask is needed."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), longest), PAD)
    labels = torch.full((len(batch), longest), IGNORE)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return ids, labels
