"""Keys and values of the tokens seen so far, so that a later step runs only what is new.

Unusual: with gradients off they lie in room that is made once (or doubled) and written in place. What was handed out
keeps its values: only places behind it are written, and only where the cache itself handed it out last. While
gradients are on, or where an entry was put in by hand, old and new are joined into new tensors instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from llava_lens.errors import LensError
from llava_lens.facts import WHOLE, is_whole, tell

Keys = Float[Tensor, "batch kv_head pos d_head"]
Entry = tuple[Tensor, Tensor]
SMALLEST = 512
"""Positions that a cache with a known capacity makes room for at least, or for the capacity if that is less."""


class Room(NamedTuple):
    """Memory for one layer's keys and values, and the entry that shows its used part."""

    k: Keys
    v: Keys
    shown: Entry | None = None


class KVCache:
    """Rotated keys and values of the tokens seen so far, `[batch, kv_head, pos, d_head]` per layer.

    `capacity` is how many positions are to come, if that is known: room for them is made at the first write, but for
    no more than twice what that holds. `following` is the next rotary position of each row, `[batch, 1]`, where those
    are not simply counted.
    """

    def __init__(self, n_layers: int, capacity: int | None = None):
        self.capacity = capacity
        self.entries: list[Entry | None] = [None] * n_layers
        self.rooms: list[Room | None] = [None] * n_layers
        self.attention_mask: Tensor | None = None
        self.following: Tensor | None = None
        self._seen: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def length(self) -> int:
        """Positions held, by any layer (a run that starts at a later one leaves the earlier ones empty)."""
        return next((entry[0].shape[2] for entry in self.entries if entry is not None), 0)

    def held_by(self, first: int, last: int) -> int:
        """Positions held by every layer from `first` up to `last`. Raises `LensError` where a run broke off between."""
        lengths = {0 if entry is None else entry[0].shape[2] for entry in self.entries[first:last]}
        if len(lengths) > 1:
            raise LensError(
                f"layers {first} … {last - 1} of the cache hold {min(lengths)} to {max(lengths)} positions: a run "
                "broke off, or left some out; start again with a new KVCache"
            )
        return lengths.pop() if lengths else self.length

    def extend_mask(
        self, mask: Tensor | None, new: Shaped[Tensor, "batch pos *width"], seen: int | None = None
    ) -> Tensor | None:
        """The mask `[batch, seen + pos]`; one of the new positions alone, or None, goes behind the remembered one.

        `seen` is how many positions are held, `length` by default. What is remembered beyond them is of a run that
        broke off, or of earlier layers that have seen the new positions already.
        """
        seen = self.length if seen is None else seen
        past, (batch, length) = self.attention_mask, new.shape[:2]
        if past is not None and past.shape[1] > seen:
            mask = past[:, : seen + length] if mask is None and past.shape[1] >= seen + length else mask
            past = past[:, :seen]
        if seen and not (mask is None and past is None) and (mask is None or mask.shape[1] == length):
            if past is None:
                past = mask.new_ones(batch, seen)  # type: ignore[union-attr]
                tell(past, WHOLE, True)
            mask = self._behind(past, mask, length)
        self.attention_mask = mask
        return mask

    def _behind(self, past: Tensor, mask: Tensor | None, length: int) -> Tensor:
        whole = is_whole(past) and (mask is None or is_whole(mask))
        start, stop = past.shape[1], past.shape[1] + length
        room, shown = self._seen
        if room is None or shown is not past or room.shape[1] < stop or _is_closed(room):
            room = past.new_ones(len(past), self._size(stop))
            room[:, :start] = past
        if mask is not None:
            if len(mask) != len(past):
                raise LensError(f"an attention_mask of {len(mask)} rows behind one of {len(past)}")
            room[:, start:stop] = mask
        shown = room[:, :stop]
        if not (whole and shown.is_inference()):  # then no edit would end the fact
            tell(shown, WHOLE, whole)
        self._seen = (room, shown)
        return shown

    def extend(self, layer: int, k: Keys, v: Keys) -> Entry:
        """Append one layer's new keys and values; returns all of them. Raises `LensError` if they do not fit."""
        held = self.entries[layer]
        if held is not None and not _fits(held[0], k):
            given, there = (f"{tuple(keys.shape)} {keys.dtype} on {keys.device}" for keys in (k, held[0]))
            raise LensError(f"keys {given} cannot stand behind {there} in the cache; only positions may differ")
        if not torch.is_grad_enabled() and (held is not None or self.capacity is not None):
            entry = self._write(layer, held, k, v)
        else:
            entry = (k, v) if held is None else (torch.cat((held[0], k), dim=2), torch.cat((held[1], v), dim=2))
        self.entries[layer] = entry
        return entry

    def _write(self, layer: int, held: Entry | None, k: Keys, v: Keys) -> Entry:
        start = 0 if held is None else held[0].shape[2]
        stop, room = start + k.shape[2], self.rooms[layer]
        if room is None or room.shown is not held or room.k.shape[2] < stop or _is_closed(room.k):
            shape = (*k.shape[:2], self._size(stop), k.shape[3])
            room = Room(k.new_zeros(shape), v.new_zeros(shape))
            if held is not None:
                room.k[:, :, :start], room.v[:, :, :start] = held
        room.k[:, :, start:stop], room.v[:, :, start:stop] = k, v
        entry = room.k[:, :, :stop], room.v[:, :, :stop]
        self.rooms[layer] = Room(room.k, room.v, entry)
        return entry

    def _size(self, needed: int) -> int:
        if self.capacity is None or self.capacity < needed:
            return 2 * needed
        return min(self.capacity, max(2 * needed, SMALLEST))

    def attend(self, attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """Mix the values of all positions, those held and the new ones, which are held from now on."""
        k, v = self.extend(attention.layer, k, v)
        return attention.attend(q, k, v, mask)


def _fits(held: Tensor, new: Tensor) -> bool:
    alike = held.dtype == new.dtype and held.device == new.device
    return alike and held.shape[:2] == new.shape[:2] and held.shape[3] == new.shape[3]


def _is_closed(room: Tensor) -> bool:
    """Made in inference mode, and so never to be written outside it."""
    return room.is_inference() and not torch.is_inference_mode_enabled()
