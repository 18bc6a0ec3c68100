"""An intervention as data: which part of which activation, and what happens to it.

Unusual: an edit says what it touches, so whoever runs it knows what can change and needs to run nothing else; a hook
function could do anything. `hooks_of` turns edits into hook functions for any run, generation too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from llava_lens.errors import LensError
from llava_lens.hooks import Hook, reader

How = Literal["replace", "add", "multiply"]
Places = tuple[int, ...]
AXES = {"pos": ("pos", "query", "patch", "feature"), "head": ("head", "kv_head"), "key": ("key",)}
"""What a selection is called → the hook axes that it selects along; `neuron` is the last axis."""
FRONT = ("vision.", "projector.")
"""Prefixes of the hooks whose samples are pictures."""
SCORES, PATTERN = "attn.hook_attn_scores", "attn.hook_pattern"


def places(given: Any, what: str = "positions") -> Places | None:
    """Whole numbers from an int, a sequence or a tensor; None stays None. Raises `LensError` for anything else.

    >>> places(3), places(range(2)), places(torch.tensor([4, 2]))
    ((3,), (0, 1), (4, 2))
    """
    if given is None:
        return None
    values = given.tolist() if hasattr(given, "tolist") else given
    values = [values] if not isinstance(values, Iterable) else values
    if isinstance(values, str) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise LensError(f"{what} {given!r}; expected whole numbers")
    values = list(values)
    if not values:
        raise LensError(f"no {what}; expected one or more")
    return tuple(values)


class Rows:
    """The positions that a run carries, in order, and the place of each in its tensors; `keys` are those it can see."""

    def __init__(self, columns: Sequence[int], keys: Rows | None = None):
        self.columns = list(columns)
        self.place = {column: i for i, column in enumerate(self.columns)}
        self.keys = keys or self

    def __len__(self) -> int:
        return len(self.columns)

    def local(self, wanted: Places) -> tuple[list[int], list[int]]:
        """Which of the wanted positions are carried (their numbers in `wanted`), and their places here."""
        found = [(i, self.place[column]) for i, column in enumerate(wanted) if column in self.place]
        return [i for i, _ in found], [place for _, place in found]


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at the hook called `hook` (its full name).

    `pos`, `head`, `neuron` and `key` select along the hook's axes (positions or queries, heads, the last axis, keys);
    None takes all. `value` is a tensor that broadcasts to the selected part, axes in the hook's order without the
    batch, or a function from the selected part to a new one. `how` says whether a tensor replaces the part, is added
    to it or multiplied with it. `image` says which picture a hook of the tower or the projector is for. `onward` counts
    in what is generated after the prompt.

    Raises `LensError` where a selection is empty or no whole numbers.
    """

    hook: str
    value: Tensor | float | Callable[[Tensor], Tensor]
    how: How = "replace"
    pos: Any = None
    head: Any = None
    neuron: Any = None
    key: Any = None
    image: int = 0
    onward: bool = False

    def __post_init__(self) -> None:
        for name in ("pos", "head", "neuron", "key"):
            object.__setattr__(self, name, places(getattr(self, name), name))
        if self.how not in ("replace", "add", "multiply"):
            raise LensError(f"how={self.how!r}; expected 'replace', 'add' or 'multiply'")

    @property
    def blocks(self) -> bool:
        """Whether it takes attention away altogether."""
        minus_infinity = not callable(self.value) and not isinstance(self.value, Tensor) and self.value == -math.inf
        return self.hook.endswith(SCORES) and self.how == "replace" and minus_infinity

    @cached_property
    def selection(self) -> dict[str, Places]:
        """The selections that are made, by name."""
        chosen = {name: getattr(self, name) for name in ("pos", "head", "neuron", "key")}
        return {name: where for name, where in chosen.items() if where is not None}

    def axis_of(self, name: str, axes: Sequence[str]) -> int:
        """Which of the axes (batch left out) a selection is along; raises `LensError` where there is none."""
        if name == "neuron":
            return len(axes) - 1
        for i, axis in enumerate(axes):
            if axis in AXES[name]:
                return i
        raise LensError(f"{self.hook!r} has no axis for {name}=; its axes are {' '.join(axes)}")

    def part(self, act: Tensor, axes: Sequence[str], rows: Rows | None = None) -> Tensor:
        """The selected part of one sample's activation, a copy."""
        index, _ = self._index(act, axes, rows)
        return act[index].clone() if index is not None else act[:0]

    def write(self, act: Tensor, axes: Sequence[str], rows: Rows | None = None) -> None:
        """Change one sample's activation in place; `rows` are the positions that it carries (None: all)."""
        index, kept = self._index(act, axes, rows)
        if index is None:
            return
        part = act[index]
        value: Any = self.value(part) if callable(self.value) else self.value
        if isinstance(value, Tensor) and not callable(self.value):
            for axis, entries in kept.items():
                value = _entries(value, axis - part.ndim, entries)
        value = value.to(part) if isinstance(value, Tensor) else value
        act[index] = part + value if self.how == "add" else part * value if self.how == "multiply" else value

    def _index(self, act: Tensor, axes: Sequence[str], rows: Rows | None) -> tuple[Any, dict[int, list[int]]]:
        """What indexes the selected part (None for nothing), and by axis the entries of the value that are needed."""
        chosen: dict[int, list[int]] = {}
        kept: dict[int, list[int]] = {}
        for name, where in self.selection.items():
            axis, chosen_here = self.axis_of(name, axes), list(where)
            if name in ("pos", "key") and rows is not None:
                numbers, chosen_here = (rows if name == "pos" else rows.keys).local(where)
                if not numbers:
                    return None, {}
                if len(numbers) < len(where):
                    kept[axis] = numbers
            chosen[axis] = chosen_here
        if rows is not None:  # of a value for every position, padding too, what belongs to those there are
            for name, carried in (("pos", rows), ("key", rows.keys)):
                if name not in self.selection and any(axis in AXES[name] for axis in axes):
                    kept[self.axis_of(name, axes)] = carried.columns
        if not chosen:
            return (slice(None),), kept
        if len(chosen) == 1:
            axis, local = next(iter(chosen.items()))
            run = local == list(range(local[0], local[-1] + 1))
            return (*[slice(None)] * axis, slice(local[0], local[-1] + 1) if run else local), kept
        depth = max(chosen) + 1
        mesh = [torch.tensor(chosen.get(i, range(act.shape[i])), device=act.device) for i in range(depth)]
        return tuple(m.reshape([-1 if i == j else 1 for j in range(depth)]) for i, m in enumerate(mesh)), kept


