"""What llava_lens wants to reach, as data, and how far the rows of a run say that it is.

Unusual: a goal is met only by the number itself, with no allowance for the spread, which stands beside it; a goal whose
rows a run lacks is "not measured".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.rows import Report, Row, markdown

Of = Literal["faster", "of floor", "slower", "seconds", "seconds more", "gigabytes held", "error"]
MOST: tuple[Of, ...] = ("slower", "seconds", "seconds more", "gigabytes held", "error")
"""What should be small; the rest should be large."""
FUSED = "llava_lens fused"


@dataclass(frozen=True)
class Goal:
    """A number of one variant of a case: `must` and `stretch` (None: none is set), on a GPU or on a CPU.

    "faster" is the other variant's time divided by its own, "slower" the reverse, "seconds more" the difference,
    "error" its error divided by the other's; the rest are its own.
    """

    name: str
    task: str
    of: Of
    must: float | None
    stretch: float | None
    size: str
    case: str
    variant: str
    against: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    cuda: bool = True

    def reached(self, bound: float | None, value: float) -> bool | None:
        """Whether a value keeps a bound; None without one."""
        return None if bound is None else value <= bound if self.of in MOST else value >= bound

    def value(self, report: Report) -> tuple[float, float, float] | None:
        """The number with the lowest and highest that its rounds allow; None where a row is missing."""
        own = report.find(self.case, self.variant, self.size, **self.params)
        other = report.find(self.case, self.against, self.size, **self.params) if self.against else own
        if own is None or other is None or bool(report.machine.get("cuda")) != self.cuda:
            return None
        return _number(self.of, own, other)


def _number(of: Of, own: Row, other: Row) -> tuple[float, float, float] | None:
    mine, theirs = own.seconds, other.seconds
    if of == "faster":
        return theirs.median / mine.median, theirs.low / mine.high, theirs.high / mine.low
    if of == "slower":
        return mine.median / theirs.median, mine.low / theirs.high, mine.high / theirs.low
    if of == "seconds more":
        return mine.median - theirs.median, mine.low - theirs.high, mine.high - theirs.low
    if of == "seconds":
        return mine.median, mine.low, mine.high
    if of == "of floor":
        floor = own.floor_seconds
        return None if floor is None else (floor / mine.median, floor / mine.high, floor / mine.low)
    if of == "gigabytes held":
        return None if own.held_bytes is None else _alone(own.held_bytes / 1e9)
    if not own.error or not other.error:
        return None
    return _alone(own.error / other.error)


def _alone(value: float) -> tuple[float, float, float]:
    return value, value, value


def _prefill(name: str, batch: int, faster: tuple[float, float], floor: tuple[float, float]) -> list[Goal]:
    what: Any = dict(size="7b", case="forward/prefill", variant=FUSED, params={"batch": batch})
    task = f"prefill of {batch}"
    return [
        Goal(name, task, "faster", *faster, against="hf sdpa", **what),
        Goal(name, task, "of floor", *floor, **what),
    ]


def _tower(pictures: int, must: float, stretch: float) -> Goal:
    task = f"tower and projector, pictures: {pictures}"
    params = {"batch": pictures}
    return Goal("G3", task, "faster", must, stretch, "7b", "tower/encode", FUSED, "hf sdpa", params)


def _sweep(name: str, task: str, case: str, must: float, stretch: float) -> Goal:
    return Goal(name, task, "faster", must, stretch, "7b", f"sweeps/{case}", "llava_lens", "hf batched")


def _lpi(of: Of, must: float, stretch: float | None, against: str = "") -> Goal:
    task = "LPI of every head × position, exact"
    return Goal("G10", task, of, must, stretch, "7b", "increase/cells", "llava_lens exact", against)


DECODE: dict[str, Any] = dict(task="decode, one row", size="7b", case="decode/greedy", variant=FUSED)
KEEP: dict[str, Any] = dict(case="cached/run", variant=f"{FUSED} everything")
KEEP_7B: dict[str, Any] = dict(task="run_with_cache of everything", size="7b", **KEEP)
KEEP_CPU: dict[str, Any] = dict(name="G11", of="slower", cuda=False, against=f"{FUSED} forward", **KEEP)
FORWARD: dict[str, Any] = dict(case="forward/prefill", variant=FUSED, against="hf sdpa", params={"batch": 1})
SWEPT: dict[str, Any] = dict(size="bench", variant="llava_lens", against="hf loop")
CPU: dict[str, Any] = dict(name="G11", of="faster", cuda=False)
GOALS = [
    *_prefill("G1", 1, (1.35, 1.6), (0.70, 0.80)),
    *_prefill("G2", 8, (1.15, 1.22), (0.80, 0.88)),
    *_prefill("G2", 32, (1.15, 1.22), (0.80, 0.88)),
    _tower(1, 2, 3),
    _tower(32, 1.15, 1.3),
    Goal("G4", of="faster", must=2.2, stretch=3, against="hf sdpa", **DECODE),
    Goal("G4", of="of floor", must=0.78, stretch=0.88, **DECODE),
    Goal("G5", of="slower", must=1.08, stretch=1.03, against=f"{FUSED} forward", **KEEP_7B),
    Goal("G5", of="gigabytes held", must=3.5, stretch=None, **KEEP_7B),
    Goal("G5", of="faster", must=None, stretch=2.5, against="hf eager outputs", **KEEP_7B),
    _sweep("G6", "residual stream, every layer × position", "resid", 4.5, 5.5),
    _sweep("G7", "the same, question changed", "resid-words", 40, 65),
    _sweep("G8", "every head's z, all rows", "heads", 2.3, 2.8),
    _sweep("G8", "every head's z, last row", "heads-last", 300, 700),
    _sweep("G9", "knockout of windows → last row", "knockout", 250, 500),
    _lpi("seconds", 0.020, 0.012),
    _lpi("error", 0.2, None, "dense bf16"),
    Goal(task="CPU, float32: prefill, toy size", must=1.25, stretch=1.5, size="toy", **CPU, **FORWARD),
    Goal(task="CPU, float32: prefill, mostly products", must=1.0, stretch=1.05, size="gemm", **CPU, **FORWARD),
    Goal(task="CPU, float32: residual sweep", must=4, stretch=6, case="sweeps/resid", **CPU, **SWEPT),
    Goal(task="CPU, float32: last row of heads", must=50, stretch=200, case="sweeps/heads-last", **CPU, **SWEPT),
    Goal(
        "G11",
        "CPU, float32: everything kept",
        "slower",
        1.15,
        None,
        "gemm",
        against=f"{FUSED} forward",
        cuda=False,
        **KEEP,
    ),
    Goal(
        "G12", "import", "seconds more", 0.2, 0, "toy", "startup/import", "llava_lens", "transformer_lens", cuda=False
    ),
]
"""All of them; both sides of a ratio come from one run on the same weights."""
HEAD = ("goal", "task", "number", "asked", "stretch", "measured", "met")


def standing(goal: Goal, reports: Sequence[Report]) -> tuple[str, str]:
    """What was measured in the first report that has it, and whether that is enough, in words."""
    found = next((value for report in reports if (value := goal.value(report)) is not None), None)
    if found is None:
        return ("not measured (no GPU)" if goal.cuda else "not measured"), ""
    value, low, high = found
    spread = "" if low == high else f" [{low:.3g}, {high:.3g}]"
    if goal.reached(goal.stretch, value):
        met = "stretch"
    else:
        met = {None: "no", True: "yes", False: "no"}[goal.reached(goal.must, value)]
    return f"{value:.3g}{spread}", met


def table(reports: Sequence[Report]) -> str:
    """Every goal with what was asked and measured, as a markdown table."""
    return markdown([HEAD, *(line(goal, reports) for goal in GOALS)])


def line(goal: Goal, reports: Sequence[Report]) -> tuple[str, ...]:
    """One goal in words."""
    sign = "≤" if goal.of in MOST else "≥"
    bounds = ("" if bound is None else f"{sign} {bound:g}" for bound in (goal.must, goal.stretch))
    link = "than" if goal.of in ("faster", "slower", "seconds more") else "over"
    number = f"{goal.of} {link} {goal.against}" if goal.against else goal.of
    return goal.name, goal.task, number, *bounds, *standing(goal, reports)
