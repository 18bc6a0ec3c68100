"""Every promise of `model_battery` on every case of every family; the first case of a family in the fast suite."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from model_battery import PROMISES, Case

FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))


def cases() -> list[tuple[Case, bool]]:
    """All cases, with whether each is the first of its family."""
    return [(case, i == 0) for family in FAMILIES for i, case in enumerate(import_module(family).CASES)]


def promises() -> list[Any]:
    """Every promise of every case; the fast suite keeps those of a family's first, and one family's edits."""
    return [
        pytest.param(
            case, name, id=f"{name}-{case.name}", marks=() if _is_fast(case, first, name) else pytest.mark.slow
        )
        for case, first in cases()
        for name in PROMISES
    ]


def _is_fast(case: Case, first: bool, promise: str) -> bool:
    return first and (promise != "edits" or case.name == "llava-next-clip-llama")


@pytest.mark.parametrize("case, promise", promises())
def test_a_model_keeps_its_promises(case: Case, promise: str, tmp_path: Path) -> None:
    if promise in case.skip:
        pytest.skip(case.skip[promise])
    keep = PROMISES[promise]
    keep(case, tmp_path) if "folder" in inspect.signature(keep).parameters else keep(case)
