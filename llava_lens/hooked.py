"""Running a model with hooks and with a cache, failing closed where the base class fails silently.

A name that no hook carries raises, and so does a hook that never fired although the model ran (a tower hook on a
text-only input, a layer above `stop_at_layer`): an edit that cannot take effect is never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedRootModule

from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError, UnknownHook, nearest
from llava_lens.footprint import Footprint, axis_sizes
from llava_lens.hooks import Hook
from llava_lens.inputs import Inputs
from llava_lens.record import Cuts, Recorder

HookFn = Callable[..., Any]
HookName = str | Callable[[str], bool]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


class HookedModel(HookedRootModule):
    """A `HookedRootModule` whose hooks are all `Hook`s and whose `run_with_cache` returns a `LlavaCache`."""

    Cache: type[LlavaCache] = LlavaCache
    cfg: Any
    processor: Any = None
    n_runs: int = 0
    inputs_seen: Inputs | None = None

    def _apply(self, *args: Any, **kwargs: Any) -> HookedModel:
        super()._apply(*args, **kwargs)
        self._note_placement()
        return self

    def _note_placement(self) -> None:
        """Take device and dtype of the weights into the config, after they were loaded or moved."""
        raise NotImplementedError

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
            given = dict.fromkeys([wanted] if isinstance(wanted, str) else wanted)
            names = [self.hook(name).name or name for name in given]
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
        a name without a hook, and at the end for a hook whose activation never passed although the model ran.
        """
        expected = [self.hook_names(name) for name, _ in (*fwd_hooks, *bwd_hooks)]
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
        `metric(output)`, is differentiated and gradients are kept under `name + "_grad"`; no weight's `.grad` is
        touched. Values derived for listeners (scores, pattern, result, scale) then lie on the path, which may move the
        output by rounding. Without it they are kept as recipes and formed when asked for, unless a hook wrote them or
        they take less memory formed. `return_cache_object=False` gives the cache's dict.

        Raises `UnknownHook` for a name without a hook, or that did not fire in this run; `LensError` for a slice that
        keeps no position, and for `incl_bwd` without a scalar or a graph.
        """
        asked = self.hook_names(names_filter)
        if pos_slice is not None and "hook_logits" in asked and _cuts(model_kwargs.get("logits_to_keep", 0)):
            raise LensError("pos_slice and logits_to_keep both cut hook_logits: give one of them, or leave it out")
        record = Recorder(Cuts(pos_slice, vision_pos_slice), device, dtype, incl_bwd)
        runs = self.n_runs
        with (
            self.hooks(reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts),
            self._recording(record, asked),
        ):
            self.is_caching = True
            out = self(*model_args, **model_kwargs)
            if incl_bwd:
                record.differentiate(metric(out) if metric else out)
        each = names_filter is not None and not callable(names_filter)
        silent = [name for name in asked if name not in record.stored]
        if silent and self.n_runs > runs and (each or not record.stored):
            shown = ", ".join(map(repr, silent if each else silent[:1]))
            raise UnknownHook(f"{shown} never fired: {self.why_silent(silent[0])}")
        inputs, self.inputs_seen = self.inputs_seen, None
        kept = record.cuts.positions(inputs.n_pos) if inputs is not None else None
        if inputs is not None:
            inputs = inputs.with_roles(self.cfg, None if self.processor is None else self.processor.tokenizer)
        cache = self.Cache(record.stored, self, inputs=inputs, asked=frozenset(asked), kept=kept)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return out, cache if return_cache_object else cache.cache_dict

    @contextmanager
    def _recording(self, record: Recorder, names: list[str]) -> Iterator[None]:
        hooks = [self.hook(name) for name in names]
        before = [hook.record(record) for hook in hooks]
        try:
            yield
        finally:
            for hook, recorder in zip(hooks, before, strict=True):
                hook.record(recorder)

    def cache_bytes(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        dtype: torch.dtype | None = None,
        incl_bwd: bool = False,
        pos_slice: Any = None,
        vision_pos_slice: Any = None,
        **model_kwargs: Any,
    ) -> int:
        """Bytes that `run_with_cache` with these arguments would keep, without running.

        What lies under two names (`resid_post` and the next `resid_pre`) counts once, a recipe by the tensors that are
        held for it; forming an entry later takes its own memory while it is used. With `incl_bwd` it is an upper bound,
        elsewhere exact, on the model's own device and with no hook that edits. Raises as `run_with_cache` does.
        """
        inputs = self.read_inputs(*model_args, **model_kwargs)
        cuts, asked = Cuts(pos_slice, vision_pos_slice), set(self.hook_names(names_filter))
        hooks = [self.hook(name) for name in self.hook_dict if name in asked]  # in the order of the forward
        held = Footprint(self, inputs, self.axis_sizes(inputs), cuts, dtype)
        return held.with_gradients(hooks) if incl_bwd else held.total(hooks)

    def axis_sizes(self, inputs: Inputs) -> dict[str, dict[str, int]]:
        """How long each hook axis is in a run of `inputs`, by the hooks' prefix; a subclass adds its own axes."""
        return axis_sizes(self.cfg, inputs)

    def read_inputs(self, *args: Any, **kwargs: Any) -> Inputs:
        """What `forward` was given, as `Inputs`."""
        raise NotImplementedError


def _cuts(logits_to_keep: int | Tensor) -> bool:
    return isinstance(logits_to_keep, Tensor) or logits_to_keep != 0
