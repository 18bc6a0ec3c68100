"""The tower and the projector alone: pictures to what the decoder gets to see of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import floors, ours, truth, twins
from benchmarks.cases import Case
from benchmarks.cases.forward import steady
from benchmarks.cases.sweeps import Found
from benchmarks.compare import Settings, Variant, compare
from benchmarks.models import SIZES, Size, batch_of, make_study
from benchmarks.rows import LeftOut

AGAINST = "llava_lens on the same weights in float64 (image features)"


def sizes(settings: Settings) -> list[tuple[Size, tuple[int, ...]]]:
    """Models and how many pictures each is given."""
    if settings.quick:
        return [(SIZES["toy"], (1, 2))]
    if settings.device.startswith("cuda"):
        return [(SIZES["7b"], (1, 8, 32))]
    return [(SIZES["tower"], (1, 8))]


@torch.inference_mode()
def features(hf: object, pixels: Tensor) -> Tensor:
    """Hugging Face's, `[image, feature, d_model]`."""
    return torch.stack(list(hf.model.get_image_features(pixels).pooler_output))  # type: ignore[attr-defined]


def encode(settings: Settings) -> Found:
    """Every size and batch."""
    name, found = "tower/encode", []
    for size, batches in sizes(settings):
        study = make_study(size, device=settings.device, dtype=settings.dtype)
        for batch in batches:
            pixels = batch_of(study, batch).pixels
            assert pixels is not None
            with truth.in_float64(study.model) as exact:
                wanted = ours.encode(exact, pixels.double())
            work = floors.tower(size, batch, settings.dtype.itemsize)
            variants = [
                Variant("hf sdpa", partial(features, study.hf, pixels), work=work),
                Variant("hf eager", partial(features, twins.sharing(study.hf, "eager"), pixels), work=work),
                Variant("llava_lens", partial(ours.encode, study.model, pixels), work=work),
            ]
            params = {"size": size.name, "batch": batch}
            found += compare(name, size, params, batch, variants, wanted, steady(settings, size), AGAINST)
    reason = "its bridge runs the tower inside a whole forward only, through Hugging Face's own modules"
    return [*found, LeftOut(name, "transformer_lens", reason)]


CASES = [Case("tower/encode", "pictures through the tower and the projector", encode)]
