"""Words of a prompt for others, token for token.

Unusual: the tokenizer is asked about a word behind what stands before it, since its pieces depend on that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.roles import Roles
from llava_lens.sweep.rows import Row

Span = tuple[int, int]
Changed = list[tuple[int, Span]]
"""Tokens, each with its place in the text."""


class Word(NamedTuple):
    """An occurrence of a word: its place in the text, the positions it touches, and what is to stand there."""

    span: Span
    touched: list[int]
    new: str


def swapped(tokenizer: Any, row: Row, words: Mapping[str, str]) -> Inputs:
    """A row with words (in lower case) of its question for others; `corruptions.text_swap` says more."""
    tokens = row.inputs.tokens.clone()
    (roles,) = require(row.inputs, words, any)
    for word in reversed(_found(roles, words)):  # from the end, so that earlier places stay
        at, changed, text = _retold(tokenizer, roles, tokens[0].tolist(), word)
        ids, places = zip(*changed, strict=True)
        tokens[0, at] = torch.tensor(ids, device=tokens.device)
        roles = _with(roles, at, tokenizer.convert_ids_to_tokens(list(ids)), places, text)
    return replace(row.inputs, tokens=tokens, roles=(roles,))


def require(inputs: Inputs, words: Iterable[str], which: Callable[[Iterable[bool]], bool] = all) -> tuple[Roles, ...]:
    """The rows' roles; raises `LensError` unless all words (or any) are said in one of the rows, naming the nearest."""
    if inputs.roles is None or not all(roles.spans for roles in inputs.roles):
        raise LensError("these inputs carry no text; make them with model.prepare to swap words")
    missing = {old: error for old in words for error in [_missing(inputs.roles, old)] if error is not None}
    if not which(old not in missing for old in words):
        raise next(iter(missing.values()))
    return inputs.roles


def _missing(rows: Sequence[Roles], word: str) -> LensError | None:
    found = None
    for roles in rows:
        try:
            roles.positions_of(word)
            return None
        except LensError as error:
            found = found or error
    return found


def _found(roles: Roles, words: Mapping[str, str]) -> list[Word]:
    """Every occurrence in the question or the given answer, in order."""
    found = []
    longest_first = "|".join(re.escape(old) for old in sorted(words, key=len, reverse=True))
    for match in re.finditer(rf"(?<!\w)(?:{longest_first})(?!\w)", roles.text, re.IGNORECASE):
        first, stop = match.span()
        touched = [i for i, (start, end) in enumerate(roles.spans) if start < min(end, stop) and first < end]
        if touched and all(roles.labels[i] in ("question", "answer", "text") for i in touched):
            new = words[match.group().lower()]
            capital = match.group()[0].isupper()
            found.append(Word(match.span(), touched, new[0].upper() + new[1:] if capital else new))
    return found


def _retold(tokenizer: Any, roles: Roles, ids: list[int], word: Word) -> tuple[list[int], Changed, str]:
    """The positions whose tokens change with a word, what they become, and the whole text with it.

    A mark for the space in front of a word can be a token of its own, which changes with it.
    """
    start, end = roles.spans[word.touched[0]][0], roles.spans[word.touched[-1]][1]
    old, said = roles.text[start:end], roles.text[slice(*word.span)]
    new = roles.text[start : word.span[0]] + word.new + roles.text[word.span[1] : end]
    before = roles.text[roles.spans[word.touched[0] - 1][0] : start] if word.touched[0] else ""
    for context in (before, " ", ""):
        was, now = (_pieces(tokenizer, context + chunk) for chunk in (old, new))
        most = max(0, len(was) - len(word.touched))
        same = next((i for i in range(min(most, len(now))) if was[i][0] != now[i][0]), min(most, len(now)))
        first = word.touched[-1] + 1 - (len(was) - same)
        changing = list(range(first, word.touched[-1] + 1))
        if first < 0 or first > word.touched[0] or [ids[at] for at in changing] != [i for i, _ in was[same:]]:
            continue
        _refuse(tokenizer, said, word.new, *([i for i, _ in each[same:]] for each in (was, now)))
        shift = start - len(context)
        changed = [(i, (a + shift, b + shift)) for i, (a, b) in now[same:]]
        return changing, changed, roles.text[:start] + new + roles.text[end:]
    raise LensError(
        f"cannot tell the tokens of {said!r} from its neighbours'; prepare the other prompt for pair(other)"
    )


def _pieces(tokenizer: Any, text: str) -> Changed:
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(zip(out["input_ids"], map(tuple, out["offset_mapping"]), strict=True))


def _refuse(tokenizer: Any, old: str, new: str, was: list[int], now: list[int]) -> None:
    if tokenizer.unk_token_id in now:
        raise LensError(f"{new!r} for {old!r}: a word that the tokenizer does not know")
    if len(now) != len(was):
        one, other = (
            f"{len(ids)} token{'s' * (len(ids) != 1)} {tokenizer.convert_ids_to_tokens(ids)}" for ids in (was, now)
        )
        raise LensError(f"{old!r} is {one}, {new!r} {other}; expected as many, so that positions stay")


def _with(roles: Roles, at: list[int], strings: Sequence[str], places: Sequence[Span], text: str) -> Roles:
    """The roles with other tokens at some positions, and all that follows moved."""
    shift, end = len(text) - len(roles.text), roles.spans[at[-1]][1]
    spans = [(a + shift, b + shift) if a >= end else (a, b) for a, b in roles.spans]
    tokens = list(roles.tokens)
    for position, string, place in zip(at, strings, places, strict=True):
        spans[position] = place
        if tokens:
            tokens[position] = string
    return replace(roles, tokens=tuple(tokens), spans=tuple(spans), text=text)
