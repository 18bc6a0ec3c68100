"""Holding hook functions on a model for a moment, and making sure that they ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from llava_lens.errors import LensError
from llava_lens.hooks import Hook, reader
from llava_lens.sweep.edits import PATTERN, SCORES, Edit, Rows, axes_of, check_blocked

Todo = dict[str, list[tuple[int, Edit]]]
"""Hook → the edits there, each with the number of its sample in the batch."""


@contextmanager
def attached(model: Any, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Hold one function per hook; raises `LensError` at the end if one of the hooks never fired."""
    hooks = {name: model.hook(name) for name in functions}
    fired = {name: hook.fired for name, hook in hooks.items()}
    try:
        for name, fn in functions.items():
            hooks[name].add_hook(fn)
        yield
    finally:
        for hook in hooks.values():
            hook.remove_hooks("fwd")
    silent = [name for name, hook in hooks.items() if hook.fired == fired[name]]
    if silent:
        raise LensError(f"an edit at {silent[0]!r} did not take effect: the hook never fired")


def writers(model: Any, todo: Todo, rows: Callable[[], Rows | None]) -> dict[str, Callable[..., Any]]:
    """Functions that make the edits in a batch whose samples carry the positions `rows()`.

    A blocked edge is checked behind the softmax.
    """
    made: dict[str, Callable[..., Any]] = {}
    for name, writes in todo.items():
        made[name] = _writer(axes_of(model.hook(name)), writes, rows)
    for name in list(todo):
        blocks = [(sample, edit) for sample, edit in todo[name] if edit.blocks]
        if blocks:
            pattern = name.replace(SCORES, PATTERN)
            check = _checker(axes_of(model.hook(pattern)), blocks, rows)
            made[pattern] = _both(made[pattern], check) if pattern in made else check
    return made


def _writer(axes: list[str], writes: list[tuple[int, Edit]], rows: Callable[[], Rows | None]) -> Callable[..., Any]:
    def write(act: Tensor, hook: Hook) -> Tensor:
        for sample, edit in writes:
            edit.write(act[sample], axes, rows())
        return act.view_as(act)  # another object: what was changed is not searched for

    return write


def _checker(axes: list[str], writes: list[tuple[int, Edit]], rows: Callable[[], Rows | None]) -> Callable[..., Any]:
    @reader
    def check(act: Tensor, hook: Hook) -> None:
        for sample, edit in writes:
            check_blocked(edit, act[sample], axes, rows())

    return check


def _both(write: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    def run(act: Tensor, hook: Hook) -> Tensor:
        out = write(act, hook)
        check(out, hook)
        return out

    return run
