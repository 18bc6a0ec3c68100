"""The dictionary behind a cache: tensors, and recipes that are formed when they are asked for.

Unusual: of what it formed it keeps the last value only, but as long as the caller holds one, the next access gives the
same tensor; an in-place edit therefore counts, and one that was made and then let go of raises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from llava_lens.derived import Derived, identity
from llava_lens.errors import LensError

Held = Tensor | Derived


class Given:
    """One value that was formed and handed out, known as long as the caller holds it; and whether it was edited."""

    def __init__(self, recipe: Derived, value: Tensor):
        self.recipe, self.value = recipe, weakref.ref(value)
        self.memory = StorageWeakRef(value.untyped_storage())
        self.witness = value.detach()
        self.witness.data = value.new_empty(0)  # counts the edits on from here, and holds none of the memory
        self.before = self.witness._version

    @property
    def edited(self) -> bool:
        """Whether it was edited in place, now or before it was let go of."""
        return self.witness._version != self.before

    @property
    def matters(self) -> bool:
        """False where nobody can edit it any more, and nobody did."""
        return self.edited or not self.memory.expired()


class Entries(dict[str, Tensor]):
    """A dict of tensors, some of them held as recipes: reading an item forms it, `held` shows what lies there.

    A tensor recorded in inference mode is handed out as an ordinary one on the same memory, which counts its edits.
    """

    def __init__(self, entries: Mapping[str, Held] | None = None):
        raw = entries.held() if isinstance(entries, Entries) else dict(entries or {})
        super().__init__(cast(dict[str, Tensor], raw))
        self._given: dict[str, list[Given]] = {}
        self._last: tuple[str, Tensor] | None = None
        self._counted = False

    # ---- what lies there

    def held(self) -> dict[str, Held]:
        """Names and what is stored under them, tensors and recipes; edits of values that were formed are in it."""
        self._count_edits()
        for name in list(self._given):
            self._settle(name)
        return dict(zip(super().keys(), super().values(), strict=True))

    def raw(self, name: str) -> Held:
        """What is stored under a name, a tensor or a recipe; an edit of the value that was formed is in it."""
        self._count_edits()
        self._settle(name)
        return super().__getitem__(name)

    def shape(self, name: str) -> torch.Size:
        """The shape of an entry, which is not formed for it."""
        return super().__getitem__(name).shape

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is held in memory: entries, the sources of recipes, and what was formed last."""
        for held in super().values():
            if isinstance(held, Derived):
                yield from held.sources.values()
                yield from held.divisors or ()
            else:
                yield held
        if self._last is not None:
            yield self._last[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory held, what several entries share counted once."""
        memory = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in self.tensors()}
        return sum(memory.values())

    def change(self, fn: Callable[[str, Held], Held]) -> None:
        """Put something else in the place of every entry."""
        for name, held in self.held().items():
            self[name] = fn(name, held)

    # ---- reading

    def __getitem__(self, name: str) -> Tensor:
        self._count_edits()
        held: Held = super().__getitem__(name)
        return self._formed(name, held) if isinstance(held, Derived) else held

    def _formed(self, name: str, recipe: Derived) -> Tensor:
        self._settle(name)
        alive = [value for given in self._given.get(name, ()) if (value := given.value()) is not None]
        held = super().__getitem__(name)
        value = alive[-1] if alive else recipe.form(name) if isinstance(held, Derived) else held
        if not alive and isinstance(held, Derived):
            self._given.setdefault(name, []).append(Given(recipe, value))
        if self._last is not None and self._last[0] != name:
            self._settle(self._last[0])
        self._last = (name, value) if isinstance(super().__getitem__(name), Derived) else None
        return value

    def _settle(self, name: str) -> None:
        """Keep an edited value for good; raises `LensError` where it was edited and then let go of."""
        held = super().__getitem__(name) if name in self else None
        past = [given for given in self._given.get(name, ()) if given.recipe is held and given.matters]
        for given in past:
            value = given.value()
            if given.edited and value is None:
                raise LensError(
                    f"{name!r} was edited in place and then let go of, and this cache keeps only the last entry it "
                    f"formed; assign it instead: cache.cache_dict[{name!r}] = edited"
                )
            if given.edited:
                super().__setitem__(name, cast(Tensor, value))
                past = []
                break
        self._given.pop(name, None)
        if past:
            self._given[name] = past

    def _count_edits(self) -> None:
        """Replace every tensor of inference mode, which does not count its edits, by one that does."""
        if self._counted:
            return
        self._counted, roots, known = True, {}, {}

        def counting(act: Tensor) -> Tensor:
            if not act.is_inference() or act.is_meta:
                return act
            alias = known.get(identity(act))
            if alias is None:
                alias = known[identity(act)] = _ordinary(act, roots)
            return alias

        for name in list(super().keys()):
            held: Any = super().__getitem__(name)
            changed = held.map(counting) if isinstance(held, Derived) else counting(held)
            super().__setitem__(name, cast(Tensor, changed))

    # ---- the rest of a dict, through the above

    def __setitem__(self, name: str, value: Held) -> None:
        self._counted = self._counted and not (isinstance(value, Tensor) and value.is_inference())
        super().__setitem__(name, cast(Tensor, value))

    def __iter__(self) -> Iterator[str]:  # makes dict(entries) and {**entries} read items, as everyone else does
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        """The item, or the default."""
        try:
            return self[name]
        except KeyError:
            return default

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        """Names and tensors, each formed as the loop gets to it."""
        return ItemsView(self)

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]
        """Tensors, each formed as the loop gets to it."""
        return ValuesView(self)

    def pop(self, name: str, *default: Any) -> Any:
        """Take an entry out and give it back."""
        value = self[name] if name in self or not default else default[0]
        super().pop(name, None)
        return value

    def copy(self) -> Entries:
        """Another dictionary of the same entries, none of them formed."""
        return Entries(self)

    def __or__(self, other: Any) -> Any:
        joined = Entries(self)
        for name, held in (other.held() if isinstance(other, Entries) else dict(other)).items():
            joined[name] = held
        return joined

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def once(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, called once for each distinct tensor, so that what was shared stays shared."""
    seen: dict[Any, tuple[Tensor, Tensor]] = {}

    def applied(act: Tensor) -> Tensor:
        key = identity(act)
        if key not in seen:
            seen[key] = act, fn(act)  # the tensor is held, so that its address stays its own
        return seen[key][1]

    return applied


def _ordinary(act: Tensor, roots: dict[Any, Tensor]) -> Tensor:
    """A tensor of inference mode as an ordinary one; those on the same memory count edits together."""
    with torch.inference_mode(False):
        storage = act.untyped_storage()
        key = (act.device, storage.data_ptr(), act.dtype)
        if key not in roots:
            size = storage.nbytes() // act.itemsize
            roots[key] = torch.empty(0, dtype=act.dtype, device=act.device).set_(storage, 0, (size,), (1,))
        return roots[key].as_strided(act.shape, act.stride(), act.storage_offset())
