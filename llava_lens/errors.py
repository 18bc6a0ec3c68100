"""Errors that say what was given, what was expected and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LensError(ValueError):
    """Anything wrong with what the user asked for; the message says what to do."""


class UnknownHook(LensError, KeyError):
    """A hook or cache key that does not exist, or that did not fire in this run."""

    __str__ = LensError.__str__  # KeyError would print the message's repr


def nearest(given: str, known: Iterable[str], n: int = 3) -> str:
    """`"; nearest: 'a', 'b'"` for an error message, empty when nothing resembles `given`.

    >>> nearest("hook_patern", ["hook_pattern", "hook_z", "hook_pattern"])
    "; nearest: 'hook_pattern'"
    """
    close = difflib.get_close_matches(given, list(dict.fromkeys(known)), n=n, cutoff=0.6)
    return "; nearest: " + ", ".join(map(repr, close)) if close else ""
