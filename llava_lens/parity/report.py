"""What a parity check found: weights, stages in the order of the forward, generated tokens; as table and JSON.

Unusual: a stage has two differences: in the run as it is, and `alone`, fed what Hugging Face's stage was fed. The first
shows where two runs part, the second which stages are at fault and which only pass a difference on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

SHOWN = 5  # names in one line
HINTS = {
    "text": "compare the embedding matrix and its scale",
    "tower start": "compare pixels, patch and position embeddings, and the norm in front of the blocks",
    "tower block": "compare that block's norms, attention and MLP",
    "features": "compare which tower layers and positions are read, and a norm behind the tower",
    "projector": "compare the projector's activation, biases and layer order",
    "splice": "compare the places that pictures take, and the scale of features and embeddings",
    "block": "compare that block's norms, attention and MLP",
    "norm": "compare the final norm's epsilon and gain",
    "logits": "compare the unembedding and what scales or caps the logits",
}
"""Kind of stage → where to look when it is the first to differ; `SHARED` when all of the kind do by themselves."""
SHARED = {"block": "rotary angles, the mask, norm epsilon, activation", "tower block": "norm epsilon, activation, mask"}

ROUNDINGS = 16
"""Differences up to so many machine epsilons, relative to a stage's largest value, are said to look like rounding."""
OTHER_KERNELS = "another dtype, device, attention implementation or path may be the cause"


@dataclass(frozen=True)
class Difference:
    """Between two tensors: the largest absolute one, and that over the largest value of Hugging Face's tensor."""

    absolute: float
    relative: float
    equal: bool
    """Whether all is equal to the bit, dtype included."""


@dataclass(frozen=True)
class Stage:
    """One stage beside Hugging Face's. `skipped` says why it was not compared; both differences are then None.

    `ours` is a hook or a module, `theirs` a module's output, or `input of` a module.
    """

    name: str
    kind: str
    ours: str
    theirs: str = ""
    shape: tuple[int, ...] = ()
    their_shape: tuple[int, ...] = ()
    difference: Difference | None = None
    alone: Difference | None = None
    skipped: str = ""

    @property
    def differs(self) -> bool:
        """Whether it was compared and is not bit-equal."""
        return self.difference is not None and not self.difference.equal

    @property
    def differs_alone(self) -> bool:
        """Whether it differs although it was fed what Hugging Face's stage was fed."""
        return self.alone is not None and not self.alone.equal

    @property
    def verdict(self) -> str:
        """`equal`; `differs`, by itself; or `follows` from an earlier stage."""
        return "differs" if self.differs_alone else "follows" if self.differs else "equal"

    @property
    def shown_shape(self) -> str:
        """Our shape, and Hugging Face's where it is another."""
        ours, theirs = ("×".join(map(str, shape)) for shape in (self.shape, self.their_shape))
        return ours if ours == theirs else f"{ours} | {theirs}"


@dataclass(frozen=True)
class Weight:
    """A parameter that differs from the published one of the key that the rename table gives."""

    name: str
    key: str
    difference: Difference


@dataclass(frozen=True)
class Weights:
    """The parameters compared, those that differ, and keys that stand on one side only.

    `unknown` are Hugging Face's keys that no rule names, `homeless` those for which the model has no place, `unmatched`
    our parameters for which Hugging Face has no key. Tower layers that are not built are `not_built`.
    """

    n_equal: int
    differing: tuple[Weight, ...] = ()
    unknown: tuple[str, ...] = ()
    homeless: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    not_built: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generation:
    """New tokens of every row, ours and Hugging Face's; `skipped` says why none were compared."""

    ours: tuple[tuple[int, ...], ...] = ()
    theirs: tuple[tuple[int, ...], ...] = ()
    skipped: str = ""

    @property
    def equal(self) -> bool:
        return self.ours == self.theirs

    @property
    def first_difference(self) -> tuple[int, int] | None:
        """Row and step of the first other token, in reading order."""
        for row, (ours, theirs) in enumerate(zip(self.ours, self.theirs, strict=True)):
            if ours != theirs:
                return row, next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        return None


