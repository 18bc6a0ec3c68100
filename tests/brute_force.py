"""Interventions the slow way, written apart from the engine: one full forward pass each, with plain hook functions."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import torch
from random_models import example, hf_llava

from llava_lens import HookedLlava, Inputs
from llava_lens.sweep import Edit, block_attention

POS = {"pos", "query", "patch", "feature"}


def hooked(odd: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> HookedLlava:
    """A random model in a precision of its own, always the same; its Hugging Face model stays as it is."""
    return _hooked(odd, dtype, attention)


@cache
def _hooked(odd: str, dtype: torch.dtype, attention: str) -> HookedLlava:
    return HookedLlava.from_hf(copy.deepcopy(hf_llava(odd, attention)).to(dtype))


def inputs_of(model: HookedLlava, odd: str, images: tuple[int, ...], pad: str | None, seed: int = 1) -> Inputs:
    raw = example(hf_llava(odd), images=images, pad=pad, seed=seed)
    pixels = raw.get("pixel_values")
    return Inputs(raw["input_ids"], None if pixels is None else pixels.to(model.cfg.dtype), raw["attention_mask"])


def by_hand(edit: Edit, row: int, image: int) -> tuple[str, Any]:
    """One edit as a hook function on the whole batch, with loops and masks instead of the engine's indexing."""

    def fn(act: torch.Tensor, hook: Any) -> torch.Tensor:
        axes = hook.axes.split()[1:]
        sample = image + edit.image if hook.name.startswith(("vision.", "projector.")) else row
        out = act.clone()
        chosen = torch.ones(act[sample].shape, dtype=torch.bool)
        for axis, name in enumerate(axes):
            wanted = {"key": edit.key}.get(name) if name == "key" else (
                edit.pos if name in POS else edit.head if name in ("head", "kv_head") else None)  # fmt: skip
            wanted = edit.neuron if axis == len(axes) - 1 and edit.neuron is not None else wanted
            if wanted is not None:
                keep = torch.zeros(act[sample].shape[axis], dtype=torch.bool)
                keep[list(wanted)] = True
                chosen &= keep.reshape([-1 if i == axis else 1 for i in range(len(axes))])
        sizes = [len({"key": edit.key}.get(n) or ()) if n == "key" and edit.key is not None else None for n in axes]
        part_shape = [int(chosen.any(tuple(j for j in range(len(axes)) if j != i)).sum()) if len(axes) > 1
                      else int(chosen.sum()) for i in range(len(axes))]  # fmt: skip
        assert all(s is None or s == p for s, p in zip(sizes, part_shape, strict=True))
        old = out[sample][chosen].reshape(part_shape)
        value: Any = edit.value(old) if callable(edit.value) else edit.value
        value = value if isinstance(value, torch.Tensor) else torch.full_like(old, value)
        new = old + value if edit.how == "add" else old * value if edit.how == "multiply" else value.expand_as(old)
        out[sample] = out[sample].masked_scatter(chosen, new.to(old))
        return out

    return edit.hook, fn


def images_before(inputs: Inputs, row: int, model: HookedLlava) -> int:
    return int(inputs.slots(model.cfg)[:row].sum()) // model.cfg.tokens_per_image


def brute_force(model: HookedLlava, inputs: Inputs, row: int, edits: Any, at: list[int]) -> torch.Tensor:
    """Logits `[read, d_vocab]` of one row of the whole, padded batch."""
    first = images_before(inputs, row, model)
    hooks: Any = [by_hand(edit, row, first) for edit in edits]
    with torch.no_grad():
        return model.run_with_hooks(inputs, fwd_hooks=hooks)[row, at]


def random_edit(model: HookedLlava, inputs: Inputs, row: int, rng: random.Random, hook: str | None = None) -> Edit:
    """Any hook, any selection that it has axes for, any kind of value."""
    names = [n for n in model.hook_dict if inputs.pixels is not None or not n.startswith(("vision.", "projector."))]
    own = int(inputs.slots(model.cfg)[row].sum()) // (model.cfg.tokens_per_image or 1)
    if not own:
        names = [n for n in names if not n.startswith(("vision.", "projector."))]
    name = hook or rng.choice(names)
    axes = model.hook(name).axes.split()[1:]
    seen = inputs.attention_mask[row].nonzero()[:, 0].tolist() if inputs.attention_mask is not None else []
    columns = seen or list(range(inputs.n_pos))
    sizes = model.axis_sizes(inputs)
    prefix = next((p for p in ("vision.", "projector.") if name.startswith(p)), "")
    lengths = sizes[prefix]
    where: dict[str, Any] = {}
    shape = []
    for i, axis in enumerate(axes):
        decoder = prefix == ""
        there = columns if axis in ("pos", "query", "key") and decoder else list(range(lengths[axis]))
        kind = "pos" if axis in POS else "head" if axis in ("head", "kv_head") else "key" if axis == "key" else None
        kind = "neuron" if kind is None and i == len(axes) - 1 and axis.startswith("d_") else kind
        if kind is None or rng.random() < 0.3:
            must = kind == "pos" and decoder  # padding must not be selected
            if not must:
                shape.append(lengths[axis])
                continue
        take = sorted(rng.sample(there, rng.randint(1, min(4, len(there)))))
        where[str(kind)] = take
        shape.append(len(take))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    value: Any = torch.randn(shape, generator=generator, dtype=torch.float64).to(model.cfg.dtype)
    if name.endswith("hook_pattern"):
        value = value.abs()
    if name.endswith("hook_scale"):
        value = value.abs() + 0.5
    how: Any = rng.choice(["replace", "replace", "add", "multiply"]) if "attn_scores" not in name else "multiply"
    if how == "add" and name.endswith("hook_scale"):
        how = "replace"
    if "attn_scores" in name:
        value = value.abs() + 0.1
    if rng.random() < 0.2 and how == "replace" and "scores" not in name:
        factor = float(value.flatten()[0])
        value, how = (lambda part: part.abs() * factor + 0.2), "replace"
    return Edit(name, value, how, image=rng.randrange(max(1, own)) if prefix else 0, **where)


def random_block(model: HookedLlava, inputs: Inputs, row: int, rng: random.Random) -> Edit:
    seen = inputs.attention_mask[row].nonzero()[:, 0].tolist() if inputs.attention_mask is not None else []
    columns = seen or list(range(inputs.n_pos))
    pictured = inputs.pixels is not None and int(inputs.slots(model.cfg)[row].sum()) and model.vision.cfg.n_layers
    if pictured and rng.random() < 0.4:
        patches = list(range(model.cfg.vision.n_ctx))  # type: ignore[union-attr]
        take = [rng.sample(patches, 3) for _ in range(2)]
        return block_attention(rng.randrange(model.vision.cfg.n_layers), *take, tower=True)
    take = [sorted(rng.sample(columns, min(4, len(columns)))) for _ in range(2)]
    head = rng.choice([None, 0, [1, 2]])
    return block_attention(rng.randrange(model.cfg.n_layers), *take, head=head)
