"""What keeping activations costs: `run_with_cache` of everything and of five names, beside forwards that keep none.

Unusual: what is kept is let go of after the time, and counted by the memory behind it, shared memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors, ours, tracing, truth, twins
from benchmarks.bridge import Bridge
from benchmarks.cases import Case, Found
from benchmarks.cases.forward import AGAINST
from benchmarks.compare import Settings, Variant, compare, parted
from benchmarks.floors import Work
from benchmarks.models import SIZES, Size, Study, make_study
from llava_lens import Inputs

Keep = Callable[[], tuple[Tensor, Iterable[Tensor]]]
"""The last logits, and what is kept beside them."""


def size_for(settings: Settings) -> Size:
    """The model that is run."""
    return SIZES["toy" if settings.quick else "7b" if settings.cuda else "gemm"]


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


def kept(run: Callable[..., tuple[Tensor, Any]], *args: Any) -> tuple[Tensor, Iterable[Tensor]]:
    """A cache's tensors; an entry that is worked out when asked for is held as what it is made from."""
    logits, cache = run(*args)
    entries = cache.cache_dict
    return logits, list(getattr(entries, "tensors", entries.values)())


def ways(study: Study, size: Size) -> dict[str, Keep | str]:
    """Every way to keep something, or why it is missing."""
    inputs, names, bridge = study.clean, handful(size), Bridge(study)
    theirs = partial(kept, bridge.cached, inputs)
    found: dict[str, Keep | str] = {
        "hf eager outputs": partial(with_outputs, twins.sharing(study.hf, "eager"), inputs),
        "transformer_lens everything": theirs,
        "transformer_lens 5 names": lambda: theirs(names),
        "nnsight 5 names": tracing.MISSING or partial(tracing.Traced(study.hf).five, inputs),
    }
    for way, model in study.variants.items():
        own = partial(kept, ours.cached, model, inputs)
        found |= {
            f"{way} forward": lambda model=model: (ours.last_logits(model, inputs), ()),
            f"{way} everything": own,
            f"{way} no result": lambda own=own: own(lambda name: not name.endswith("hook_result")),
            f"{way} 5 names": lambda own=own: own(names),
        }
    return found | study.missing


def keep(settings: Settings) -> Found:
    """Batch 1."""
    size = size_for(settings)
    study = make_study(size, device=settings.device, dtype=settings.dtype)
    work = floors.prefill(size, 1, settings.dtype.itemsize)
    runs, left_out = parted("cached/run", ways(study, size))
    yield from left_out
    variants = []
    for way, run in runs.items():
        held = bytes_held(run()[1])
        variants.append(Variant(way, run, work=work + Work(bytes=held), held_bytes=held or None, read=itemgetter(0)))
    exact = truth.last_logits(study.reference, study.clean)
    yield from compare("cached/run", size, {"size": size.name}, 1, variants, exact, settings, AGAINST)


CASES = [Case("cached/run", "a forward that keeps everything, or five activations, or none", keep)]
