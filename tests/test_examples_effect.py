"""What the interventions page says of the embedded model holds, on fewer pairs than it was written from."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_lens.analysis import Scores

EXAMPLES = Path(__file__).parent.parent / "examples"
N = 24


@cache
def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def at(scores: Scores, layer: int, other: int | str) -> tuple[float, float]:
    """The interval of one cell."""
    column = scores.labels_of(scores.axes[1]).index(other)
    assert scores.low is not None and scores.high is not None
    return float(scores.low[layer, column]), float(scores.high[layer, column])


@pytest.mark.slow
def test_where_the_answer_sits():
    found = example("where_the_answer_sits").study(N)
    stream, attention, mlp = (found[hook] for hook in ("resid_pre", "attn_out", "mlp_out"))
    for layer in (0, 1):
        assert at(stream, layer, "its patches")[0] > 0.95
        assert all(abs(end) < 0.05 for name in ("other patches", "other words") for end in at(stream, layer, name))
    assert at(stream, 2, "its word")[0] > 0.7 and 0.1 < at(stream, 2, "last")[0] <= at(stream, 2, "last")[1] < 0.3
    assert at(stream, 3, "last")[0] > 0.95
    assert at(attention, 1, "its word")[0] > 0.7 and at(attention, 2, "last")[0] > 0.7
    assert float(mlp.values.max()) < 0.2


@pytest.mark.slow
def test_the_heads_that_move_it():
    found = example("heads_that_move_it").study(N)
    denoise, noise = found["denoise"], found["noise"]
    assert [entry.place for entry in denoise.top(1)] == [(1, 3)] == [e.place for e in noise.top(1, absolute=True)]
    assert at(denoise, 1, 3)[0] > 0.3 and at(noise, 1, 3)[1] < -0.3
    assert float(torch.cat((denoise.values[[0, 3]], noise.values[[0, 3]])).abs().max()) < 0.02
    both = torch.stack([denoise.values.flatten(), -noise.values.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.95


@pytest.mark.slow
def test_what_knockouts_cost():
    found = example("knock_out_attention").study(N)
    question, last, through = (found[edge] for edge in ("image → question", "image → last", "question → last"))
    assert all(scores.high is not None and scores.low is not None for scores in found.values())
    assert float(question.high[1]) < -0.15 and float(question.values[[0, 2, 3]].abs().max()) < 0.02  # type: ignore[index]
    assert float(last.values.abs().max()) < 0.03
    assert float(through.high[2]) < -0.15 and float(through.high[0]) < -0.8  # type: ignore[index]
