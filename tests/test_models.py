"""Every promise of `model_battery` on every case of every family; the first case of a family in the fast suite."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from model_battery import PROMISES, Case

FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))


def cases() -> list[Any]:
    found = []
    for family in FAMILIES:
        for i, case in enumerate(import_module(family).CASES):
            found.append(pytest.param(case, id=case.name, marks=[] if i == 0 else pytest.mark.slow))
    return found


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("promise", PROMISES)
def test_a_model_keeps_its_promises(case: Case, promise: str, tmp_path: Path) -> None:
    if promise in case.skip:
        pytest.skip(case.skip[promise])
    keep = PROMISES[promise]
    keep(case, tmp_path) if "folder" in inspect.signature(keep).parameters else keep(case)
