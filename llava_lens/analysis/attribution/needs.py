"""What an analysis asks of its arguments and of a cache, checked before anything is computed.

Unusual: entries are compared with the axes that the model's own hooks declare, so another model's cache is refused by
name instead of failing, or going through, somewhere in the arithmetic.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError, nearest
from llava_lens.record import BY_IMAGE, TOWER

STREAM = "blocks.0.hook_resid_pre"
"""Where the decoder's stream starts: what every position of the prompt is counted by."""
ROUNDING, LEAST = 8, 2e-3
"""Two ways to form a sum may differ by so many units of rounding, or by TF32's, relative to what it is as long as."""
CHANGED = "the model's weights changed after the run, it is another model's cache, or a hook edited it"


def slack(*dtypes: torch.dtype) -> float:
    """How far two ways to form a sum may differ, relative to what it is as long as."""
    return max(LEAST, *(ROUNDING * torch.finfo(dtype).eps for dtype in dtypes))


def last_stream(model: Any) -> str:
    """The name of the stream that the final norm reads."""
    return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"


def stack_names(model: Any, table: Mapping[Any, tuple[str, ...]], asked: Sequence[Any], what: str = "by") -> list[str]:
    """Where the decoder's stream starts and ends, and between them what the asked questions read of every block.

    Raises `LensError` for a question that the table does not know, and for none.
    """
    one_of(what, asked, table)
    suffixes = dict.fromkeys(suffix for each in asked for suffix in table[each])
    blocks = [f"blocks.{layer}.{suffix}" for layer in range(model.cfg.n_layers) for suffix in suffixes]
    return list(dict.fromkeys([STREAM, *blocks, last_stream(model)]))


def one_of(what: str, given: Sequence[Any], known: Iterable[Any], where: str = "") -> None:
    """Raise `LensError` for a choice that there is not, with the nearest, and where nothing is chosen."""
    choices = list(known)
    shown = (" or " if len(choices) == 2 else ", ").join(map(repr, choices))
    if not given:
        raise LensError(f"no {what} given; expected {shown}")
    for each in given:
        if not isinstance(each, Hashable) or not any(type(each) is type(c) and each == c for c in choices):
            hint = nearest(str(each), [c for c in choices if isinstance(c, str)])
            raise LensError(f"{what}={each!r}{where}; expected {shown}{hint}")


def whole(what: str, given: Any, low: int, high: int | None = None) -> int:
    """A whole number in a range, numpy's and torch's too; raises `LensError` for anything else."""
    try:
        number = None if isinstance(given, bool) else operator.index(given)
    except (TypeError, RuntimeError, ValueError):
        number = None
    if number is None or number < low or (high is not None and number > high):
        there = f"{low} … {high}" if high is not None else f"{low} or more"
        raise LensError(f"{what}{'' if what.endswith('=') else ' '}{given!r}; expected {there}")
    return number


def many(given: Any) -> list[Any] | None:
    """What a sequence or an array holds as a list, None for a single thing; a word is one."""
    single = isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable)
    return None if single or getattr(given, "ndim", 1) == 0 else list(given)


def model_of(cache: Any) -> Any:
    """The model of a cache; raises `LensError` for what is no cache of a whole run."""
    if not isinstance(cache, LlavaCache):
        raise LensError(f"{type(cache).__name__} given; expected a cache: _, cache = model.run_with_cache(inputs)")
    return cache.model


def need(cache: LlavaCache, names: Iterable[str], call: str) -> None:
    """Raise `LensError` for entries that the cache lacks, naming them, and for those that do not fit the model.

    `call` is what names them all, as `names_for(model, 'head')`.
    """
    wanted = list(dict.fromkeys(names))
    missing = [name for name in wanted if name not in cache]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise LensError(
            f"the cache lacks {shown}; run with names_filter={call} (llava_lens.analysis.{call.split('(')[0]}), "
            "or without a filter"
        )
    _fits(cache, wanted)


def _fits(cache: LlavaCache, names: Iterable[str]) -> None:
    """Raise `LensError` for an entry whose widths are not the model's, or one of a layer that it does not have."""
    cfg = cache.model.cfg
    for prefix, own in (("", cfg), (TOWER, cfg.vision)):
        beyond = f"{prefix}blocks.{own.n_layers}." if own is not None else prefix
        deeper = next((name for name in cache.cache_dict if name.startswith(beyond)), None)
        if deeper is not None:
            layers = f"{own.n_layers} layers" if own is not None else "no vision tower"
            raise LensError(f"the cache holds {deeper!r}, and the model has {layers}: it is another model's cache")
    for name in names:
        own: Any = cfg.vision if name.startswith(TOWER) else cfg
        width = {"head": own.n_heads, "kv_head": own.n_key_value_heads, "d_head": own.d_head, "d_mlp": own.d_mlp}
        width |= {"d_model": own.d_model, "1": 1}
        if cfg.vision is not None:
            merged = (
                cfg.vision.d_merged if name.startswith("projector.") else cfg.vision.d_merged // cfg.vision.merge**2
            )
            width |= {"d_features": merged}
        axes = cache.model.hook(name).axes.split()
        counted = cache.has_image_dim if name.startswith(BY_IMAGE) else cache.has_batch_dim
        axes, shape = axes if counted else axes[1:], tuple(cache.shape(name))
        if len(shape) != len(axes) or any(width.get(a, size) != size for a, size in zip(axes, shape, strict=True)):
            expected = ", ".join(f"{a} {width[a]}" if width.get(a, 1) != 1 else a for a in axes)
            raise LensError(
                f"{name!r} is {list(shape)}; this model's has [{expected}]: it is another model's cache, "
                "or the batch axis is not where the cache says"
            )
