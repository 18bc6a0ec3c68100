"""LLaVA-1.5-7B finds the numbers that arXiv 2411.10950's authors published for one picture; for who has the weights.

Unusual: opt-in (`pytest -m real`). It needs LLAVA_LENS_7B, a folder or hub id of the checkpoint, and
LLAVA_LENS_COCO_219578, the path of COCO val2017's 000000219578.jpg, and is skipped without them.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from llava_lens import HookedLlava
from llava_lens.analysis import Scores, log_prob_increase, names_for

PROMPT = "USER: <image>\nWhat is the color of the dog?\nASSISTANT: The color of the dog is"
ANSWER = "brown"
HEADS = {(22, 27): 1.0399, (19, 6): 1.0166, (22, 17): 0.6654, (15, 19): 0.3564, (24, 3): 0.3344}
POSITIONS = {229: 0.1699, 276: 0.1476, 251: 0.1298}
"""Of head 22.27."""
PUBLISHED_EPS = 1e-6
"""Typed into the published norm; the checkpoint's is 1e-5. The increases are read with it here, the run is not."""
HALF = 0.02
"""Nats or part of the value, the larger: the published run was in half precision, with other kernels."""
NEEDED = ("LLAVA_LENS_7B", "LLAVA_LENS_COCO_219578")

pytestmark = pytest.mark.real


def measured(checkpoint: str, picture: str) -> tuple[Scores, Scores]:
    """The increase of every head, `[layer, head]`, and of every head × position."""
    cuda = torch.cuda.is_available()
    model = HookedLlava.from_pretrained(
        checkpoint, dtype=None if cuda else torch.float32, device="cuda" if cuda else "cpu"
    )
    inputs = model.prepare(PROMPT, picture, template=False)
    by = ("head", "position")
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=names_for(model, "head", by))
    model.cfg = replace(model.cfg, eps=PUBLISHED_EPS)
    return log_prob_increase(cache, ANSWER, "head", exact=True), log_prob_increase(cache, ANSWER, by)


def test_the_published_heads_and_positions_are_found() -> None:
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        pytest.skip(f"not set: {', '.join(missing)} (the 7B checkpoint, and COCO val2017's 000000219578.jpg)")
    heads, cells = measured(*(os.environ[name] for name in NEEDED))
    top = heads.top(len(HEADS))
    assert [entry.place for entry in top] == list(HEADS)
    assert [entry.value for entry in top] == pytest.approx(list(HEADS.values()), rel=HALF, abs=HALF)
    strongest = cells[{"layer": 22, "head": 27}].top(len(POSITIONS))
    assert [entry.place[0] for entry in strongest] == list(POSITIONS)
    assert [entry.value for entry in strongest] == pytest.approx(list(POSITIONS.values()), rel=HALF, abs=HALF)
