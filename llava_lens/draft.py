"""The text that `generate` writes: as long as it may become from the start, and read by the model piece by piece.

Unusual: tokens, mask and positions lie in tensors made once, and what follows from how they were made is told, so that
no check looks at them; the host waits for a device only to learn whether every row has ended.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llava_lens.facts import is_whole, mask_facts, tell, tell_written
from llava_lens.graphs import WORTHWHILE
from llava_lens.inputs import Inputs
from llava_lens.kv_cache import KVCache
from llava_lens.rotary import REACH


class Draft:
    """A text that grows, in tensors as long as it may become: its tokens, their positions, and which rows go on.

    `watched` means that foreign code runs between steps, which may attach hooks or edit weights.
    """

    def __init__(
        self, model: Any, prompt: Inputs, stop: list[int], new: int, use_kv_cache: bool = True, watched: bool = True
    ):
        mask = prompt.attention_mask
        self.prompt = replace(prompt, attention_mask=None) if mask is not None and is_whole(mask) else prompt
        self.model, self.stop, self.length, self.watched = model, stop, prompt.n_pos, watched
        batch, capacity, device = prompt.batch_size, prompt.n_pos + new, prompt.tokens.device
        self.text = F.pad(prompt.tokens.long(), (0, new))
        self.mask = padded_beyond(self.prompt, new)
        self.positions = model.positions(self.prompt, self.mask, new)
        self.longest = longest_row(prompt)
        worthwhile = use_kv_cache and new >= WORTHWHILE and not model.follows_inputs
        self.fixed = model.graphs.step(model, batch, capacity) if worthwhile else None
        own = KVCache(model.cfg.n_layers, capacity) if use_kv_cache and self.fixed is None else None
        self.past = own if self.fixed is None else self.fixed.past
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        self.stop_here = torch.tensor(stop, dtype=torch.long, device=device)
        pad = model.cfg.pad_token_id
        self.pad_id = (stop or [0])[0] if pad is None else pad
        self.can_tell = not stop or (0 <= self.pad_id < model.cfg.d_vocab and self.pad_id != model.cfg.image_token_id)

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.fixed is not None:
            self.fixed.busy = False

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Prompt and what is written so far."""
        return self.text[:, : self.length]

    def logits(self) -> Float[Tensor, "batch d_vocab"]:
        """What the model predicts next; with a KV cache only the positions it has not seen are run."""
        logits = self.replayed()
        if logits is not None:
            return logits.float()
        seen = 0 if self.past is None else self.past.length
        written = self.length - self.prompt.n_pos
        positions = None
        if self.positions is not None:
            positions = self.positions[..., seen : self.length]
            if not self.model.follows_inputs:
                tell(positions, REACH, (0, self.longest + written - 1))
        logits = self.model(
            self.inputs(seen) if written else self.prompt,
            past_kv_cache=self.past,
            position_ids=positions,
            logits_to_keep=1,
        )
        return logits[:, -1].float()

    def replayed(self) -> Float[Tensor, "batch d_vocab"] | None:
        """The next logits by a step that is recorded once; None where none is, or while somebody listens."""
        fixed = self.fixed
        if fixed is None or self.length == self.prompt.n_pos or not self.can_tell:
            return None
        is_ahead = fixed.written == self.length - 1
        check = self.watched or not is_ahead
        if check and not self.model.graphs.fits(self.model):
            if is_ahead:
                fixed.hand_over()
            return None
        if not is_ahead:
            fixed.start()
        return fixed.step(self.text[:, self.length - 1 : self.length], check)

    def inputs(self, seen: int) -> Inputs:
        """The text behind the first `seen` positions; what is not seen at all is the prompt with its picture."""
        tokens = self.text[:, seen : self.length]
        if not seen:
            mask = None if self.mask is None else self.mask[:, : self.length]
            return Inputs(tokens, self.prompt.pixels, mask, None, self.prompt.extras_over(self.length))
        if self.can_tell:
            tell_written(tokens, self.model.cfg.image_token_id)
        return Inputs(tokens)  # the cache remembers the padding

    def append(self, new: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Put one token behind each row (the padding id behind finished ones); returns what was put."""
        if self.stop:
            new = torch.where(self.unfinished, new, self.pad_id)
            self.unfinished &= (new[:, None] != self.stop_here).all(-1)
        self.text[:, self.length] = new
        self.length += 1
        return new

    def is_finished(self) -> bool:
        """Whether every row has ended; the one place where the host waits for the new tokens."""
        return bool(self.stop) and not bool(self.unfinished.any())

    def written(self, start: int) -> list[list[int]]:
        """Each row's tokens from position `start` up to its stop token, that included."""
        rows = []
        for row in self.tokens[:, start:].tolist():
            end = next((i for i, token in enumerate(row) if token in self.stop), len(row))
            rows.append(row[: end + 1])
        return rows


def longest_row(prompt: Inputs) -> int:
    """Positions of the longest row, padding not counted."""
    return prompt.n_pos if prompt.attention_mask is None else mask_facts(prompt.attention_mask).longest


def padded_beyond(prompt: Inputs, new: int) -> Int[Tensor, "batch pos"] | None:
    """The mask of prompt and `new` more tokens, None where there is none."""
    mask = prompt.attention_mask
    return None if mask is None else F.pad(mask.long(), (0, new), value=1)
