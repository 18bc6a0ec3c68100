"""The activations of a BLIP run by stack: `cache.vision`, `.encoder` and `.decoder` take TransformerLens's keys.

Unusual: the tower's stream is a sum, so its sums close; the text stacks norm their streams after every part, so what
would add them up raises there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from llava_lens.cache import LlavaCache, VisionCache
from llava_lens.cache_file import save_cache
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.models.blip_config import STACKS
from llava_lens.models.blip_inputs import BlipInputs
from llava_lens.stack_cache import Prefixed, StackCache

SUMS = (
    *("accumulated_resid", "decompose_resid", "apply_ln_to_stack", "get_full_resid_decomposition", "logit_attrs"),
    *("logit_lens", "stack_head_results", "stack_neuron_results"),
)
"""What takes a stream for the sum of what was added to it."""
OF_A_STACK = (*SUMS, "stack_activation", "compute_head_results", "get_neuron_results")
"""What needs one stack of blocks."""


def refusing(names: tuple[str, ...], why: str) -> Callable[[type], type]:
    """A class whose methods of these names raise `LensError`."""

    def refused(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            raise LensError(f"{name}: {why.format(name=name)}")

        method.__name__, method.__doc__ = name, f"Raises `LensError`: {why.format(name=name)}."
        return method

    def change(cls: type) -> type:
        for name in names:
            setattr(cls, name, refused(name))
        return cls

    return change


class PictureCache(VisionCache):
    """The tower's activations: a pre-norm stream with a final norm behind it, whose sums close."""

    _get_cached_ln_scale = StackCache._get_cached_ln_scale


@refusing(SUMS, "BLIP's texts are normed after every part that is added, so their streams are no sums of parts")
class TextCache(StackCache):
    """One text stack's activations, with its prefix taken off: `cache.encoder["pattern", 0, "cross_attn"]`."""

    def __init__(self, whole: BlipCache, stack: str):
        self.whole, self.prefix = whole, f"{stack}."
        entries = Prefixed(whole.cache_dict, self.prefix)
        super().__init__(entries, getattr(whole.model, stack), whole.has_batch_dim)

    def full_name(self, key: Any) -> str:
        """The full name of a key; `("pattern", 0, "cross_attn")` is `blocks.0.cross_attn.hook_pattern`."""
        if isinstance(key, tuple) and len(key) == 3 and key[2] == "cross_attn":
            return super().full_name(key[:2]).replace(".attn.", ".cross_attn.")
        return super().full_name(key)

    def __getitem__(self, key: Any) -> Tensor:
        """One of the stack's activations; raises `UnknownHook` saying why it is not there."""
        return self._find(key)

    def __repr__(self) -> str:
        return f"TextCache({self.prefix}, {len(self.cache_dict)} activations)"

    def _hook_names(self) -> list[str]:
        return [name.removeprefix(self.prefix) for name in self.whole._hook_names() if name.startswith(self.prefix)]

    def _why_absent(self, name: str) -> str:
        return self.whole._why_absent(self.prefix + name)


@refusing(OF_A_STACK, "BLIP has three stacks; the tower's stream is the one that is a sum: cache.vision.{name}")
class BlipCache(LlavaCache):
    """The activations of the tower, the question encoder and the answer decoder, by full name or through `.vision`,
    `.encoder` and `.decoder`; the run's inputs are in `.inputs`.
    """

    @property
    def vision(self) -> PictureCache:
        """The tower's activations."""
        return PictureCache(self)

    @property
    def encoder(self) -> TextCache:
        """The question's activations."""
        return TextCache(self, "encoder")

    @property
    def decoder(self) -> TextCache:
        """The answer's activations."""
        return TextCache(self, "decoder")

    def full_name(self, key: Any) -> str:
        """The key itself, if it is a name; a layer without its stack raises `LensError`."""
        if not isinstance(key, str):
            raise LensError(f"{key!r} does not say in which stack: {', '.join(f'cache.{s}[…]' for s in STACKS)}")
        return key

    def _images_of(self, rows: list[int], n: int) -> list[int]:
        return rows

    def _inputs_of(self, inputs: Inputs, rows: list[int], images: list[int]) -> Inputs:
        assert isinstance(inputs, BlipInputs)
        return inputs.rows(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the activations as one safetensors file, without the inputs; raises as `LlavaCache.save` does."""
        bare = BlipCache(
            self.cache_dict, self.model, self.has_batch_dim, None, self.has_image_dim, self.asked, self.kept
        )
        save_cache(bare, path)
