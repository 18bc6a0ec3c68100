"""Rotary positions: cosines and sines, computed once per table and then only looked up.

Unusual: the host must know how far positions reach before a table (or a scaling that depends on the length) can serve
them. Where finding out would make it wait for a GPU and nothing depends on it, they are computed anew, to the same bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from llava_lens.config import DecoderConfig
from llava_lens.facts import fact, known

REACH = "reach"
"""Fact about a tensor of positions: the smallest and the largest."""
MOST_TABLES = 4
SMALLEST = 256
"""Positions in the shortest table."""


class Angles(NamedTuple):
    """Rotary cosines and sines, `[#batch, 1, pos, d_head]` each."""

    cos: Tensor
    sin: Tensor


class Rotary(nn.Module):
    """Cosines and sines for token positions, in float32 whatever the model's dtype is, for every rope scaling."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.cfg = cfg
        self._frequencies: dict[int | None, tuple[Tensor, float]] = {}
        self._tables: dict[tuple[int | None, torch.dtype, torch.device], Angles] = {}

    def forward(self, positions: Int[Tensor, "#batch pos"], dtype: torch.dtype) -> Angles:
        """Angles of given positions."""
        ask = self.depends_on_length or not positions.is_cuda
        reach = fact(positions, REACH, _reach) if ask else known(positions, REACH)
        length = self.cfg.rope_length(reach[1] + 1) if self.depends_on_length else None
        table = None
        if reach is not None and reach[0] >= 0:
            table = self._table(length, reach[1] + 1, dtype, positions.device)
        if table is None:
            return self._compute(positions, length, dtype)
        return Angles(*(rows[0, 0][positions.long()][:, None] for rows in table))

    def span(self, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Angles:
        """Angles of the positions `start … stop - 1`, one row for every batch."""
        length = self.cfg.rope_length(stop) if self.depends_on_length else None
        table = self._table(length, stop, dtype, device)
        if table is None:
            return self._compute(torch.arange(start, stop, device=device)[None], length, dtype)
        return Angles(*(rows[:, :, start:stop] for rows in table))

    def _table(self, length: int | None, stop: int, dtype: torch.dtype, device: torch.device) -> Angles | None:
        """Angles of at least the first `stop` positions; None where no table would serve twice, or be too long."""
        if stop > 2 * max(self.cfg.n_ctx, SMALLEST) or (length is not None and "dynamic" in self.cfg.rope["rope_type"]):
            return None
        key = (length, dtype, device)
        table = self._tables.get(key)
        if table is None or table.cos.shape[2] < stop:
            size = max(SMALLEST, 1 << (stop - 1).bit_length())
            if len(self._tables) >= MOST_TABLES:
                self._tables.clear()
            with torch.inference_mode(False), torch.no_grad():  # so that a later run with gradients may use it
                table = self._compute(torch.arange(size, device=device)[None], length, dtype)
            self._tables[key] = table
        return table

    def _compute(self, positions: Int[Tensor, "#batch pos"], length: int | None, dtype: torch.dtype) -> Angles:
        if length not in self._frequencies:
            if len(self._frequencies) >= MOST_TABLES:
                self._frequencies.clear()
            self._frequencies[length] = self.cfg.rope_frequencies(length)
        inv_freq, factor = self._frequencies[length]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inv_freq = inv_freq.to(positions.device, wide)
        angles = positions[:, None, :, None].to(wide) * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return Angles((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))

    @property
    def tables(self) -> list[Angles]:
        """The tables in use now; a longer one may take the place of one of them."""
        return list(self._tables.values())

    @property
    def depends_on_length(self) -> bool:
        """Whether the angle of a position changes with the length of the text."""
        return self.cfg.rope.get("rope_type", "default") in ("dynamic", "longrope")


def _reach(positions: Tensor) -> tuple[int, int]:
    low, high = torch.aminmax(positions)
    return int(low), int(high)
