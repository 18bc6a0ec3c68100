"""One question about one picture, as every map sees it: which token is explained, where its patches are, what it cost.

Unusual: a map is a function from a `Case` to one number per patch; checking inputs, choosing the answer and counting
passes happen once, here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llava_lens.analysis.answers import Several, Word, tokens_of, told
from llava_lens.analysis.study import read, row_of
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.kernels import upcast
from llava_lens.roles import Roles


class Runs(NamedTuple):
    """What some runs say at the end of the prompt: the score explained, the answer's probability, the likeliest token.

    `score` is the answer's log-probability, or its logit minus the other answer's where there is one.
    """

    score: Float[Tensor, " run"]
    prob: Float[Tensor, " run"]
    choice: Int[Tensor, " run"]


@dataclass(eq=False)
class Case:
    """One row of inputs without its padding, the picture whose patches are scored, and the answer that is explained.

    `notes` gathers what a map has to say of itself, `passes` how many runs it took, forward and backward.
    """

    model: Any
    inputs: Inputs
    image: int
    token: int
    versus: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=lambda: {"forward": 0, "backward": 0})

    @classmethod
    def of(
        cls,
        model: Any,
        inputs: Any,
        answer: Word = None,
        versus: Word = None,
        *,
        row: int | None = None,
        image: int = 0,
        several: Several = None,
    ) -> Case:
        """Check everything once. The answer defaults to the model's own choice, which takes a run that is not counted.

        Raises `LensError` for inputs without that picture, several rows of which none is named, an answer of several
        tokens without `several="first"`, and words that are not in the vocabulary.
        """
        inputs = read(model, inputs)
        if row is None and inputs.batch_size != 1:
            raise LensError(f"a batch of {inputs.batch_size}; expected one row, or row= that says which")
        inputs = inputs.row(0 if row is None else row_of(inputs, row))
        roles = inputs.roles_of()
        if inputs.pixels is None or not roles.n_images:
            raise LensError("no picture: a map scores patches; make the inputs with model.prepare(question, image)")
        roles.picture(image)
        if several == "all":
            raise LensError(
                "several='all': a map explains one token; explain each in turn, with the ones before it in the prompt"
            )
        ids = None if answer is None else tokens_of(model, answer, several)
        other = None if versus is None else tokens_of(model, versus, several, "versus")[0]
        if ids is None:
            with torch.no_grad():
                ids = [int(model(inputs, logits_to_keep=1)[0, -1].argmax())]
        whole = None if answer is None else tokens_of(model, answer, "all")
        facts = told(model, ids, whole)
        if other is not None:
            facts |= {f"versus{name.removeprefix('answer')}": value for name, value in told(model, [other]).items()}
        return cls(model, inputs, image, ids[0], other, facts)

    @property
    def roles(self) -> Roles:
        """The row's roles."""
        return self.inputs.roles_of()

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.roles.grid(self.image)

    @cached_property
    def patches(self) -> list[int]:
        """The position of every patch, in reading order."""
        return self.roles.patch_positions(self.image).flatten().tolist()

    @property
    def last(self) -> int:
        """Where the answer is predicted."""
        return self.inputs.n_pos - 1

    def measure(self, logits: Float[Tensor, "run d_vocab"]) -> Runs:
        """Read runs from their logits at the last position; on the graph where they are."""
        logits = upcast(logits)
        log_p = logits.log_softmax(-1)
        score = log_p[:, self.token] if self.versus is None else logits[:, self.token] - logits[:, self.versus]
        return Runs(score, log_p[:, self.token].exp(), logits.argmax(-1))

    @cached_property
    def whole(self) -> Runs:
        """The run with the whole picture, counted when it is first asked for."""
        with torch.no_grad():
            self.count(forward=1)
            return self.measure(self.model(self.inputs, logits_to_keep=1)[:, -1])

    def count(self, forward: float = 0, backward: float = 0) -> None:
        """Note runs that were made."""
        self.passes["forward"] += forward
        self.passes["backward"] += backward

    def all_kept(self, n: int = 1) -> Bool[Tensor, "run patch"]:
        """`n` runs that keep every patch."""
        return torch.ones(n, len(self.patches), dtype=torch.bool)
