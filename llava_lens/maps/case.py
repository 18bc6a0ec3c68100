"""One question about one picture, as every map sees it: which token is explained, where its patches are, what it cost.

Unusual: a map is a function from a `Case` to one number per patch; checking inputs, choosing the answer and counting
passes happen once, here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llava_lens.analysis.attribution.answers import Several, Word, tokens_of, told
from llava_lens.analysis.interventions.study import read, row_of
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs, copied
from llava_lens.kernels import upcast
from llava_lens.roles import Roles
from llava_lens.sweep.journal import digest

MAX_BYTES = 2**28
"""What the activations of one batch of runs may take."""


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

    `number` is the row's in its batch; random numbers come from it and from `seed`. `notes` gathers what a map has to
    say of itself, `counted` another unit than the method's, `closure` how far a sum misses that must close, `passes`
    how many runs it took, forward and backward.
    """

    model: Any
    inputs: Inputs
    image: int
    token: int
    versus: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    number: int = 0
    seed: int = 0
    progress: bool = False
    closure: float | None = None
    counted: str | None = None

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
        seed: int = 0,
        progress: bool = False,
    ) -> Case:
        """Check everything once. The answer defaults to the model's own choice, which takes a run that is not counted.

        Raises `LensError` for inputs without that picture, several rows of which none is named, an answer of several
        tokens without `several="first"`, and words that are not in the vocabulary.
        """
        inputs = read(model, inputs)
        if row is None and inputs.batch_size != 1:
            raise LensError(f"a batch of {inputs.batch_size}; expected one row, or row= that says which")
        number = 0 if row is None else row_of(inputs, row)
        inputs = inputs.row(number)
        roles = inputs.roles_of()
        if inputs.pixels is None or not roles.n_images:
            raise LensError("no picture: a map scores patches; make the inputs with model.prepare(question, image)")
        roles.picture(image)
        if several == "all":
            raise LensError(
                "several='all': a map explains one token; explain each in turn, with the ones before it in the prompt"
            )
        if inputs.pixels.is_inference():  # which no graph may hold
            inputs = replace(inputs, pixels=inputs.pixels.clone())
        ids = None if answer is None else tokens_of(model, answer, several)
        other = None if versus is None else tokens_of(model, versus, several, "versus")[0]
        if ids is None:
            with torch.no_grad():
                ids = [int(model(inputs, logits_to_keep=1)[0, -1].argmax())]
        whole = None if answer is None else tokens_of(model, answer, "all")
        facts = told(model, ids, whole)
        if other is not None:
            facts |= {f"versus{name.removeprefix('answer')}": value for name, value in told(model, [other]).items()}
        return cls(model, inputs, image, ids[0], other, facts, number=number, seed=seed, progress=progress)

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

    @property
    def picture(self) -> Float[Tensor, "channel height width"]:
        """The pixel values of the picture whose patches are scored."""
        assert self.inputs.pixels is not None
        return self.inputs.pixels[self.image]

    @property
    def unit(self) -> str:
        """What the score explained is counted in."""
        return "nats" if self.versus is None else "logits"

    def generator(self) -> torch.Generator:
        """Random numbers of this row and seed, on the CPU; the same each time."""
        return torch.Generator().manual_seed(int(digest(self.seed, self.number), 16))

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

    def count(self, forward: int = 0, backward: int = 0) -> None:
        """Note runs that were made."""
        self.passes["forward"] += forward
        self.passes["backward"] += backward

    def all_kept(self, n: int = 1) -> Bool[Tensor, "run patch"]:
        """`n` runs that keep every patch."""
        return torch.ones(n, len(self.patches), dtype=torch.bool)

    # Runs that go on from other pixels or from another stream; they are not counted here

    @cached_property
    def stream(self) -> Float[Tensor, "1 pos d_model"]:
        """What enters the first layer, made once; the tower alone runs for it."""
        with torch.no_grad():
            return self.model.embed_inputs(self.inputs)

    def from_stream(
        self, stream: Float[Tensor, "run pos d_model"], seen: Int[Tensor, "run pos"] | None = None
    ) -> Float[Tensor, "run d_vocab"]:
        """Logits at the last position of runs that start in the first layer; keys that are not `seen` are blocked."""
        mask = torch.ones(stream.shape[:2], dtype=torch.long, device=stream.device) if seen is None else seen
        n = len(stream)
        beside = (
            {"input_ids": self.inputs.tokens.repeat(n, 1), **copied(self.inputs.extras, n)}
            if self.model.follows_inputs
            else {}
        )
        return self.model(
            stream, start_at_layer=0, attention_mask=mask, position_ids=self.positions, logits_to_keep=1, **beside
        )[:, -1]

    @cached_property
    def positions(self) -> Tensor | None:
        """The rotary positions of the row, None where they are simply counted."""
        return self.model.positions(self.inputs)

    def through_blocks(
        self, x: Float[Tensor, "1 pos d_model"], first: int, last: int
    ) -> Float[Tensor, "1 pos d_model"]:
        """The stream before block `last`, given the one before block `first`."""
        return self.model.run_blocks(x, first, last, None, self.positions, None, self.inputs)

    @property
    def side(self) -> int:
        """Pixels along one side of a patch."""
        return self.model.cfg.vision.patch_size * self.model.cfg.vision.merge

    @cached_property
    def area(self) -> tuple[slice, slice]:
        """The rows and columns of pixels that the patches cover together."""
        (rows, cols), picture = self.grid, self.roles.picture(self.image)
        first = picture.box(0, 0, self.side)
        return tuple(slice(at.start, at.start + n * self.side) for at, n in zip(first, (rows, cols), strict=True))  # type: ignore[return-value]

    def from_pictures(self, pictures: Float[Tensor, "run channel height width"]) -> Float[Tensor, "run d_vocab"]:
        """Logits at the last position of runs that see other pictures in this one's place."""
        pixels, n = self.inputs.pixels, len(pictures)
        assert pixels is not None
        several = [pictures if i == self.image else pixels[i].expand_as(pictures) for i in range(len(pixels))]
        tokens = self.inputs.tokens.repeat(n, 1)
        pixels = torch.stack(several, 1).flatten(0, 1)
        inputs = replace(self.inputs, tokens=tokens, pixels=pixels, roles=None, extras=copied(self.inputs.extras, n))
        return self.model(inputs, logits_to_keep=1)[:, -1]

    def runs_at_once(self, pixels: bool = False, graph: bool = False, max_bytes: int = MAX_BYTES) -> int:
        """How many runs fit a budget: stream, projections, MLP and attention of one layer, or of all on the graph."""
        cfg, length = self.model.cfg.seeing(self.inputs.pixels), self.inputs.n_pos
        layer = length * (6 * cfg.d_model + 3 * cfg.d_mlp + cfg.n_heads * length)
        row = layer * (cfg.n_layers if graph else 1)
        if pixels and (vision := cfg.vision) is not None:
            layer = vision.n_ctx * (6 * vision.d_model + 3 * vision.d_mlp + vision.n_heads * vision.n_ctx)
            row += self.roles.n_images * layer * (vision.n_layers if graph else 1)
        return max(1, max_bytes // (self.model.embed.weight.element_size() * (row + 3 * cfg.d_vocab)))
