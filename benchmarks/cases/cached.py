"""What keeping activations costs: `run_with_cache` of everything and of five names, beside forwards that keep none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors, ours, truth, twins
from benchmarks.bridge import Bridge
from benchmarks.cases import Case
from benchmarks.cases.forward import AGAINST
from benchmarks.cases.sweeps import Found
from benchmarks.compare import Settings, Variant, compare
from benchmarks.floors import Work
from benchmarks.models import SIZES, Size, make_study
from llava_lens import Inputs

Keep = Callable[[], tuple[Tensor, Iterable[Tensor]]]
"""The last logits, and what is kept beside them."""


def size_for(settings: Settings) -> Size:
    """The model that is run."""
    return SIZES["toy" if settings.quick else "7b" if settings.device.startswith("cuda") else "gemm"]


def handful(size: Size) -> list[str]:
    """Five names that llava_lens and TransformerLens both have."""
    middle = f"blocks.{size.layers // 2}."
    inside = [middle + each for each in ("hook_resid_pre", "attn.hook_z", "attn.hook_pattern", "hook_mlp_out")]
    return [*inside, f"blocks.{size.layers - 1}.hook_resid_post"]


def bytes_held(kept: Iterable[Tensor]) -> int:
    """Bytes of the memory behind some tensors, what several of them share counted once."""
    stores = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    return sum(stores.values())


@torch.inference_mode()
def with_outputs(hf: Any, inputs: Inputs) -> tuple[Tensor, Iterable[Tensor]]:
    """Hugging Face's own way to keep something: attentions and hidden states."""
    wanted = dict(output_attentions=True, output_hidden_states=True)
    out = hf(**inputs.for_hf(), logits_to_keep=1, use_cache=False, **wanted)
    return out.logits[:, -1], [*out.attentions, *out.hidden_states]


def values(run: Callable[..., tuple[Tensor, Any]], *args: Any) -> tuple[Tensor, Iterable[Tensor]]:
    """A cache's tensors."""
    logits, cache = run(*args)
    own = getattr(cache.cache_dict, "tensors", cache.cache_dict.values)  # what is held, with nothing formed for it
    return logits, list(own())


def keep(settings: Settings) -> Found:
    """Batch 1."""
    size = size_for(settings)
    study = make_study(size, device=settings.device, dtype=settings.dtype)
    inputs, bridge, names = study.clean, Bridge(study), handful(size)
    own = partial(values, ours.cached, study.model, inputs)
    theirs = partial(values, bridge.cached, inputs)
    ways: dict[str, Keep] = {
        "llava_lens forward": lambda: (ours.last_logits(study.model, inputs), ()),
        "llava_lens everything": own,
        "llava_lens no result": lambda: own(lambda name: not name.endswith("hook_result")),
        "llava_lens 5 names": lambda: own(names),
        "hf eager outputs": partial(with_outputs, twins.sharing(study.hf, "eager"), inputs),
        "transformer_lens everything": theirs,
        "transformer_lens 5 names": lambda: theirs(names),
    }
    work = floors.prefill(size, 1, settings.dtype.itemsize)
    variants = []
    for way, run in ways.items():
        held = bytes_held(run()[1])
        least = work + Work(bytes=held)
        variants.append(Variant(way, lambda run=run: run()[0], work=least, held_bytes=held or None))
    exact = truth.last_logits(study.model, inputs)
    return [*compare("cached/run", size, {"size": size.name}, 1, variants, exact, settings, AGAINST)]


CASES = [Case("cached/run", "a forward that keeps everything, or five activations, or none", keep)]