def _entries(value: Tensor, axis: int, entries: list[int]) -> Tensor:
    """Some entries of a value along an axis counted from the end; all of one that is broadcast along it."""
    if -axis > value.ndim or value.shape[axis] == 1 or entries == list(range(value.shape[axis])):
        return value
    return value.index_select(axis, torch.tensor(entries, device=value.device))


def axes_of(hook: Hook) -> list[str]:
    """A hook's axes without the batch."""
    return hook.axes.split()[1:]


def block_attention(
    layer: int, queries: Any, keys: Any, head: Any = None, tower: bool = False, image: int = 0, onward: bool = False
) -> Edit:
    """No attention from some queries to some keys in one layer: the scores are -inf before the softmax.

    The weights there are then exactly zero, which is checked when it runs. A query that may look at nothing at all
    mixes nothing: its pattern is zeros, and attention adds only its output bias.
    """
    prefix = "vision." if tower else ""
    where: dict[str, Any] = dict(pos=queries, key=keys, head=head, image=image, onward=onward)
    return Edit(f"{prefix}blocks.{layer}.{SCORES}", -math.inf, **where)


def check_blocked(edit: Edit, pattern: Tensor, axes: Sequence[str], rows: Rows | None = None) -> None:
    """Raise `LensError` unless a blocked edge's weights, in one sample's pattern, are exactly zero."""
    if bool(edit.part(pattern, axes, rows).any()):
        raise LensError(f"attention that {edit.hook!r} blocks is not zero after the softmax: another hook restored it")


def hooks_of(
    model: Any, edits: Iterable[Edit], n_pos: int, row: int = 0, first_image: int = 0
) -> list[tuple[str, Callable[..., Any]]]:
    """Edits as hook functions for `run_with_hooks`, `run_with_cache` and `generate`, on one row of a batch.

    `n_pos` is the prompt's length, `first_image` the number of the row's first picture in the batch. In the cached
    steps of generation positions go on counting; an edit without `pos` holds at every step, one with `onward` at
    those after the prompt too. The functions count, so they serve one run or one generation.
    """
    made: list[tuple[str, Callable[..., Any]]] = []
    for edit in edits:
        hook = model.hook(edit.hook)
        sample = first_image + edit.image if edit.hook.startswith(FRONT) else row
        made.append((edit.hook, _writer(edit, axes_of(hook), sample, n_pos)))
        if edit.blocks:
            made.append((edit.hook.replace(SCORES, PATTERN), _checker(edit, axes_of(hook), sample, n_pos)))
    return made


class Counter:
    """Which positions an activation carries, step by step."""

    def __init__(self, edit: Edit, axes: Sequence[str], n_pos: int):
        self.edit, self.axes, self.n_pos, self.seen = edit, list(axes), n_pos, 0
        self.decoder = not edit.hook.startswith(FRONT)

    def rows(self, act: Tensor) -> tuple[Edit, Rows | None]:
        """The edit with the positions it reaches in this step, and the positions there are."""
        if not self.decoder or self.edit.pos is None:
            return self.edit, None
        length = act.shape[self.edit.axis_of("pos", self.axes)]
        start = self._start(length)
        self.seen = start + length
        edit = self.edit
        if edit.onward and self.seen > self.n_pos and edit.pos is not None:
            later = tuple(range(max(start, self.n_pos), self.seen))
            shown = tuple(p for p in edit.pos if p < self.n_pos) + later
            edit = Edit(edit.hook, edit.value, edit.how, shown, edit.head, edit.neuron, edit.key, edit.image)
        return edit, Rows(range(start, self.seen), Rows(range(self.seen)))

    def _start(self, length: int) -> int:
        """The first position that an activation of some length carries."""
        if length > self.n_pos or (length == self.n_pos and (length > 1 or not self.seen)):
            return 0  # the whole text
        if self.edit.hook == "hook_logits" and not self.seen:
            return self.n_pos - length  # those of the last positions alone (`logits_to_keep`)
        return self.seen


def _writer(edit: Edit, axes: Sequence[str], sample: int, n_pos: int) -> Callable[..., Any]:
    counter = Counter(edit, axes, n_pos)

    def write(act: Tensor, hook: Hook) -> Tensor:
        now, rows = counter.rows(act[sample])
        now.write(act[sample], axes, rows)
        return act

    return write


def _checker(edit: Edit, axes: Sequence[str], sample: int, n_pos: int) -> Callable[..., Any]:
    counter = Counter(edit, axes, n_pos)

    @reader
    def check(act: Tensor, hook: Hook) -> None:
        now, rows = counter.rows(act[sample])
        check_blocked(now, act[sample], axes, rows)

    return check
