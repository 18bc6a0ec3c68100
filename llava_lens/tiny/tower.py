"""What the tower is trained on: linear heads that read, from each patch's feature, what the patch shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llava_lens.tiny.layout import FEATURE_LAYER
from llava_lens.tiny.pictures import Pictures
from llava_lens.tiny.vocabulary import COLORS, SHAPES

# The features that are read later carry most of the loss; the last layer a little, so that it is not left random.
LAYERS = {FEATURE_LAYER: 1.0, -1: 0.2}
# Per attribute: how many values (the ground is one more), and the weight of its loss.
ATTRIBUTES = {"shape": (len(SHAPES), 1.0), "color": (len(COLORS), 1.0), "place": (9, 0.5)}
CENTER_WEIGHT, OFFSET_WEIGHT, GROUND_WEIGHT = 0.5, 0.3, 0.15


class PatchHeads(nn.Module):
    """One linear map per layer read: attributes of the object on the patch, is its centre here, and how far off."""

    def __init__(self, width: int):
        super().__init__()
        n_out = sum(n + 1 for n, _ in ATTRIBUTES.values()) + 3
        self.heads = nn.ModuleList(nn.Linear(width, n_out) for _ in LAYERS)

    def read(self, hidden: Sequence[Tensor]) -> list[Float[Tensor, "batch patch out"]]:
        """The heads' outputs, one per layer in `LAYERS`; the class token is left out."""
        return [head(hidden[layer][:, 1:]) for head, layer in zip(self.heads, LAYERS, strict=True)]

    def forward(self, hidden: Sequence[Tensor], pictures: Pictures, rows: Sequence[int]) -> Float[Tensor, ""]:
        device = hidden[0].device
        shown = torch.from_numpy(pictures.shown[list(rows)]).long().to(device)
        offset = torch.from_numpy(pictures.offset[list(rows)]).to(device)
        weighted = zip(self.read(hidden), LAYERS.values(), strict=True)
        return torch.stack([weight * _loss(out, shown, offset) for out, weight in weighted]).sum()


def _loss(
    out: Float[Tensor, "batch patch out"], shown: Int[Tensor, "batch patch 4"], offset: Float[Tensor, "batch patch 2"]
) -> Float[Tensor, ""]:
    on_object = shown[..., 0] >= 0
    weight = torch.where(on_object, 1.0, GROUND_WEIGHT)
    *logits, center, aim = out.split([n + 1 for n, _ in ATTRIBUTES.values()] + [1, 2], -1)
    total = OFFSET_WEIGHT * F.mse_loss(aim[on_object], offset[on_object])
    here = (shown[..., 3] == 1).float()
    total = total + CENTER_WEIGHT * F.binary_cross_entropy_with_logits(
        center[..., 0], here, pos_weight=torch.tensor(4.0, device=out.device)
    )
    for k, (logit, (_, share)) in enumerate(zip(logits, ATTRIBUTES.values(), strict=True)):
        loss = F.cross_entropy(logit.flatten(0, 1), (shown[..., k] + 1).flatten(), reduction="none")
        total = total + share * (loss * weight.flatten()).sum() / weight.sum()
    return total
