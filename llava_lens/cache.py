"""The activations of one forward pass, by TransformerLens's keys, for both towers.

Unusual: nothing is guessed. A key that is not there raises and says why, a decoder key never finds the tower's entry,
and a sum without its embedding is refused instead of being short. Scores, patterns, results and normalized streams are
formed when asked for, and let go of with the next one.
"""

from __future__ import annotations

import os
from itertools import accumulate
from typing import Any, overload

import torch
from torch import Tensor
from transformer_lens.utilities import Slice

from llava_lens.cache_file import load_cache, save_cache
from llava_lens.entries import Entries, Held, once
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.keys import DecoderBlockKey, DecoderKey, Norm, NormKey, TowerBlockKey, TowerKey
from llava_lens.record import BY_IMAGE, TOWER
from llava_lens.stack_cache import Prefixed, StackCache


class VisionCache(StackCache):
    """The tower's part of a cache, with the prefix `vision.` taken off; the batch axis counts images.

    `hook_embed` is the pre-norm's output, where the tower's stream starts, so its sums close.
    """

    def __init__(self, whole: LlavaCache):
        self.whole = whole
        super().__init__(Prefixed(whole.cache_dict, TOWER), whole.model.vision, whole.has_image_dim)

    @overload
    def __getitem__(self, key: tuple[TowerBlockKey, int]) -> Tensor: ...
    @overload
    def __getitem__(self, key: tuple[NormKey, int, Norm]) -> Tensor: ...
    @overload
    def __getitem__(self, key: TowerKey) -> Tensor: ...
    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    def __getitem__(self, key: Any) -> Tensor:
        """One of the tower's activations; raises `UnknownHook` saying why it is not there."""
        return self._find(key)

    def __repr__(self) -> str:
        return f"VisionCache({len(self.cache_dict)} activations)"

    def _hook_names(self) -> list[str]:
        return [name.removeprefix(TOWER) for name in self.whole._hook_names() if name.startswith(TOWER)]

    def _why_absent(self, name: str) -> str:
        return self.whole._why_absent(TOWER + name)

    def _get_cached_ln_scale(self, layer: Any, mlp_input: bool, pos_slice: Slice, batch_slice: Any = None) -> Tensor:
        n = self.model.cfg.n_layers
        if layer is None or layer == n:
            raise LensError(
                f"the tower's end has no norm: LLaVA reads the bare stream; apply_ln takes layers 0 … {n - 1}"
            )
        return super()._get_cached_ln_scale(layer, mlp_input, pos_slice, batch_slice)

    def logit_attrs(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raises `LensError`: logits are read from the decoder's stream."""
        raise LensError("the tower has no unembedding; logits are attributed in the decoder: cache.logit_attrs")

    def logit_lens(self, **kwargs: Any) -> Tensor:
        """Raises `LensError`: logits are read from the decoder's stream."""
        raise LensError("the tower has no unembedding; logits are read in the decoder: cache.logit_lens")

    def remove_batch_dim(self, batch_size: int | None = None) -> VisionCache:
        """Take the image axis off every entry of the tower and the projector; raises `LensError` for several images."""
        n = self.whole._n_images() if batch_size is None else batch_size
        if n > 1:
            raise LensError(f"the tower saw {n} images; only a single one's axis can be removed")
        self.whole._drop_image_dim()
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> Any:
        """Raises `LensError`: images belong to prompts, so slice the whole cache."""
        raise LensError("images belong to prompts: slice the whole cache, cache.apply_slice_to_batch_dim(…).vision")


class LlavaCache(StackCache):
    """An `ActivationCache` of the decoder; the tower's activations are in `.vision`, the run's inputs in `.inputs`.

    >>> import torch
    >>> model = HookedLlava.tiny()  # doctest: +SKIP
    >>> logits, cache = model.run_with_cache(inputs)  # doctest: +SKIP
    >>> cache["pattern", -1].shape, cache.vision["resid_post", 0].shape  # doctest: +SKIP
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        inputs: Inputs | None = None,
        has_image_dim: bool = True,
        asked: frozenset[str] | None = None,
        kept: tuple[int, ...] | None = None,
    ):
        entries = cache_dict if isinstance(cache_dict, Entries) else Entries(cache_dict)
        super().__init__(entries, model, has_batch_dim)
        self.inputs = inputs
        self.has_image_dim = has_image_dim
        self.asked = asked
        self.kept = kept

    @overload
    def __getitem__(self, key: tuple[DecoderBlockKey, int]) -> Tensor: ...
    @overload
    def __getitem__(self, key: tuple[NormKey, int, Norm]) -> Tensor: ...
    @overload
    def __getitem__(self, key: DecoderKey) -> Tensor: ...
    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    def __getitem__(self, key: Any) -> Tensor:
        """An activation, by full name or as in TransformerLens: `cache["resid_post", -1]`, `cache["scale", 0, "ln1"]`.

        `_grad` at the name's end gives its gradient. Raises `UnknownHook` that says whether such a hook exists and was
        not kept, did not fire, or does not exist, with the nearest names; and for a layer outside the decoder.
        """
        return self._find(key)

    def __repr__(self) -> str:
        return f"LlavaCache({len(self.cache_dict)} activations, {self.nbytes / 2**20:.1f} MiB, {self.inputs})"

    @property
    def nbytes(self) -> int:
        """Bytes of the memory held: shared memory counts once, an entry that is still to be formed by its sources."""
        return self.cache_dict.nbytes

    @property
    def vision(self) -> VisionCache:
        """The tower's activations, over the same tensors; raises `LensError` for a model without a tower."""
        if getattr(self.model, "vision", None) is None:
            raise LensError("this model has no vision tower, so its cache has no .vision")
        return VisionCache(self)

    def _hook_names(self) -> list[str]:
        return list(getattr(self.model, "hook_dict", self.cache_dict))

    def _why_absent(self, name: str) -> str:
        if self.asked is not None and name in self.asked:
            return f"{name!r} did not fire in this run: {self.model.why_silent(name)}"
        return f"{name!r} exists but was not kept in this cache: names_filter={name!r}, or a list with it, keeps it"

    def logit_lens(self, *, incl_mid: bool = False, pos_slice: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits of the stream before every layer and at the end, each through the final norm, and their labels.

        `[stream, *batch_and_pos, d_vocab]` and `["0_pre", …, "final_post"]`, with `0_mid` between for `incl_mid`; the
        last are the model's own logits.
        """
        streams, labels = self.accumulated_resid(
            apply_ln=True, incl_mid=incl_mid, pos_slice=pos_slice, return_labels=True
        )
        return self.model.unembed(streams), labels

    # ---- axes: the decoder's first one counts prompts, the tower's and the projector's count images

    def _batch_size(self) -> int:
        name = next((name for name in self.cache_dict if not name.startswith(BY_IMAGE)), None)
        if name is not None:
            return self.shape(name)[0]
        return self.inputs.batch_size if self.inputs is not None else 1

    def _n_images(self) -> int:
        if not self.has_image_dim:
            return 1
        return next((self.shape(name)[0] for name in self.cache_dict if name.startswith(BY_IMAGE)), 0)

    def remove_batch_dim(self, batch_size: int | None = None) -> LlavaCache:
        """Take the batch axis off in place; the tower keeps its image axis unless there is one image.

        Raises `LensError` for a batch of several.
        """
        n = self._batch_size() if batch_size is None else batch_size
        if self.has_batch_dim and n != 1:
            raise LensError(
                f"a batch of {n}; only a batch of 1 can lose its axis (apply_slice_to_batch_dim(row) picks one)"
            )
        if self.has_batch_dim:
            self.cache_dict.change(lambda name, held: held if name.startswith(BY_IMAGE) else _first(held))
            self.has_batch_dim = False
        if self._n_images() == 1:
            self._drop_image_dim()
        return self

    def _drop_image_dim(self) -> None:
        if self.has_image_dim:
            self.cache_dict.change(lambda name, held: _first(held) if name.startswith(BY_IMAGE) else held)
        self.has_image_dim = False

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> LlavaCache:
        """A cache of some of the prompts (an int drops the axis), with their images and inputs.

        Raises `LensError` without a batch axis, for rows that are not there, or where nobody says whose the images are.
        """
        cut = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        n = self._batch_size()
        if not self.has_batch_dim:
            raise LensError("this cache has no batch axis to slice")
        try:
            rows = torch.arange(n)[cut.slice].reshape(-1).tolist()
        except IndexError:
            rows = []
        if not rows:
            raise LensError(f"rows {cut.slice} of a batch of {n}: there are none")
        images = self._images_of(rows, n)
        of_image, of_row = once(lambda act: act[images]), once(lambda act: cut.apply(act, dim=0))
        single = cut.mode == "int"

        def chosen(name: str, held: Held) -> Held:
            by_image = name.startswith(BY_IMAGE)
            pick = of_image if by_image else of_row
            return pick(held) if isinstance(held, Tensor) else held.map(pick, batched=by_image or not single)

        kept = Entries({name: chosen(name, held) for name, held in self.cache_dict.held().items()})
        inputs = None if self.inputs is None else self._inputs_of(self.inputs, rows, images)
        cache = type(self)(kept, self.model, not single, inputs, True, self.asked, self.kept)
        if single and len(images) == 1:
            cache._drop_image_dim()
        return cache

    def _inputs_of(self, inputs: Inputs, rows: list[int], images: list[int]) -> Inputs:
        return rows_of(inputs, rows, images, self.model.cfg)

    def _images_of(self, rows: list[int], n: int) -> list[int]:
        """The images of some rows, in the rows' order."""
        total = self._n_images()
        if self.inputs is not None and self.inputs.pixels is not None:
            per_row = [sum(len(layout.pictures) for layout in row) for row in self.inputs.layouts(self.model.cfg)]
            starts = [0, *accumulate(per_row)]
            if total in (0, starts[-1]):
                return [image for row in rows for image in range(starts[row], starts[row + 1])]
        if not total:
            return []
        raise LensError(f"{total} images for {n} prompts, and no inputs that say whose they are")

    # ---- on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache with its inputs and roles as one safetensors file, whole or not at all.

        Raises `LensError` for a cache without its model, `OSError` where the file cannot be written; the file that was
        there is then untouched.
        """
        save_cache(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        names_filter: Any = None,
        device: torch.device | str | None = None,
        any_weights: bool = False,
    ) -> LlavaCache:
        """Read a cache that `save` wrote, for the model it came from, on the model's device unless another is given.

        `names_filter` picks entries as in `run_with_cache`. Raises `LensError` for a file that is cut off or no cache,
        for another model's cache, and for one of other weights in the same architecture, unless `any_weights`.
        """
        entries, inputs, facts = load_cache(path, model, names_filter, device, any_weights)
        asked = None if facts["asked"] is None else frozenset(facts["asked"])
        kept = None if facts["kept"] is None else tuple(facts["kept"])
        return cls(entries, model, facts["has_batch_dim"], inputs, facts["has_image_dim"], asked, kept)


def _first(held: Held) -> Held:
    return held[0] if isinstance(held, Tensor) else held.map(lambda source: source[0], batched=False)


def rows_of(inputs: Inputs, rows: list[int], images: list[int], cfg: Any) -> Inputs:
    """Some rows of a batch, padding kept, with the images given."""
    mask, roles = inputs.attention_mask, inputs.roles
    each = [inputs.extras_of(row, cfg=cfg) for row in rows]
    extras = {name: torch.cat([own[name] for own in each if name in own]) for name in inputs.extras}
    return Inputs(
        inputs.tokens[rows],
        inputs.pixels[images] if inputs.pixels is not None and images else None,
        None if mask is None else mask[rows],
        None if roles is None else tuple(roles[row] for row in rows),
        extras,
    )
