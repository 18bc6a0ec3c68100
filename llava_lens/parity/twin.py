"""The Hugging Face model beside ours: which of its modules is which part of ours, and whether the weights are the same.

Unusual: nothing here knows a model. The rename table that loads the weights says which keys belong to a part, and the
module that owns just these keys is that part.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from llava_lens.errors import LensError
from llava_lens.parity.report import Difference, Weight, Weights
from llava_lens.rename import UNKNOWN, look_up


class Twin:
    """A Hugging Face model read through the rename table of `model`."""

    def __init__(self, model: Any, hf_model: nn.Module):
        self.model, self.hf = model, hf_model
        self.state: dict[str, Tensor] = dict(hf_model.state_dict())
        looked_up = {key: look_up(key, model.weight_table) for key in self.state}
        self.unknown = tuple(key for key, name in looked_up.items() if name == UNKNOWN)
        self.keys = {name: key for key, name in looked_up.items() if name not in (None, UNKNOWN)}
        """Our name → Hugging Face's key."""
        self._check()

    def home(self, part: str) -> str | None:
        """Path of the module that owns all keys of a part (`blocks.3.`) and no others; None where there is none."""
        owners = [key.rpartition(".")[0].split(".") for name, key in self.keys.items() if name.startswith(part)]
        shared = takewhile(lambda segments: len(set(segments)) == 1, zip(*owners, strict=False))
        path = ".".join(segments[0] for segments in shared)
        foreign = (key for name, key in self.keys.items() if not name.startswith(part))
        return path if path and not any(key.startswith(f"{path}.") for key in foreign) else None

    def n_blocks(self, stack: str) -> int:
        """Blocks of a stack (`blocks.`) that Hugging Face's model has."""
        found = (re.match(rf"{re.escape(stack)}(\d+)\.", name) for name in self.keys)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def _check(self) -> None:
        kind, other = type(self.model).__name__, type(self.hf).__name__
        if not self.keys:
            example = next(iter(self.state), "none")
            raise LensError(f"no rule of {kind} names a weight of {other} ({example!r}, …); expected its own model")
        ours = {name.partition(".")[0] for name, _ in self.model.named_parameters()}
        theirs = {name.partition(".")[0] for name in self.keys}
        for part in sorted(ours ^ theirs):
            if part == "unembed" and self.model.cfg.tie_word_embeddings:
                continue
            has, lacks = (kind, other) if part in ours else (other, kind)
            raise LensError(f"{has} has a part {part!r} and {lacks} has none; expected a model and its own twin")
        built, n = len(self.model.blocks), self.n_blocks("blocks.")
        if built != n:
            raise LensError(f"{kind} has {built} decoder blocks and {other} has {n}; expected equally many")
        if "vision" in ours and len(self.model.vision.blocks) > (n := self.n_blocks("vision.blocks.")):
            built = len(self.model.vision.blocks)
            raise LensError(f"{kind} runs {built} tower blocks and {other} has {n}; expected at least as many")

    def weights(self) -> Weights:
        """Every parameter beside the published one. Raises `LensError` for one of another shape."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        differing, unmatched = [], []
        for name, ours in parameters.items():
            key = self._key(name)
            if key is None:
                unmatched.append(name)
                continue
            theirs = self.state[key].detach().to(ours.device)
            if theirs.shape != ours.shape:
                given = f"{name} has shape {tuple(ours.shape)}, Hugging Face's {key} {tuple(theirs.shape)}"
                raise LensError(f"{given}; expected a model and its own twin")
            if not torch.equal(ours.detach(), theirs.to(ours.dtype)):
                differing.append(Weight(name, key, difference(ours.detach(), theirs)))
        unbuilt = range(len(self.model.vision.blocks), self.n_blocks("vision.blocks.")) if self.has_tower else ()
        skipped = tuple(f"vision.blocks.{layer}." for layer in unbuilt)
        homeless = (key for name, key in self.keys.items() if name not in parameters and not name.startswith(skipped))
        n_equal = len(parameters) - len(differing) - len(unmatched)
        return Weights(n_equal, tuple(differing), self.unknown, tuple(homeless), tuple(unmatched), tuple(unbuilt))

    @property
    def has_tower(self) -> bool:
        """Whether the model has a vision tower."""
        return hasattr(self.model, "vision")

    def _key(self, name: str) -> str | None:
        if name == "unembed.weight" and self.model.cfg.tie_word_embeddings:
            return self.keys.get(name, self.keys.get("embed.weight"))
        return self.keys.get(name)


def difference(ours: Tensor, theirs: Tensor) -> Difference:
    """Between tensors of one shape; what is not a number on both sides, or infinite alike, is equal."""
    precise = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
    same_kind, a, b = ours.dtype == theirs.dtype, ours.to(precise), theirs.to(ours.device, precise)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return Difference(0.0, 0.0, same_kind)
    largest = float((a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(same, 0).max())
    scale = float(b.abs().nan_to_num(nan=0.0, posinf=0.0).max())
    return Difference(largest, largest / scale if scale else torch.inf, False)
