"""What one would write by hand: a loop of Hugging Face forwards with plain torch hooks, one forward per cell.

The clean activations are collected before, outside the time that is measured: a small favour to the loops.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.models import Study
from llava_lens import Inputs

Cell = tuple[int, ...]
Attach = Callable[[Cell], list[Any]]
"""From a cell to the handles of the hooks that edit there."""


def layers(hf: Any) -> Any:
    """The decoder's layers."""
    return hf.model.language_model.layers


def last_logits(hf: Any, inputs: Inputs) -> Float[Tensor, "batch d_vocab"]:
    """One forward as a user would call it for a single answer."""
    return hf(**inputs.for_hf(), logits_to_keep=1, use_cache=False).logits[:, -1]


@torch.inference_mode()
def clean_activations(study: Study) -> dict[str, list[Tensor]]:
    """`resid_pre` `[1, pos, d_model]` and `z` `[1, pos, head·d_head]` of every layer of the clean run."""
    kept: dict[str, list[Tensor]] = {"resid_pre": [], "z": []}
    handles = []
    for layer in layers(study.hf):
        handles.append(layer.register_forward_pre_hook(lambda _, args: kept["resid_pre"].append(args[0].clone())))
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: kept["z"].append(args[0])))
    last_logits(study.hf, study.clean)
    for handle in handles:
        handle.remove()
    return kept


@torch.inference_mode()
def loop(study: Study, cells: Iterable[Cell], attach: Attach) -> Float[Tensor, " cell"]:
    """The metric of the corrupt prompt under each cell's hooks."""
    values = []
    for cell in cells:
        handles = attach(cell)
        try:
            values.append(study.metric(last_logits(study.hf, study.corrupt)))
        finally:
            for handle in handles:
                handle.remove()
    return torch.stack(values)


def patch_resid(study: Study, cells: Sequence[Cell], clean: Sequence[Tensor]) -> Float[Tensor, " cell"]:
    """Cells `(layer, position)`: the clean stream before that layer at that position, put into the corrupt run."""

    def attach(cell: Cell) -> list[Any]:
        layer, position = cell

        def put(_: Any, args: tuple[Tensor, ...]) -> None:
            args[0][:, position] = clean[layer][:, position]

        return [layers(study.hf)[layer].register_forward_pre_hook(put)]

    return loop(study, cells, attach)


def patch_heads(
    study: Study, cells: Sequence[Cell], clean: Sequence[Tensor], at: slice = slice(None)
) -> Float[Tensor, " cell"]:
    """Cells `(layer, head)`: one head's clean z, at all positions or at those of `at`."""
    d_head = clean[0].shape[-1] // study.size.heads

    def attach(cell: Cell) -> list[Any]:
        layer, head = cell
        own = slice(head * d_head, (head + 1) * d_head)

        def put(_: Any, args: tuple[Tensor, ...]) -> None:
            args[0][:, at, own] = clean[layer][:, at, own]

        return [layers(study.hf)[layer].self_attn.o_proj.register_forward_pre_hook(put)]

    return loop(study, cells, attach)


def windows(n_layers: int, width: int) -> list[range]:
    """The layers around each layer that one window takes, fewer at both ends."""
    return [range(max(0, i - width // 2), min(n_layers, i + (width + 1) // 2)) for i in range(n_layers)]


def causal_mask(study: Study) -> Float[Tensor, "1 1 query key"]:
    """What sdpa adds to the scores: nothing, and -inf ahead of the query."""
    tokens = study.corrupt.tokens
    full = torch.full((tokens.shape[1],) * 2, -torch.inf, device=tokens.device, dtype=study.hf.dtype)
    return full.triu(1)[None, None]


def blind(mask: Tensor, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """In front of an attention: another mask."""
    assert kwargs.get("attention_mask") is None, "without padding, causality is left to sdpa"
    return args, {**kwargs, "attention_mask": mask}


def knock_out(
    study: Study, cells: Sequence[Cell], sources: Sequence[Sequence[int]], width: int
) -> Float[Tensor, " cell"]:
    """Cells `(layer, source)`: the last position does not see a source's keys in the window around a layer."""
    causal, blocked = causal_mask(study), windows(study.size.layers, width)

    def attach(cell: Cell) -> list[Any]:
        mask = causal.clone()
        mask[..., -1, list(sources[cell[1]])] = -torch.inf
        chosen = [layers(study.hf)[i].self_attn for i in blocked[cell[0]]]
        return [attention.register_forward_pre_hook(partial(blind, mask), with_kwargs=True) for attention in chosen]

    return loop(study, cells, attach)


@torch.inference_mode()
def ask_each(hf: Any, prompts: Sequence[Inputs]) -> Float[Tensor, "prompt d_vocab"]:
    """One forward per question, the picture included in each."""
    return torch.cat([last_logits(hf, inputs) for inputs in prompts])


@torch.inference_mode()
def ask_batch(hf: Any, prompts: Sequence[Inputs]) -> Float[Tensor, "prompt d_vocab"]:
    """One forward for all questions, padded on the left, with a copy of the picture for each."""
    rows = [inputs.tokens[0] for inputs in prompts]
    tokens = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return last_logits(hf, Inputs(tokens, torch.cat([_pixels(inputs) for inputs in prompts]), mask))


@torch.inference_mode()
def ask_prefix(hf: Any, prompts: Sequence[Inputs]) -> Float[Tensor, "prompt d_vocab"]:
    """The common start once into a key/value cache, a copy of which goes on with each question."""
    rows = [inputs.tokens[0] for inputs in prompts]
    shortest = min(map(len, rows)) - 1
    same = torch.stack([row[:shortest] for row in rows]).eq(rows[0][:shortest]).all(0)
    n = int(same.cumprod(0).sum())
    assert not any(hf.config.image_token_id in row[n:] for row in rows), "the picture lies in the common start"
    start = hf(input_ids=rows[0][None, :n], pixel_values=_pixels(prompts[0]), logits_to_keep=1, use_cache=True)
    new_name = "cache" in inspect.signature(type(hf).forward).parameters  # newer transformers renamed it
    name, held = ("cache", start.cache) if new_name else ("past_key_values", start.past_key_values)
    outs = [hf(input_ids=row[None, n:], logits_to_keep=1, **{name: copy.deepcopy(held)}) for row in rows]
    return torch.cat([out.logits[:, -1] for out in outs])


def _pixels(inputs: Inputs) -> Tensor:
    assert inputs.pixels is not None
    return inputs.pixels
