"""Running a model with hooks and with a cache, failing closed where the base class fails silently.

A name that no hook carries raises, and so does a hook that never fired although the model ran (a tower hook on a
text-only input, a layer above `stop_at_layer`): an edit that cannot take effect is never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from llava_lens.inputs import Inputs
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.utilities import Slice

from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError, UnknownHook, nearest
from llava_lens.hooks import Hook, reader

HookFn = Callable[..., Any]
HookName = str | Callable[[str], bool]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


class HookedModel(HookedRootModule):
    """A `HookedRootModule` whose hooks are all `Hook`s and whose `run_with_cache` returns a `LlavaCache`."""

    cfg: Any
    n_runs: int = 0
    inputs_seen: Inputs | None = None

    def hook(self, name: str) -> Hook:
        """The hook called `name`; raises `UnknownHook` with the nearest names."""
        found = self.hook_dict.get(name)
        if not isinstance(found, Hook):
            raise UnknownHook(f"no hook is called {name!r}{nearest(name, self.hook_dict)}")
        return found

    def hook_names(self, wanted: NamesFilter) -> list[str]:
        """The names that a filter selects (all for None); a name without a hook, or an empty choice, raises."""
        if wanted is None:
            return list(self.hook_dict)
        if callable(wanted):
            names = [name for name in self.hook_dict if wanted(name)]
        else:
            names = [self.hook(name).name or name for name in ([wanted] if isinstance(wanted, str) else wanted)]
        if not names:
            raise UnknownHook(f"the filter {wanted!r} selects none of the {len(self.hook_dict)} hooks")
        return names

    def add_hook(self, name: HookName, hook: HookFn, *args: Any, **kwargs: Any) -> None:
        """Attach `hook` until `reset_hooks`, as in TransformerLens; an unknown name raises `UnknownHook`."""
        self.hook_names(name)
        super().add_hook(name, hook, *args, **kwargs)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[HookName, HookFn]] = (),
        bwd_hooks: Sequence[tuple[HookName, HookFn]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedModel]:
        """Hold hooks for the duration of a `with` block; they are gone after it, also when it raises.

        `fwd_hooks` and `bwd_hooks` are lists of `(name or predicate, fn(activation, hook))`. Raises `UnknownHook` for
        a name without a hook, and at the end for a forward hook that never fired although the model ran.
        """
        expected = [self.hook_names(name) for name, _ in fwd_hooks]
        for name, _ in bwd_hooks:
            self.hook_names(name)
        fired = {name: self.hook(name).fired for names in expected for name in names}
        runs = self.n_runs
        with super().hooks(list(fwd_hooks), list(bwd_hooks), reset_hooks_end, clear_contexts):
            yield self
        silent = [names[0] for names in expected if all(self.hook(name).fired == fired[name] for name in names)]
        if silent and self.n_runs > runs:
            raise UnknownHook(f"{', '.join(map(repr, silent))} never fired: {self.why_silent(silent[0])}")

    def why_silent(self, name: str) -> str:
        """A guess for the message of a hook that never fired."""
        if name.startswith(("vision.", "projector.")):
            return "no picture went through the tower in this run"
        return "the run did not reach it (start_at_layer / stop_at_layer)"

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        metric: Callable[[Tensor], Tensor] | None = None,
        pos_slice: Any = None,
        vision_pos_slice: Any = None,
        return_cache_object: bool = True,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep its activations: `(output, LlavaCache)`.

        `names_filter` (names or a predicate; None keeps all), `device` and `dtype` say what is kept and where.
        `pos_slice` cuts decoder positions, `vision_pos_slice` tower positions. With `incl_bwd` the scalar output, or
        `metric(output)`, is differentiated and gradients are kept under `name + "_grad"`; values derived for
        listeners (scores, pattern, result, scale) then lie on the path, which may move the output by rounding.
        `return_cache_object=False` gives a plain dict.

        Raises `UnknownHook` for a name without a hook, or that did not fire in this run.
        """
        stored: dict[str, Tensor] = {}
        cuts = {"": Slice.unwrap(pos_slice), "vision.": Slice.unwrap(vision_pos_slice)}
        keep = keeper(stored, partial(keep_slice, cuts=cuts), device, dtype, incl_bwd)
        wanted = names_filter if callable(names_filter) else self.hook_names(names_filter)
        each = [wanted] if callable(wanted) else wanted if names_filter is not None else [lambda _: True]
        with self.hooks([(name, keep) for name in each], reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts):
            self.is_caching = True
            out = self(*model_args, **model_kwargs)
            if incl_bwd:
                differentiate(metric(out) if metric else out)
        inputs, self.inputs_seen = self.inputs_seen, None
        cache = LlavaCache(stored, self, inputs=inputs)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return out, cache if return_cache_object else cache.cache_dict


def keeper(
    stored: dict[str, Tensor],
    cut: Callable[[Tensor, Hook], Tensor],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    incl_bwd: bool,
) -> HookFn:
    """A reading hook function that files activations (and gradients) under their names; a second firing raises."""

    def file(name: str, act: Tensor, hook: Hook) -> None:
        if name in stored:
            raise LensError(f"{name!r} fired twice in one run; a cache keeps one forward pass")
        stored[name] = cut(act.detach(), hook).to(device=device, dtype=dtype)

    def keep(act: Tensor, hook: Hook) -> None:
        assert hook.name is not None
        file(hook.name, act, hook)
        if incl_bwd and act.requires_grad:
            act.register_hook(lambda grad: file(hook.name + "_grad", grad, hook))

    keep.wants_grad = incl_bwd  # type: ignore[attr-defined]
    return reader(keep)


def keep_slice(act: Tensor, hook: Hook, cuts: Mapping[str, Slice]) -> Tensor:
    """Cut an activation's positions (its queries, for scores and patterns) by the slice of its tower."""
    cut = cuts["vision." if (hook.name or "").startswith("vision.") else ""]
    axes = hook.axes.split()
    axis = axes.index("pos") if "pos" in axes else axes.index("query") if "query" in axes else None
    if axis is None or cut.mode == "identity":
        return act
    return cut.apply(act, dim=axis).clone()


def differentiate(value: Tensor) -> None:
    """Backward from a scalar; anything else raises."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise LensError(f"incl_bwd needs a scalar, got {got}: ask for return_type='loss' or give metric=")
    value.backward()
