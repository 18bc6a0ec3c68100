"""Taking patches out of a picture, in three ways: in its pixels, in the image tokens, in everybody's attention.

Unusual: all three answer the same call, which patches each run keeps, so that whatever masks can be done with any.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from llava_lens.errors import LensError, nearest
from llava_lens.maps.case import Case, Runs

Operator = Literal["pixel", "embedding", "attention"]
OPERATORS: dict[str, str] = {
    "pixel": "the patch's pixels become the picture's mean colour",
    "embedding": "the patch's image token becomes the mean of the picture's",
    "attention": "no position may attend to the patch's image token, in any layer",
}
MAX_BYTES = 2**27
"""What one batch of masked runs may hold in activations."""


class Masking:
    """Runs of one case with some of its patches taken out by one operator.

    Raises `LensError` for an operator that does not exist.
    """

    def __init__(self, case: Case, operator: Operator = "embedding", *, max_bytes: int = MAX_BYTES, bar: str = ""):
        if operator not in OPERATORS:
            raise LensError(f"operator {operator!r}{nearest(operator, OPERATORS)}; expected {', '.join(OPERATORS)}")
        self.case, self.operator, self.max_bytes, self.bar = case, operator, max_bytes, bar

    @torch.no_grad()
    def run(self, kept: Bool[Tensor, "run patch"]) -> Runs:
        """One run for each row of `kept`; those patches stay, the others are taken out."""
        case = self.case
        if kept.ndim != 2 or kept.shape[1] != len(case.patches) or kept.dtype != torch.bool:
            raise LensError(f"kept {list(kept.shape)} of {kept.dtype}; expected booleans [run, {len(case.patches)}]")
        parts = kept.split(self.rows_at_once())
        shown = tqdm(parts, desc=self.bar, unit="batch", leave=False, disable=not self.bar or len(parts) < 2)
        each = [case.measure(self.logits(part.to(case.model.cfg.device))) for part in shown]
        case.count(forward=len(kept))
        if not each:
            return Runs(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long))
        return Runs(*(torch.cat(values) for values in zip(*each, strict=True)))

    def rows_at_once(self) -> int:
        """How many runs fit the budget: stream, projections and MLP of every position, logits of one."""
        cfg, itemsize = self.case.model.cfg, self.case.model.embed.weight.element_size()
        row = self.case.inputs.n_pos * (6 * cfg.d_model + 3 * cfg.d_mlp + cfg.n_heads * self.case.inputs.n_pos)
        if self.operator == "pixel" and cfg.vision is not None:
            v = cfg.vision
            row += self.case.roles.n_images * v.n_ctx * (6 * v.d_model + 3 * v.d_mlp + v.n_heads * v.n_ctx)
        return max(1, self.max_bytes // (itemsize * (row + 3 * cfg.d_vocab)))

    def logits(self, kept: Bool[Tensor, "run patch"]) -> Float[Tensor, "run d_vocab"]:
        """Logits at the last position of a batch of runs."""
        return getattr(self, f"_{self.operator}")(kept)[:, -1]

    def _pixel(self, kept: Tensor) -> Tensor:
        case, pixels, n = self.case, self.case.inputs.pixels, len(kept)
        assert pixels is not None
        several = pixels[None].repeat(n, *[1] * pixels.ndim)
        picture = pixels[case.image]
        keep = self.in_pixels(kept, picture)
        mean = picture.mean((-2, -1), keepdim=True)
        several[:, case.image] = torch.where(keep[:, None], picture, mean)
        tokens = case.inputs.tokens.repeat(n, 1)
        return case.model(
            replace(case.inputs, tokens=tokens, pixels=several.flatten(0, 1), roles=None), logits_to_keep=1
        )

    def in_pixels(self, kept: Bool[Tensor, "run patch"], picture: Tensor) -> Bool[Tensor, "run height width"]:
        """The pixels of the patches that stay; those that no patch covers stay too."""
        rows, cols = self.case.grid
        side = self.case.model.cfg.vision.patch_size
        grid = kept.reshape(-1, rows, cols).repeat_interleave(side, 1).repeat_interleave(side, 2)
        out = torch.ones(len(kept), *picture.shape[-2:], dtype=torch.bool, device=kept.device)
        out[:, : grid.shape[1], : grid.shape[2]] = grid
        return out

    def _embedding(self, kept: Tensor) -> Tensor:
        patches = self.case.patches
        stream = self.stream().repeat(len(kept), 1, 1)
        own = stream[:, patches]
        stream[:, patches] = torch.where(kept[..., None], own, own.mean(1, keepdim=True))
        return self.case.model(stream, start_at_layer=0, logits_to_keep=1)

    def _attention(self, kept: Tensor) -> Tensor:
        n, length = len(kept), self.case.inputs.n_pos
        mask = torch.ones(n, length, dtype=torch.long, device=kept.device)
        mask[:, self.case.patches] = kept.long()
        stream = self.stream().repeat(n, 1, 1)
        positions = torch.arange(length, device=kept.device)[None]
        return self.case.model(stream, start_at_layer=0, attention_mask=mask, position_ids=positions, logits_to_keep=1)

    def stream(self) -> Float[Tensor, "1 pos d_model"]:
        """What enters the first layer, made once."""
        if not hasattr(self, "_stream"):
            self._stream = self.case.model.embed_inputs(self.case.inputs)
        return self._stream
