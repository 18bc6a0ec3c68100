"""Taking patches out of a picture, in three ways: in its pixels, in the image tokens, in everybody's attention.

Unusual: all three answer the same call, which patches each run keeps, so that whatever masks can be done with any.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from llava_lens.errors import LensError, nearest
from llava_lens.maps.case import MAX_BYTES, Case, Runs

Operator = Literal["pixel", "embedding", "attention"]
OPERATORS: dict[str, str] = {
    "pixel": "the patch's pixels become the picture's mean colour",
    "embedding": "the patch's image token becomes the mean of the picture's",
    "attention": "no position may attend to the patch's image token, in any layer",
}
"""What each does to a patch; the class token, where the model keeps it, stays."""


class Masking:
    """Runs of one case with some of its patches taken out by one operator.

    `max_bytes` bounds what a batch of runs holds, `bar` names the progress bar (none if empty). Raises `LensError` for
    an operator that does not exist.
    """

    def __init__(self, case: Case, operator: str = "embedding", *, max_bytes: int = MAX_BYTES, bar: str = ""):
        if operator not in OPERATORS:
            raise LensError(f"operator {operator!r}{nearest(operator, OPERATORS)}; expected {', '.join(OPERATORS)}")
        self.case, self.operator, self.max_bytes, self.bar = case, operator, max_bytes, bar

    @torch.no_grad()
    def run(self, kept: Bool[Tensor, "run patch"]) -> Runs:
        """One run for each row of `kept`; those patches stay, the others are taken out."""
        case = self.case
        if kept.ndim != 2 or kept.shape[1] != len(case.patches) or kept.dtype != torch.bool:
            raise LensError(f"kept {list(kept.shape)} of {kept.dtype}; expected booleans [run, {len(case.patches)}]")
        parts = kept.split(case.runs_at_once(self.operator == "pixel", max_bytes=self.max_bytes)) if len(kept) else ()
        shown = tqdm(parts, desc=self.bar, unit="batch", leave=False, disable=not self.bar or len(parts) < 2)
        each = [case.measure(self.logits(part)) for part in shown]
        case.count(forward=len(kept))
        if not each:
            return Runs(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long))
        return Runs(*(torch.cat(values) for values in zip(*each, strict=True)))

    def logits(self, kept: Bool[Tensor, "run patch"]) -> Float[Tensor, "run d_vocab"]:
        """Logits at the last position of a batch of runs, not counted."""
        if self.operator == "pixel":
            return self.case.from_pictures(masked_pictures(self.case, kept))
        if self.operator == "embedding":
            return self.case.from_stream(masked_streams(self.case, kept))
        seen = torch.ones(len(kept), self.case.inputs.n_pos, dtype=torch.long)
        seen[:, self.case.patches] = kept.long().cpu()
        stream = self.case.stream.repeat(len(kept), 1, 1)
        return self.case.from_stream(stream, seen.to(stream.device))


def masked_pictures(case: Case, kept: Bool[Tensor, "run patch"]) -> Float[Tensor, "run channel height width"]:
    """The picture with the pixels of all but some patches in its mean colour; those that no patch covers stay."""
    picture = case.picture
    grid = kept.reshape(-1, *case.grid).repeat_interleave(case.side, 1).repeat_interleave(case.side, 2)
    keep = torch.ones(len(kept), *picture.shape[-2:], dtype=torch.bool)
    keep[:, *case.area] = grid.cpu()
    mean = picture.mean((-2, -1), keepdim=True)
    return torch.where(keep[:, None].to(picture.device), picture, mean)


def masked_streams(case: Case, kept: Bool[Tensor, "run patch"]) -> Float[Tensor, "run pos d_model"]:
    """What enters the first layer with all but some image tokens replaced by the mean of the picture's patches."""
    stream = case.stream.repeat(len(kept), 1, 1)
    own = stream[:, case.patches]
    stream[:, case.patches] = torch.where(kept[..., None].to(own.device), own, own.mean(1, keepdim=True))
    return stream