@dataclass(frozen=True)
class ParityReport:
    """What `check_parity` found; `print` shows it as a table. `rounding` is the coarser dtype's machine epsilon."""

    title: str
    rounding: float
    stages: tuple[Stage, ...]
    weights: Weights
    generation: Generation
    silent: tuple[str, ...] = ()
    """Hooks that the run never reached: an edit there would have no effect."""

    @property
    def compared(self) -> tuple[Stage, ...]:
        """The stages that were compared."""
        return tuple(stage for stage in self.stages if stage.difference is not None)

    @property
    def first_difference(self) -> Stage | None:
        """The first stage that is not bit-equal, in the order of the forward."""
        return next((stage for stage in self.stages if stage.differs), None)

    @property
    def at_fault(self) -> tuple[Stage, ...]:
        """The stages that differ although they were fed what Hugging Face's were fed."""
        return tuple(stage for stage in self.stages if stage.differs_alone)

    @property
    def is_equal(self) -> bool:
        """Whether every weight, stage and generated token that was compared is bit-equal."""
        return not self.weights.differing and self.first_difference is None and self.generation.equal

    def close(self, tolerance: float) -> bool:
        """Whether all weights and stages differ by at most `tolerance`, relative to the largest value of each.

        Generated tokens do not count: a rounding decides between two words that are equally likely.
        """
        differences = [stage.difference for stage in self.compared] + [w.difference for w in self.weights.differing]
        return all(difference is not None and difference.relative <= tolerance for difference in differences)

    @cached_property
    def summary(self) -> str:
        """A few sentences: the first difference, what is at fault, and where to look."""
        lines = [f"Weights: {_weights_differ(self.weights)}."] if self.weights.differing else []
        first = self.first_difference
        if first is None:
            lines.append(f"All {len(self.compared)} stages compared are bit-equal.")
        else:
            before = self.compared[: self.compared.index(first)]
            agreed = f"; up to it agree: {_names(before)}" if before else ""
            lines.append(f"First difference: {first.name} (relative {_number(first.difference)}){agreed}.")
            lines += self._fault(first)
        if not self.generation.equal:
            lines.append(f"Generated tokens differ: {_tokens_differ(self.generation)}.")
        return "\n".join(lines)

    def _fault(self, first: Stage) -> list[str]:
        fault = self.at_fault
        follow = [stage for stage in self.compared if stage.verdict == "follows"]
        lines = [f"By itself differs: {_names(fault)}." if fault else "No stage differs by itself."]
        if len(fault) > 1:
            worst = max(fault, key=lambda stage: stage.alone.relative if stage.alone else 0.0)
            lines[0] += f" Most: {worst.name} (relative {_number(worst.alone)})."
        lines += [f"Follows from earlier stages: {_names(follow)}."] if follow else []
        return [*lines, f"Hint: {self._hint(first)}."]

    def _hint(self, first: Stage) -> str:
        if all(stage.alone and stage.alone.relative <= ROUNDINGS * self.rounding for stage in self.at_fault):
            return f"within {ROUNDINGS} roundings of the dtype; {OTHER_KERNELS}"
        alike = [stage for stage in self.compared if stage.kind == first.kind]
        if first.kind in SHARED and len(alike) > 1 and all(stage.differs_alone for stage in alike):
            return f"every {first.kind} differs by itself; compare what all share: {SHARED[first.kind]}"
        return HINTS[first.kind]

    def __str__(self) -> str:
        parts = [self.title, *_weight_lines(self.weights), "", *self._table()]
        skipped = [stage for stage in self.stages if stage.skipped]
        for why, stages in groupby(skipped, key=lambda stage: stage.skipped):
            parts.append(f"not compared: {_names(list(stages))}: {why}")
        tokens = self.generation
        n = max(map(len, tokens.ours), default=0)
        said = f"{n} tokens in each of {len(tokens.ours)} rows are equal" if tokens.equal else _tokens_differ(tokens)
        parts.append(f"generation: {f'not compared: {tokens.skipped}' if tokens.skipped else said}")
        parts += [f"hooks that never fired: {_some(self.silent)}"] if self.silent else []
        return "\n".join([*parts, "", self.summary])

    def _table(self) -> list[str]:
        head = ("", "stage", "ours", "Hugging Face", "shape", "max diff", "relative", "by itself", "")
        rows: list[tuple[str, ...]] = [head]
        for stage in self.compared:
            difference, mark = stage.difference, "→" if stage is self.first_difference else ""
            numbers = (_number(difference, "absolute"), _number(difference), _number(stage.alone), stage.verdict)
            rows.append((mark, stage.name, stage.ours, stage.theirs, stage.shown_shape, *numbers))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        sides = "<<<<<>>><"
        aligned = (
            [f"{cell:{side}{width}}" for side, cell, width in zip(sides, row, widths, strict=True)] for row in rows
        )
        return ["  ".join(cells).rstrip() for cells in aligned]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; a difference that is not finite becomes None."""
        first = self.first_difference
        facts = {name: asdict(getattr(self, name)) for name in ("weights", "generation")}
        return _plain(
            {
                "title": self.title,
                "rounding": self.rounding,
                "is_equal": self.is_equal,
                "first_difference": first.name if first else None,
                "at_fault": [stage.name for stage in self.at_fault],
                "summary": self.summary,
                "silent": list(self.silent),
                "stages": [{**asdict(stage), "verdict": stage.verdict} for stage in self.stages],
                **facts,
            }
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(difference: Difference | None, which: str = "relative") -> str:
    if difference is None:
        return "?"
    return "0" if difference.equal else f"{getattr(difference, which):.1e}"


def _names(stages: Sequence[Stage]) -> str:
    """Names of stages, runs of blocks in one: `tower blocks 0–22, projector`."""
    said = []
    for kind, members in groupby(stages, key=lambda stage: stage.kind):
        runs: list[list[int]] = []
        for stage in members:
            if not kind.endswith("block"):
                said.append(stage.name)
                continue
            layer = int(stage.name.rpartition(" ")[2])
            if runs and runs[-1][1] == layer - 1:
                runs[-1][1] = layer
            else:
                runs.append([layer, layer])
        said += [f"{kind} {a}" if a == b else f"{kind}s {a}–{b}" for a, b in runs]
    return ", ".join(said)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _weights_differ(weights: Weights) -> str:
    worst = weights.differing[0]
    others = _some([weight.name for weight in weights.differing[1:]])
    also = f"; so do {others}" if others else ""
    return f"{worst.name} differs from {worst.key} (relative {_number(worst.difference)}){also}"


def _weight_lines(weights: Weights) -> list[str]:
    differing = f"; {_weights_differ(weights)}" if weights.differing else ""
    lines = [f"weights: {weights.n_equal} of {weights.n_equal + len(weights.differing)} are equal{differing}"]
    for said, names in (
        ("no rule names", weights.unknown),
        ("no place in the model for", weights.homeless),
        ("no Hugging Face weight for", weights.unmatched),
    ):
        lines += [f"weights: {said} {_some(names)}"] if names else []
    if weights.not_built:
        layers = ", ".join(map(str, weights.not_built))
        lines.append(f"not compared: tower layers that nobody reads and that are not built: {layers}")
    return lines


def _tokens_differ(generation: Generation) -> str:
    place = generation.first_difference
    assert place is not None
    row, step = place
    ours, theirs = (
        str(side[row][step]) if step < len(side[row]) else "the end" for side in (generation.ours, generation.theirs)
    )
    return f"row {row}, new token {step}: ours {ours}, Hugging Face's {theirs}"
