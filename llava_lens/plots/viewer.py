"""All heads of a layer, to look through in a notebook.

Unusual: circuitsvis is optional and draws tokens only, so a picture's patches are left out or taken together;
`attention_over_image` draws those.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError
from llava_lens.kernels import upcast
from llava_lens.plots.multiples import attention_of
from llava_lens.roles import Roles


def attention_viewer(cache: LlavaCache, layer: int, *, row: int = 0, image: str = "together") -> Any:
    """Every head's attention between the tokens of one row, as circuitsvis draws it in a notebook.

    The patches of each picture are taken "together" as one token, which is attended with their sum and attends with
    their mean; or they are "left out", or stand as single "patches". Returns what a notebook displays; `str()` of it is
    HTML that loads circuitsvis's script from the network. Raises `LensError` where circuitsvis is not installed, and
    for a cache without that layer's whole `attn.hook_pattern`.
    """
    if image not in ("together", "left out", "patches"):
        raise LensError(f"image={image!r}; expected 'together', 'left out' or 'patches'")
    try:
        from circuitsvis.attention import attention_patterns  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LensError(
            "attention_viewer needs circuitsvis, which is not installed: pip install 'llava-lens[viewer]'"
        ) from error
    tokens, patterns = grouped(cache, layer, row, image)
    return attention_patterns(tokens=tokens, attention=patterns)


def grouped(cache: LlavaCache, layer: int, row: int, image: str) -> tuple[list[str], Float[Tensor, "head group group"]]:
    """What each group of positions is called, and the attention between groups; rows of whole groups sum to 1."""
    _, roles, _ = attention_of(cache, layer, -1, row)
    pattern = upcast(cache[f"blocks.{layer}.attn.hook_pattern"][row]).cpu()
    if pattern.shape[1] != pattern.shape[2]:
        raise LensError(
            f"a pattern of {pattern.shape[1]} queries; the viewer takes the whole prompt, without pos_slice"
        )
    names, groups = zip(*groups_of(roles, image), strict=True)
    keys = torch.stack([reduce(pattern[:, :, group], "head query key -> head query", "sum") for group in groups], -1)
    both = torch.stack([reduce(keys[:, group], "head query group -> head group", "mean") for group in groups], 1)
    return list(names), both


def groups_of(roles: Roles, image: str) -> list[tuple[str, list[int]]]:
    """The positions that stand together, by name, in the prompt's order; padding is left out."""
    owner = {int(p): i for i in range(roles.n_images) for p in roles.positions("image", i)}
    found: dict[str, tuple[str, list[int]]] = {}
    for position, label in enumerate(roles.labels):
        if label == "padding" or (label == "image" and image == "left out"):
            continue
        together = label == "image" and image == "together"
        place = roles.patch_of(position) if label == "image" else None
        token = roles.tokens[position] if roles.tokens else str(position)
        name = f"<image {owner[position]}>" if together else token if place is None else f"({place[1]}, {place[2]})"
        key = name if together else str(position)
        found.setdefault(key, (name, []))[1].append(position)
    return list(found.values())
