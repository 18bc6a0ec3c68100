"""Which token is explained, and at which position it is predicted: answers of one token or of several.

Unusual: an answer of several tokens is never cut short in silence. It is refused with both ways out, its first token
or all of them, and what was chosen is written into the result.
"""

from __future__ import annotations

import operator
from typing import Any, Literal, SupportsIndex

from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError
from llava_lens.sweep.metrics import ids_of

Word = SupportsIndex | str | None
"""An answer: a token id (numpy's and torch's too), a string, or None for the model's own choice."""
Several = Literal["first", "all"] | None
"""What to do with an answer of several tokens: score the first, add up all, or refuse."""


def check_several(several: Any) -> None:
    """Raise `LensError` for another way with answers of several tokens."""
    if several not in (None, "first", "all"):
        raise LensError(f"several={several!r}; expected 'first', 'all' or None")


def tokens_of(
    model: Any, answer: SupportsIndex | str, several: Several = None, what: str = "answer", alone: bool = False
) -> list[int]:
    """The token ids of an answer: one, unless `several="all"`; `alone` says that no caller could ask for several.

    Raises `LensError` for a string of several tokens without `several`, a word outside the vocabulary and an id that is
    not there.
    """
    check_several(several)
    if not isinstance(answer, str) and hasattr(answer, "__index__"):
        try:  # arrays and tensors have it, and raise unless they hold one whole number
            operator.index(answer)
        except TypeError:
            raise LensError(f"{what} {answer!r}; expected one token id or a string") from None
    ids = ids_of(model, answer, what)
    if len(ids) == 1 or several == "all":
        return ids
    if several == "first":
        return ids[:1]
    pieces = [model.token_string(i) for i in ids]
    raise LensError(
        f"{what} {answer!r} is {len(ids)} tokens {pieces}, expected one: "
        + (
            f"{pieces[0]!r} alone is answer={ids[0]}"
            if alone
            else f"several='first' scores {pieces[0]!r} alone, "
            "several='all' adds up all of them, each where it is predicted"
        )
    )


def predicted_at(cache: LlavaCache, row: int, position: int, ids: list[int]) -> list[tuple[int, int]]:
    """`(position, token)` for each token of an answer whose last one is predicted at `position` of the prompt.

    The tokens before it must stand in the prompt, up to `position`. Raises `LensError` where they do not.
    """
    if len(ids) == 1:
        return [(position, ids[0])]
    given = ids[:-1]
    first = position - len(given)
    if cache.inputs is None:
        raise LensError("several='all' needs the prompt's tokens, and this cache carries no inputs")
    there = cache.inputs.tokens[row, max(first + 1, 0) : position + 1].tolist()
    if first < 0 or there != given:
        said = "".join(cache.model.token_string(i) for i in given) if cache.model.processor is not None else given
        raise LensError(
            f"several='all' needs the answer's start in the prompt, up to position {position}: expected the tokens "
            f"{given} there, found {there}; prepare(question, image, answer={said!r}) puts them in"
        )
    return list(zip(range(first, position + 1), ids, strict=True))


def told(model: Any, ids: list[int], of: list[int] | None = None) -> dict[str, Any]:
    """What a result says of its answer: the word, the ids, and whether only the first of several tokens was scored."""
    word = None
    if model.processor is not None:
        word = model.tokenizer.decode(ids) if len(ids) > 1 else model.token_string(ids[0])
    facts: dict[str, Any] = {"answer": word, "answer_id": ids[0] if len(ids) == 1 else list(ids)}
    if of is not None and len(of) > len(ids):
        facts["scored"] = f"the first of {len(of)} tokens"
    return facts
