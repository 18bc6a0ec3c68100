"""What the tests of the benchmarks share: the toy size, its tolerance, and a study's weights in float64."""

from __future__ import annotations

import copy
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.models import SIZES
from llava_lens import HookedLlava

TOY = SIZES["toy"]
LOOSE = {"rtol": 0, "atol": 2e-5}
"""float32 against float64 or against another order of sums, for logits of size 1 to 10."""


@lru_cache
def exact_of(study: Any) -> HookedLlava:
    """All weights in float64 at once."""
    return HookedLlava.from_hf(copy.deepcopy(study.hf).double())
