"""Many maps of one picture side by side, and where single heads look in it.

Unusual: all panels have one size, whatever the picture's shape, so that a patch is found at the same place in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from llava_lens.analysis.attribution.query import Place
from llava_lens.analysis.scores import Scores
from llava_lens.cache import LlavaCache
from llava_lens.entries import Entries
from llava_lens.errors import LensError
from llava_lens.plots.canvas import new_figure, plain
from llava_lens.plots.pictures import draw_picture, overlay, panel_size, picture_of
from llava_lens.roles import Roles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 64
"""How many panels one figure has at most."""


def maps_page(
    maps: Mapping[str, Scores],
    picture: Any,
    roles: Roles | None = None,
    *,
    columns: int = 4,
    index: int = 0,
    title: str = "",
    scene: bool = True,
) -> Figure:
    """Draw several maps `[row, col]` over one picture, each under its name and with its own colour bar.

    The picture itself stands first, unless `scene` is off. `roles` are those of the maps by default. Raises `LensError`
    as `overlay` does, for no map and for more than 64.
    """
    if not 0 < len(maps) <= SHOWN:
        raise LensError(f"{len(maps)} maps; expected 1 … {SHOWN}")
    if columns < 1:
        raise LensError(f"columns={columns}; expected 1 or more")
    first = next(iter(maps.values()))
    roles = roles or (first.roles[0] if first.roles else None)
    if roles is None:
        raise LensError("maps_page needs roles: make the inputs with model.prepare, and pass inputs.roles[0]")
    n = len(maps) + scene
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    width, height = (0.72 * side for side in panel_size(roles, index))
    figure = new_figure(columns * (width + 0.15), rows * (height + 0.95) + (0.4 if title else 0.0))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    loaded = picture_of(picture, roles, index)
    if scene:
        draw_picture(panels[0], loaded, roles, index)
        panels[0].set_title("the picture", fontsize=10)
    for ax, (name, scores) in zip(panels[int(scene) :], maps.items(), strict=False):
        overlay(scores, loaded, roles, ax=ax, title=plain(name), index=index)
    for ax in panels[n:]:
        ax.set_axis_off()
    figure.suptitle(plain(title), fontsize=12)
    return figure


def attention_over_image(
    cache: LlavaCache,
    picture: Any,
    layer: int,
    heads: int | Iterable[int] | None = None,
    *,
    position: int = -1,
    row: int = 0,
    index: int = 0,
    columns: int = 4,
) -> Figure:
    """Draw where heads of one layer look in a picture: the attention of one query position on each of its patches.

    `heads` are all of the layer by default, a panel each, with the share of attention that lies on the picture.
    `position` is the query, -1 the last that is not padding. Raises `LensError` for a layer, head, position or row that
    is not there, and for a cache without the layer's `attn.hook_pattern` or without roles.
    """
    cfg = cache.model.cfg
    if not 0 <= layer < cfg.n_layers:
        raise LensError(f"layer {layer}; expected 0 … {cfg.n_layers - 1}")
    chosen = list(range(cfg.n_heads)) if heads is None else [heads] if isinstance(heads, int) else list(heads)
    wrong = next((head for head in chosen if not 0 <= head < cfg.n_heads), None)
    if wrong is not None or not chosen:
        raise LensError(f"heads={heads!r}; expected some of 0 … {cfg.n_heads - 1}")
    pattern, roles, said = attention_of(cache, layer, position, row)
    grids = pattern[torch.tensor(chosen)][:, roles.patch_positions(index)]
    maps = {
        f"L{layer}H{head}: {float(grid.sum()):.0%} on it": Scores(grid, ("row", "col"), unit="attention")
        for head, grid in zip(chosen, grids, strict=True)
    }
    title = f"attention of {said} in layer {layer}"
    return maps_page(maps, picture, roles, columns=columns, index=index, title=title, scene=len(chosen) > 1)


def attention_of(cache: LlavaCache, layer: int, position: int, row: int) -> tuple[torch.Tensor, Roles, str]:
    """The attention `[head, key]` of one query on the CPU, the row's roles, and what stands at the query."""
    name = f"blocks.{layer}.attn.hook_pattern"
    if name not in cache:
        raise LensError(f"the cache lacks {name}; run with names_filter={name!r}, or without a filter")
    n = cache.shape(name)[0]
    if not 0 <= row < n:
        raise LensError(f"row {row}; expected 0 … {n - 1}")
    one = {"blocks.0.attn.hook_pattern": cache.cache_dict.raw(name)}
    alone = LlavaCache(Entries(one), cache.model, inputs=cache.inputs, kept=cache.kept)
    place = Place(cache, row, Place.of(alone, row, position).query)
    roles = place.roles
    if roles is None:
        raise LensError("this cache does not know which position is which patch: its inputs carried no roles")
    token = roles.tokens[place.in_prompt] if roles.tokens else ""
    return place.pattern(layer).float().cpu(), roles, f"{token!r} (position {place.in_prompt})"
