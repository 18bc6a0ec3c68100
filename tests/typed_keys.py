"""What pyright says of cache keys: this file is clean, so each `ignore` below marks a key that is an error."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true, reportPrivateUsage=false
from typing import assert_type

from torch import Tensor

from llava_lens import LlavaCache


def good(cache: LlavaCache, layer: int) -> None:
    assert_type(cache["resid_post", 3], Tensor)
    assert_type(cache["pattern", -1], Tensor)
    assert_type(cache["resid_post_grad", layer], Tensor)
    assert_type(cache["scale", 0, "ln1"], Tensor)
    assert_type(cache["hook_embed"], Tensor)
    assert_type(cache[f"blocks.{layer}.attn.hook_z"], Tensor)
    assert_type(cache.vision["pattern", 0], Tensor)
    assert_type(cache.vision["normalized", 0, "ln2"], Tensor)


def bad(cache: LlavaCache) -> None:
    cache["resid_pots", 3]  # pyright: ignore
    cache["pattern", "first"]  # pyright: ignore
    cache["scale", 0, "ln3"]  # pyright: ignore
    cache["scale", 0]  # pyright: ignore
    cache[3]  # pyright: ignore
    cache.vision["rot_q", 0]  # pyright: ignore
    cache.vision["pre_linear", 0]  # pyright: ignore
