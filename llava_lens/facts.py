"""What has been found out about a tensor, kept as long as it holds: finding out makes the host wait for a GPU.

Unusual: a fact belongs to the tensor object and ends with the first edit in place, which torch counts. Edits that torch
does not count (through numpy's view of the memory, or `.data`) are not seen. Inference tensors have no counter, so
facts about them are found anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
_KNOWN = WeakTensorKeyDictionary()
WHOLE = "whole"
"""Fact about a mask of our own making: whether it hides nothing."""


def fact(tensor: Tensor, name: Hashable, find: Callable[[Tensor], T]) -> T:
    """`find(tensor)`, from memory while the tensor is as it was."""
    value = known(tensor, name)
    if value is None:
        value = find(tensor)
        if not tensor.is_inference():
            tell(tensor, name, value)
    return value


def known(tensor: Tensor, name: Hashable) -> Any:
    """The fact, or None where it is not known (any more)."""
    version, facts = _held(tensor)
    return facts.get(name) if version == _version(tensor) else None


def tell(tensor: Tensor, name: Hashable, value: Any) -> None:
    """Note a fact that follows from how the tensor was made."""
    version, facts = _held(tensor)
    now = _version(tensor)
    _KNOWN[tensor] = (now, {**(facts if version == now else {}), name: value})


def carry(old: Tensor, new: Tensor) -> Tensor:
    """`new`, a copy with the same values: what is known of `old` holds for it too."""
    version, facts = _held(old)
    if new is not old and facts and version == _version(old):
        _KNOWN[new] = (_version(new), dict(facts))
    return new


class TokenFacts(NamedTuple):
    """Smallest and largest id other than `<image>` (smallest > largest if there is none), and each row's `<image>`s."""

    low: int
    high: int
    slots: list[int]


def token_facts(tokens: Tensor, image_token_id: int | None) -> TokenFacts:
    """What tokens `[batch, pos]` are like."""

    def look(tokens: Tensor) -> TokenFacts:
        none = torch.zeros_like(tokens, dtype=torch.bool)
        slots = none if image_token_id is None else tokens == image_token_id
        ends = (torch.finfo if tokens.is_floating_point() else torch.iinfo)(tokens.dtype)
        low, high = tokens.masked_fill(slots, ends.max).min(), tokens.masked_fill(slots, ends.min).max()
        least, most, *counts = torch.cat((low[None], high[None], slots.sum(-1))).tolist()  # one wait for a device
        return TokenFacts(least, most, counts)

    return fact(tokens, ("tokens", image_token_id), look)


def tell_written(tokens: Tensor, image_token_id: int | None) -> None:
    """Note that a model itself chose the tokens, from its vocabulary and `<image>` never, so that no check looks."""
    tell(tokens, ("tokens", image_token_id), TokenFacts(0, 0, [0] * len(tokens)))


class MaskFacts(NamedTuple):
    """The most positions that a row has, whether all values are 0 or 1, and whether all are 1."""

    longest: int
    binary: bool
    whole: bool


def mask_facts(mask: Tensor) -> MaskFacts:
    """What an attention mask `[batch, pos]` is like."""
    return fact(mask, "mask", _look_at_mask)


def is_whole(mask: Tensor) -> bool:
    """Whether an attention mask hides nothing."""
    told = known(mask, WHOLE)
    return mask_facts(mask).whole if told is None else told


def _look_at_mask(mask: Tensor) -> MaskFacts:
    binary = ((mask == 0) | (mask == 1)).all()
    longest, fine, whole = torch.stack((mask.sum(-1).max().long(), binary.long(), mask.all().long())).tolist()
    return MaskFacts(longest, bool(fine), bool(whole))


def _held(tensor: Tensor) -> tuple[int | None, dict[Hashable, Any]]:
    return _KNOWN.get(tensor) or (None, {})


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
