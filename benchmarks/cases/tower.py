"""The tower and the projector alone: pictures to what the decoder gets to see of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors, ours, truth, twins
from benchmarks.cases import Case, Found
from benchmarks.compare import Settings, Variant, compare
from benchmarks.models import SIZES, Size, batch_of, make_study
from benchmarks.rows import LeftOut

AGAINST = "llava_lens on the same weights in float64 (image features)"


def sizes(settings: Settings) -> list[tuple[Size, tuple[int, ...]]]:
    """Models and how many pictures each is given."""
    if settings.quick:
        return [(SIZES["toy"], (1, 2))]
    if settings.cuda:
        return [(SIZES["7b"], (1, 8, 32))]
    return [(SIZES["tower"], (1, 8))]


@torch.inference_mode()
def features(hf: Any, pixels: Tensor) -> Any:
    """Hugging Face's, one entry per picture."""
    return hf.model.get_image_features(pixels).pooler_output


def stacked(each: Any) -> Tensor:
    """One tensor of what may be a list."""
    return torch.stack(list(each))


def encode(settings: Settings) -> Found:
    """Every size and batch."""
    name = "tower/encode"
    for size, batches in sizes(settings):
        study = make_study(size, device=settings.device, dtype=settings.dtype)
        eager = twins.sharing(study.hf, "eager")
        for batch in batches:
            pixels = batch_of(study, batch).pixels
            assert pixels is not None
            with truth.in_float64(study.reference) as exact:
                wanted = ours.encode(exact, pixels.double())
            work = floors.tower(size, batch, settings.dtype.itemsize)
            variants = [
                Variant("hf sdpa", partial(features, study.hf, pixels), work=work, read=stacked),
                Variant("hf eager", partial(features, eager, pixels), work=work, read=stacked),
            ]
            for way, model in study.variants.items():
                variants.append(Variant(way, partial(ours.encode, model, pixels), work=work))
            params = {"size": size.name, "batch": batch}
            yield from compare(name, size, params, batch, variants, wanted, settings, AGAINST)
        yield from (LeftOut(name, way, why) for way, why in study.missing.items())
    yield LeftOut(name, "transformer_lens", "its bridge runs the tower inside a whole forward only, by Hugging Face's")


CASES = [Case("tower/encode", "pictures through the tower and the projector", encode)]
