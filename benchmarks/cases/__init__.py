"""The cases, one file per subject: a module here with a list `CASES` is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.compare import Settings
from benchmarks.rows import LeftOut, Row

Found = Iterable[Row | LeftOut]
"""What a case gives, piece by piece, so that what came before an error is there."""


@dataclass(frozen=True)
class Case:
    """A name `subject/what`, one line on it, and the function that measures it."""

    name: str
    about: str
    run: Callable[[Settings], Found]


def every_case() -> list[Case]:
    """All cases of all modules in this folder, by name of the module."""
    modules = sorted(found.name for found in pkgutil.iter_modules(__path__))
    return [case for name in modules for case in importlib.import_module(f"{__name__}.{name}").CASES]


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases whose names begin with one of `names` (all for none); raises `ValueError` for a name without one."""
    cases = every_case()
    for name in names:
        if not any(case.name.startswith(name) for case in cases):
            raise ValueError(f"no case begins with {name!r}; there are {', '.join(case.name for case in cases)}")
    return [case for case in cases if not names or case.name.startswith(tuple(names))]
