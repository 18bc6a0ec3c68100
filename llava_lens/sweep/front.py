"""Changes before the decoder: in the tower, the projector and the embeddings, up to the stream that enters block 0.

Unusual: a picture whose tower is changed runs only the tower's layers from there on; every other picture's features are
the base's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_lens.sweep.attach import Todo, attached, writers
from llava_lens.sweep.base import Base
from llava_lens.sweep.climb import Climb, Member
from llava_lens.sweep.edits import FRONT, Edit, axes_of
from llava_lens.sweep.sites import TOWER_ENDS, site_of


def embedded(base: Base, cells: Sequence[Sequence[Edit]], first: int) -> Tensor:
    """The stream `[cell, place, d_model]` that enters block 0, from place `first` on, with each cell's edits made."""
    row, places = base.row, range(first, len(base.row.columns))
    x = base.acts["hook_embed"].expand(len(cells), -1, -1).clone()
    for image, (slots, picture) in enumerate(row.standing(base.model)):
        who = [i for i, edits in enumerate(cells) if any(is_of(edit, image) for edit in edits)]
        if who:
            mine = [[edit for edit in cells[i] if is_of(edit, image)] for i in who]
            at = [row.rows.place[column] for column in slots]
            numbers = picture.features(base.model.cfg.seeing(base.row.inputs.pixels).vision.token_grid[1])
            x[torch.tensor(who)[:, None], torch.tensor(at)] = features(base, mine, image)[:, numbers].to(x)
    pictured = set(row.inputs.slots(base.model.cfg)[0].nonzero()[:, 0].tolist()) if row.n_images else set()
    text = [place for column, place in row.rows.place.items() if column not in pictured]
    for i, edits in enumerate(cells):
        said = [edit for edit in edits if edit.hook == "hook_text_embed"]
        words = base.acts["hook_text_embed"][0].clone() if said else x[i]
        for edit in said:
            edit.write(words, axes_of(base.model.hook(edit.hook)), row.rows)
        if said:  # pictures stand in their own places, whatever the text says there
            x[i, text] = words[text]
        for edit in (edit for edit in edits if edit.hook == "hook_embed"):
            edit.write(x[i], axes_of(base.model.hook(edit.hook)), row.rows)
    return x[:, places.start : places.stop]


def is_of(edit: Edit, image: int) -> bool:
    """Whether an edit is in the tower or the projector, on one picture."""
    return edit.hook.startswith(FRONT) and edit.image == image


def features(base: Base, cells: Sequence[Sequence[Edit]], image: int) -> Tensor:
    """What the decoder sees of one picture, `[cell, feature, d_model]`, with each cell's edits made."""
    order = sorted(range(len(cells)), key=lambda i: tower_stage(base, cells[i]))
    members = [Member(tower_stage(base, cells[i]), tuple(cells[i])) for i in order]
    tower = Tower(base, members, image)
    out = tower.project(tower.go(tower.begin()))
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return out[back]


def tower_stage(base: Base, edits: Sequence[Edit]) -> int:
    """The first stage of the tower that the edits change; its end for the projector."""
    end = 2 * base.model.vision.cfg.n_layers
    sites = [site_of(base.model, edit.hook) for edit in edits]
    return min(site.stage if site.room == "tower" else end for site in sites)


class Tower(Climb):
    """The way through the vision tower, one picture per cell, and through the projector."""

    def begin(self) -> Tensor | None:
        """The stream of the cells whose change comes before the first block."""
        early = [member for member in self.members if member.stage < 0]
        if not early:
            return None
        assert self.base.row.inputs.pixels is not None
        pixels = self.base.row.inputs.pixels[self.sample : self.sample + 1].expand(len(early), -1, -1, -1)
        todo = {n: w for n, w in self.todo.items() if site_of(self.model, n) == ("tower", -1)}
        with attached(self.model, writers(self.model, todo, lambda: None)):
            return self.model.vision.start(pixels)

    def reached(self, layer: int, x: Tensor | None) -> None:
        if layer == 0:
            self.streams: list[Tensor] = []
        read = layer in self.model.vision.cfg.feature_layers
        name = self.stream_name(2 * layer)
        if not read:
            self.streams.append(self.recorded(name))
            return
        rest = len(self.members) - (0 if x is None else len(x))
        parts = [] if x is None else [x]
        self.streams.append(torch.cat((*parts, self.recorded(name).expand(rest, -1, -1))))

    def project(self, x: Tensor) -> Tensor:
        """Features and projector."""
        ends = (*TOWER_ENDS, "projector.")
        todo: Todo = {n: w for n, w in self.todo.items() if n.startswith(ends)}
        with attached(self.model, writers(self.model, todo, lambda: None)):
            return self.model.projector(self.model.vision.hook_features(self.model.vision.select(self.streams)))
