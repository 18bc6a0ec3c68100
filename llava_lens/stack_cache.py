"""What the caches of both towers share: keys, the reasons why an entry is missing, and sums that close or refuse."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, SupportsIndex, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice, get_act_name

from llava_lens.derived import pick
from llava_lens.entries import Entries, Held, once
from llava_lens.errors import LensError, UnknownHook, nearest

Method = TypeVar("Method", bound=Callable[..., Any])
Cache = TypeVar("Cache", bound="StackCache")
Places = SupportsIndex | Sequence[int] | slice | Tensor | None


def checks_layer(method: Method) -> Method:
    """The same method, refusing a `layer` that the stack does not have instead of summing less."""
    signature = inspect.signature(method)

    @wraps(method)
    def checked(self: StackCache, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        layer, n = given.get("layer"), self.model.cfg.n_layers
        before_mlp = bool(given.get("mlp_input", False))
        what = f"{method.__name__}({layer=}{', mlp_input=True' if before_mlp else ''})"
        if before_mlp and (layer in (None, -1) or not 0 <= operator.index(layer) < n):
            raise LensError(f"{what}: the layer of an MLP is 0 … {n - 1}")
        if layer not in (None, -1) and not 0 <= operator.index(layer) <= n:
            raise LensError(f"{what}: expected 0 … {n}; {n}, -1 or None mean the end")
        return method(self, *args, **kwargs)

    return cast(Method, checked)


class StackCache(ActivationCache):
    """The activations of one stack of blocks, the decoder's or the tower's; use `LlavaCache` and its `.vision`."""

    model: Any
    cache_dict: Any  # Entries, or a view of some

    def __init__(self, entries: MutableMapping[str, Tensor], model: Any, has_batch_dim: bool = True):
        super().__init__(cast(dict[str, Tensor], entries), model, has_batch_dim)
        self.has_embed = True  # a missing embedding raises instead of leaving a sum that does not close
        self.has_pos_embed = False  # the tower's lies before its pre-norm, the decoder's are rotary

    decompose_resid = checks_layer(ActivationCache.decompose_resid)
    accumulated_resid = checks_layer(ActivationCache.accumulated_resid)
    stack_head_results = checks_layer(ActivationCache.stack_head_results)
    stack_neuron_results = checks_layer(ActivationCache.stack_neuron_results)
    stack_activation = checks_layer(ActivationCache.stack_activation)
    apply_ln_to_stack = checks_layer(ActivationCache.apply_ln_to_stack)
    get_full_resid_decomposition = checks_layer(ActivationCache.get_full_resid_decomposition)

    def full_name(self, key: Any) -> str:
        """The full name of a key: `("scale", 0, "ln1")` is `blocks.0.ln1.hook_scale`.

        Raises `LensError` for what is no key at all, `UnknownHook` for a layer outside the stack.
        """
        parts = (key,) if isinstance(key, str) else key
        if not isinstance(parts, tuple) or not 1 <= len(parts) <= 3 or not isinstance(parts[0], str):
            raise LensError(f"{key!r} is no cache key; expected a name, (name, layer) or (name, layer, 'ln1' or 'ln2')")
        name, layer, sublayer = parts[0], parts[1] if len(parts) > 1 else None, parts[2] if len(parts) > 2 else None
        if name in self.cache_dict and layer is None:
            return name
        suffix = "_grad" if name.endswith("_grad") else ""
        if layer is not None:
            layer = self._layer(layer, key)
        return get_act_name(name.removesuffix("_grad"), layer, sublayer) + suffix

    def _layer(self, layer: Any, key: Any) -> int:
        n = self.model.cfg.n_layers
        try:
            index = operator.index(layer)
        except TypeError:
            raise LensError(f"layer {layer!r} in {key!r}; expected a whole number") from None
        if not -n <= index < n:
            raise UnknownHook(f"layer {index} in {key!r}; expected " + (f"{-n} … {n - 1}" if n else "none: no blocks"))
        return index % n

    def _find(self, key: Any) -> Tensor:
        name = self.full_name(key)
        if name not in self.cache_dict:
            raise UnknownHook(self._why_missing(key, name))
        return self.cache_dict[name]

    def pattern(
        self, layer: int, *, rows: Places = None, heads: Places = None, queries: Places = None, keys: Places = None
    ) -> Float[Tensor, "..."]:
        """Attention weights of some batch rows, heads, queries and keys; the rest is not formed for it.

        `[batch, head, query, key]` without the axes of which a single number was given. Numbers count what was kept.
        Equal to those places of `cache["pattern", layer]` up to rounding. Raises `LensError` for what is not there.
        """
        return self._part("pattern", layer, {"row": rows, "head": heads, "query": queries, "key": keys})

    def scores(
        self, layer: int, *, rows: Places = None, heads: Places = None, queries: Places = None, keys: Places = None
    ) -> Float[Tensor, "..."]:
        """Attention scores before the softmax, as `pattern`."""
        return self._part("attn_scores", layer, {"row": rows, "head": heads, "query": queries, "key": keys})

    def result(
        self, layer: int, *, rows: Places = None, positions: Places = None, heads: Places = None
    ) -> Float[Tensor, "..."]:
        """What some heads add to the stream at some positions, `[batch, pos, head, d_model]`, as `pattern`."""
        return self._part("result", layer, {"row": rows, "position": positions, "head": heads})

    def _part(self, key: str, layer: int, where: dict[str, Places]) -> Tensor:
        name = self.full_name((key, layer))
        if name not in self.cache_dict:
            raise UnknownHook(self._why_missing((key, layer), name))
        held, shape = self.cache_dict.raw(name), self.cache_dict.shape(name)
        if not self.has_batch_dim and where.pop("row") is not None:
            raise LensError(f"rows of {name!r}: this cache has no batch axis")
        chosen = {axis: places(axis, given, shape[i], name) for i, (axis, given) in enumerate(where.items())}
        if isinstance(held, Tensor):
            for i, index in enumerate(chosen.values()):
                held = pick(held, i, index)
        else:
            names = {"row": "rows", "head": "heads", "query": "positions", "position": "positions", "key": "keys"}
            held = held.part(**{names[axis]: index for axis, index in chosen.items()}, name=name)
        return held[tuple(0 if _one(given) else slice(None) for given in where.values())]

    def shape(self, name: str) -> torch.Size:
        """The shape of an entry, by its full name; nothing is formed for it."""
        return self.cache_dict.shape(name)

    def __contains__(self, key: Any) -> bool:
        try:
            return self.full_name(key) in self.cache_dict
        except LensError:
            return False

    def _hook_names(self) -> list[str]:
        """The hooks there are, as this cache spells them."""
        raise NotImplementedError

    def _why_absent(self, name: str) -> str:
        """Why a hook that exists has no entry."""
        raise NotImplementedError

    def _why_missing(self, key: Any, name: str) -> str:
        hook, names = name.removesuffix("_grad"), self._hook_names()
        if hook in names:
            if hook != name and hook in self.cache_dict:
                return f"{hook!r} has no gradient here: run with incl_bwd=True (and a gradient must reach it)"
            return self._why_absent(hook)
        block = re.match(r"blocks\.(-?\d+)\.", hook)
        if block:
            self._layer(int(block[1]), key)
            if hook.endswith((".hook_scale", ".hook_normalized")):
                return f"{key!r} does not say which norm: ({key[0]!r}, {block[1]}, 'ln1') or 'ln2'"
            short = {n.rpartition("hook_")[2] for n in names if n.startswith("blocks.")}
            given = key[0] if isinstance(key, tuple) else key
            return f"no hook for the key {key!r}{nearest(given, short if isinstance(key, tuple) else names)}"
        if any(n.endswith(f".hook_{hook.removeprefix('hook_')}") and n.startswith("blocks.") for n in names):
            return f"{key!r} is in every block; say the layer: ({key!r}, layer)"
        return f"no hook for the key {key!r}{nearest(hook, names)}"

    def _get_cached_ln_scale(self, layer: Any, mlp_input: bool, pos_slice: Slice, batch_slice: Any = None) -> Tensor:
        end = layer is None or layer == self.model.cfg.n_layers
        scale = self._find("ln_final.hook_scale" if end else ("scale", layer, "ln2" if mlp_input else "ln1"))
        scale = pos_slice.apply(scale, dim=-2)
        return batch_slice.apply(scale) if batch_slice is not None and self.has_batch_dim else scale

    def to(self: Cache, device: torch.device | str | torch.dtype) -> Cache:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every entry to a device (or to a dtype), in place; entries that share memory go on sharing it.

        Entries that are still to be formed will be formed as in the run, and turned into the dtype then.
        """
        move = once(lambda act: act.to(device))

        def moved(_: str, held: Held) -> Held:
            if isinstance(held, Tensor):
                return move(held)
            return replace(held, dtype=device) if isinstance(device, torch.dtype) else held.map(move)

        self.cache_dict.change(moved)
        return self


