"""Many questions about one picture, at the price of one picture and the questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.interventions.study import read
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.sweep.base import Base
from llava_lens.sweep.rows import Row
from llava_lens.sweep.setting import FullBase
from llava_lens.sweep.sites import why_not


def ask(model: Any, inputs: Inputs | Sequence[Inputs]) -> Float[Tensor, "prompt d_vocab"]:
    """Logits at the last position of every prompt; what a prompt shares with the one before it is run once.

    `inputs` is a batch or a list of prompts, best with those about one picture side by side. A model that holds hooks
    of yours runs every prompt in full, hooks included. Raises `LensError` for inputs that the model cannot take.
    """
    batches = [read(model, each) for each in ([inputs] if isinstance(inputs, Inputs) else inputs)]
    if not batches:
        raise LensError("no prompt to ask; expected Inputs, or a list of them")
    rows = [Row.of(model, batch, i) for batch in batches for i in range(batch.batch_size)]
    short = why_not(model, front=True) is None
    found, before = [], None
    for row in rows:
        base = Base.of(model, row, like=before) if short else FullBase(model, row)
        found.append(base.logits([len(row.columns) - 1])[0])
        if before is not None:
            before.like = None  # a run keeps the one it began with, but not all before that
        before = base
    return torch.stack(found)
