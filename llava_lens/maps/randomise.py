"""A copy of a model with its weights randomised, to see whether a map depends on what was learned.

Unusual: each weight keeps its numbers and loses their places, so the copy's activations stay as large as the model's
and a map cannot differ because numbers became tiny.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

from llava_lens.errors import LensError, nearest
from llava_lens.sweep.journal import digest

CASCADE = ("unembed", "ln_final", "blocks", "embed", "projector", "vision.blocks", "vision")
"""The parts from the output to the input; `blocks` from the last layer to the first."""


def parts_of(model: Any) -> dict[str, list[str]]:
    """The names of each part's weights, parts in the order of the cascade; `vision` is the tower before its blocks.

    >>> from llava_lens import HookedLlava
    >>> list(parts_of(HookedLlava.tiny()))
    ['unembed', 'ln_final', 'blocks.3', ..., 'embed', 'projector', 'vision.blocks.2', ..., 'vision']
    """
    found: dict[tuple[int, int], tuple[str, list[str]]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        kind, layer = re.fullmatch(r"((?:vision\.)?blocks|\w+)(?:\.(\d+))?.*", name).groups()  # type: ignore[union-attr]
        part = kind if layer is None else f"{kind}.{layer}"
        found.setdefault((CASCADE.index(kind), -int(layer or 0)), (part, []))[1].append(name)
    return dict(found[place] for place in sorted(found))


@torch.inference_mode(False)
@torch.no_grad()
def randomised(model: Any, down_to: str | None = None, *, seed: int = 0) -> Any:
    """A deep copy with the entries of every weight in random order; the model itself stays as it is, bit for bit.

    The cascade of Adebayo et al. (2018, arXiv 1810.03292) starts at the output: with `down_to` only the parts up to
    that one are randomised (`parts_of` names them), all without. The same seed gives the same weights, and a longer
    cascade the same as a shorter one in the parts they share. Raises `LensError` for a part that does not exist.
    """
    parts = parts_of(model)
    if down_to is not None and down_to not in parts:
        raise LensError(f"no part {down_to!r}{nearest(down_to, parts)}; expected one of {', '.join(parts)}")
    twin = copy.deepcopy(model, {id(model.processor): model.processor})
    weights, done = dict(twin.named_parameters(remove_duplicate=False)), set()
    for part, names in parts.items():
        for name in names:
            weight = weights[name]
            if id(weight) in done:
                continue  # tied: the same weight under another name
            done.add(id(weight))
            generator = torch.Generator().manual_seed(int(digest(seed, name), 16))
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
            weight.copy_(weight.flatten()[order].reshape(weight.shape))
        if part == down_to:
            break
    return twin