def places(what: str, given: Places, length: int, name: str) -> list[int] | None:
    """Numbers of places on an axis, counted from 0, None for all; raises `LensError` for one that is not there."""
    if given is None:
        return None
    if isinstance(given, slice):
        return list(range(length))[given]
    many = cast(Sequence[int], [given] if _one(given) else given)
    numbers = [operator.index(each) for each in many]
    wrong = next((number for number in numbers if not -length <= number < length), None)
    if wrong is not None:
        raise LensError(f"{what} {wrong} of {name!r}; expected {-length} … {length - 1}")
    return [number % length for number in numbers]


def _one(given: Places) -> bool:
    return isinstance(given, int) or (hasattr(given, "__index__") and getattr(given, "ndim", 0) == 0)


class Prefixed(MutableMapping[str, Tensor]):
    """The entries of a dictionary whose names start with a prefix, without it; writing goes through."""

    def __init__(self, entries: Entries, prefix: str):
        self.entries, self.prefix = entries, prefix

    def raw(self, name: str) -> Held:
        """What is stored under a name, a tensor or a recipe."""
        return self.entries.raw(self.prefix + name)

    def shape(self, name: str) -> torch.Size:
        """The shape of an entry, which is not formed for it."""
        return self.entries.shape(self.prefix + name)

    def change(self, fn: Callable[[str, Held], Held]) -> None:
        """Put something else in the place of every entry."""
        self.entries.change(
            lambda name, held: fn(name.removeprefix(self.prefix), held) if name.startswith(self.prefix) else held
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[self.prefix + name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.entries[self.prefix + name] = value

    def __delitem__(self, name: str) -> None:
        del self.entries[self.prefix + name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.prefix + name in self.entries

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.entries if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
