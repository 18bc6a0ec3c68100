"""The Hugging Face loops of `baselines` with several cells in one forward, one row each, and their first order.

Unusual: each row repeats the whole corrupt prompt with its picture, as one would write it; the clean activations are
collected outside the time, except by the first order, which pays for its clean run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.baselines import Cell, blind, causal_mask, last_logits, layers, windows
from benchmarks.models import Study
from llava_lens import Inputs

Put = Callable[[Tensor, int, Cell], None]
"""Writes a cell's clean values into one row of what passes."""


def repeated(inputs: Inputs, count: int) -> Inputs:
    """The same prompt and picture in every row."""
    assert inputs.pixels is not None
    pixels = inputs.pixels.repeat(count, *(1 for _ in inputs.pixels.shape[1:]))
    return Inputs(inputs.tokens.repeat(count, 1), pixels)


@torch.inference_mode()
def loop(
    study: Study, cells: Sequence[Cell], rows: int, attach: Callable[[Sequence[Cell]], list[Any]]
) -> Float[Tensor, " cell"]:
    """The metric of the corrupt prompt under each cell's edit, `rows` cells at a time; `attach` gives their hooks."""
    found = []
    for start in range(0, len(cells), rows):
        some = cells[start : start + rows]
        handles = attach(some)
        try:
            logits = last_logits(study.hf, repeated(study.corrupt, len(some)))
        finally:
            for handle in handles:
                handle.remove()
        found += [study.metric(logits[row : row + 1]) for row in range(len(some))]
    return torch.stack(found)


def editing(study: Study, place: Callable[[Any], Any], put: Put) -> Callable[[Sequence[Cell]], list[Any]]:
    """Hooks that put each cell's values into its row, in front of the module that `place` finds in the cell's layer."""

    def attach(some: Sequence[Cell]) -> list[Any]:
        handles = []
        for layer in {cell[0] for cell in some}:
            mine = [(row, cell) for row, cell in enumerate(some) if cell[0] == layer]

            def edit(_: Any, args: tuple[Tensor, ...], mine: list[tuple[int, Cell]] = mine) -> None:
                for row, cell in mine:
                    put(args[0], row, cell)

            handles.append(place(layers(study.hf)[layer]).register_forward_pre_hook(edit))
        return handles

    return attach


def patch_resid(study: Study, cells: Sequence[Cell], clean: Sequence[Tensor], rows: int) -> Float[Tensor, " cell"]:
    """Cells `(layer, position)`: the clean stream before that layer at that position."""

    def put(stream: Tensor, row: int, cell: Cell) -> None:
        stream[row, cell[1]] = clean[cell[0]][0, cell[1]]

    return loop(study, cells, rows, editing(study, lambda layer: layer, put))


def patch_heads(
    study: Study, cells: Sequence[Cell], clean: Sequence[Tensor], rows: int, at: slice = slice(None)
) -> Float[Tensor, " cell"]:
    """Cells `(layer, head)`: one head's clean z, at all positions or at those of `at`."""
    d_head = clean[0].shape[-1] // study.size.heads

    def put(z: Tensor, row: int, cell: Cell) -> None:
        own = slice(cell[1] * d_head, (cell[1] + 1) * d_head)
        z[row, at, own] = clean[cell[0]][0, at, own]

    return loop(study, cells, rows, editing(study, lambda layer: layer.self_attn.o_proj, put))


def knock_out(
    study: Study, cells: Sequence[Cell], sources: Sequence[Sequence[int]], width: int, rows: int
) -> Float[Tensor, " cell"]:
    """Cells `(layer, source)`: the last position does not see a source's keys in the window around a layer."""
    causal, blocked = causal_mask(study), windows(study.size.layers, width)

    def attach(some: Sequence[Cell]) -> list[Any]:
        handles = []
        for index in sorted({layer for cell in some for layer in blocked[cell[0]]}):
            mask = causal.repeat(len(some), 1, 1, 1)
            for row, cell in enumerate(some):
                if index in blocked[cell[0]]:
                    mask[row, 0, -1, list(sources[cell[1]])] = -torch.inf
            attention = layers(study.hf)[index].self_attn
            handles.append(attention.register_forward_pre_hook(partial(blind, mask), with_kwargs=True))
        return handles

    return loop(study, cells, rows, attach)


def first_order(study: Study) -> Float[Tensor, "layer position"]:
    """The metric plus `(clean − corrupt) · gradient` of the stream before each layer, by torch hooks and autograd."""

    def streams(inputs: Inputs, grow: bool) -> tuple[list[Tensor], Tensor]:
        kept: list[Tensor] = []

        def keep(index: int, stream: Tensor) -> tuple[Tensor]:
            if grow and index == 0:
                stream = stream.detach().requires_grad_()  # nothing in front of the decoder is differentiated
            kept.append(stream)
            return (stream,)

        handles = [
            layer.register_forward_pre_hook(lambda _, args, i=i: (*keep(i, args[0]), *args[1:]))
            for i, layer in enumerate(layers(study.hf))
        ]
        with torch.set_grad_enabled(grow):
            logits = last_logits(study.hf, inputs)
        for handle in handles:
            handle.remove()
        return kept, study.metric(logits)

    clean, _ = streams(study.clean, False)
    corrupt, metric = streams(study.corrupt, True)
    gradients = torch.autograd.grad(metric, corrupt)
    moved = [((a - b).float() * g).sum(-1)[0] for a, b, g in zip(clean, corrupt, gradients, strict=True)]
    return metric.detach() + torch.stack(moved).detach()
