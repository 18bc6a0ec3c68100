"""A batch of runs on its way through a stack of blocks; each run joins where its first change is.

Unusual: what lies before a run's first change is the base's, so the run joins the batch late, at the half block where
it starts to differ. The decoder carries only positions that can change, and in its last block only those that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_lens.layers import Mask
from llava_lens.sweep.attach import Todo, attached, writers
from llava_lens.sweep.base import END, Base
from llava_lens.sweep.edits import Edit, Rows, axes_of
from llava_lens.sweep.prefix import SharedPrefix


@dataclass(frozen=True)
class Member:
    """One run's part in a stack: the stage where it joins, and its edits there."""

    stage: int
    edits: tuple[Edit, ...]


class Climb:
    """The tower's way: all positions, no prefix. `members` are in the order of their stages."""

    prefix = "vision."

    def __init__(self, base: Base, members: Sequence[Member], sample: int = 0):
        self.base, self.model, self.sample = base, base.model, sample
        self.members = list(members)
        self.blocks: Any = self.stack.blocks
        self.joined = 0
        self.rows: Rows | None = None
        self.todo = self._todo()

    @property
    def stack(self) -> Any:
        return self.model.vision

    def _todo(self) -> Todo:
        todo: Todo = {}
        for i, member in enumerate(self.members):
            entry = self.entry_hooks(member.stage)
            for edit in member.edits:
                if edit.hook not in entry:
                    todo.setdefault(edit.hook, []).append((i, edit))
        return todo

    def entry_hooks(self, stage: int) -> list[str]:
        """Hooks whose edits are made on the way in: their activation is already there."""
        layer, half = divmod(stage, 2)
        if half:
            return [f"{self.prefix}blocks.{layer}.{name}" for name in ("attn.hook_z", "hook_attn_out")]
        return [f"{self.prefix}blocks.{layer - 1}.{name}" for name in ("hook_mlp_out", "hook_resid_post")]

    # ---- the way

    def go(self, x: Tensor | None = None) -> Tensor:
        """From the members that have started (`x`, those with the lowest stages) to the stream at the end."""
        self.joined = 0 if x is None else len(x)
        for layer, block in enumerate(self.blocks):
            x = self.join(x, 2 * layer)
            late = self.late(layer)
            self.reached(layer, x)
            if x is None and late is None:
                continue
            with attached(self.model, writers(self.model, self.here(layer), lambda: self.rows)):
                if x is not None:
                    x = self.first_half(layer, block, x)
                self.halfway(layer)
                if late is not None:
                    x = late if x is None else torch.cat((x, late))
                assert x is not None
                x = block.second_half(x)
        x = self.join(x, 2 * len(self.blocks))
        self.reached(len(self.blocks), x)
        assert x is not None and self.joined == len(self.members)
        return x

    def here(self, layer: int) -> Todo:
        """The edits of one block."""
        start = f"{self.prefix}blocks.{layer}."
        return {name: writes for name, writes in self.todo.items() if name.startswith(start)}

    def first_half(self, layer: int, block: Any, x: Tensor) -> Tensor:
        """Through the attention."""
        return block.first_half(x, Mask())

    def late(self, layer: int) -> Tensor | None:
        """The members that join between attention and MLP; made before any hook is attached."""
        return self.entering(2 * layer + 1)

    def halfway(self, layer: int) -> None:
        """Called between attention and MLP."""

    def reached(self, layer: int, x: Tensor | None) -> None:
        """Called with the stream before each block, and at the end."""

    # ---- joining

    def join(self, x: Tensor | None, stage: int) -> Tensor | None:
        """The batch with the members that start at a stage."""
        new = self.entering(stage)
        return x if new is None else new if x is None else torch.cat((x, new))

    def entering(self, stage: int) -> Tensor | None:
        """The stream of the members that start at a stage, changed; they follow those that have joined."""
        first = self.joined
        while self.joined < len(self.members) and self.members[self.joined].stage == stage:
            self.joined += 1
        members = self.members[first : self.joined]
        if not members:
            return None
        layer, half = divmod(stage, 2)
        x = self.recorded(self.stream_name(stage)).expand(len(members), -1, -1).clone()
        if half:
            self._change(x, members, f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_attn_out", layer)
        elif layer:
            self._change(x, members, f"blocks.{layer - 1}.hook_resid_mid", f"blocks.{layer - 1}.hook_mlp_out", None)
            self.write(x, members, f"{self.prefix}blocks.{layer - 1}.hook_resid_post")
        return x

    def _change(self, x: Tensor, members: Sequence[Member], before: str, out: str, layer: int | None) -> None:
        """The stream with an edited output of attention (`layer`) or MLP added, in the members that edit it."""
        z = f"{self.prefix}blocks.{layer}.attn.hook_z"
        hooks = (self.prefix + out, z)
        who = [i for i, member in enumerate(members) if any(edit.hook in hooks for edit in member.edits)]
        if not who:
            return
        chosen = [members[i] for i in who]
        mixed = [i for i, member in enumerate(chosen) if any(edit.hook == z for edit in member.edits)]
        added = self.recorded(self.prefix + out).expand(len(who), -1, -1).clone()
        if mixed:
            heads = self.recorded(z).expand(len(mixed), -1, -1, -1).clone()
            self.write(heads, [chosen[i] for i in mixed], z)
            added[mixed] = self.blocks[layer].attn.output(heads)
        self.write(added, chosen, self.prefix + out)
        x[who] = self.recorded(self.prefix + before) + added

    def write(self, act: Tensor, members: Sequence[Member], name: str) -> None:
        """Make the members' edits at one hook."""
        for i, member in enumerate(members):
            for edit in member.edits:
                if edit.hook == name:
                    edit.write(act[i], axes_of(self.model.hook(name)), self.rows)

    def stream_name(self, stage: int) -> str:
        """The recorded stream at a stage."""
        layer, half = divmod(stage, 2)
        if layer == len(self.blocks):
            return f"{self.prefix}blocks.{layer - 1}.hook_resid_post" if layer else f"{self.prefix}hook_embed"
        return f"{self.prefix}blocks.{layer}.hook_resid_{'mid' if half else 'pre'}"

    def recorded(self, name: str) -> Tensor:
        """The base's entry of the sample."""
        return self.base.acts[name][self.sample : self.sample + 1]


class DecoderClimb(Climb):
    """The decoder's way: positions from `first` on, behind the base's keys and values, to the places that are read."""

    prefix = ""
    NARROW = ("hook_resid_pre", "attn.hook_q", "attn.hook_rot_q", "attn.hook_attn_scores", "attn.hook_pattern",
              "attn.hook_z", "attn.hook_result", "hook_attn_out", "hook_resid_mid", "hook_mlp_in", "ln2.hook_scale",
              "ln2.hook_normalized", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post", "hook_mlp_out",
              "hook_resid_post")  # fmt: skip
    """Hooks of the last block whose edits at places that are not read cannot matter."""

    def __init__(self, base: Base, members: Sequence[Member], first: int, read: Sequence[int]):
        super().__init__(base, members)
        self.first, self.length = first, len(base.row.columns) - first
        self.read = [place for place in read if place >= first]
        self.places = list(range(first, first + self.length))
        self.rows = self._rows()
        self.angles = base.angles_at(slice(first, None))
        self.visible = base.visible(first)
        self.narrow = self._may_narrow()

    @property
    def stack(self) -> Any:
        return self.model

    def _rows(self) -> Rows:
        return Rows([self.base.row.columns[place] for place in self.places], self.base.row.rows)

    def _may_narrow(self) -> bool:
        """Whether nothing in the last block or behind it needs the places that are not read."""
        last = f"blocks.{len(self.blocks) - 1}."
        for edit in (edit for member in self.members for edit in member.edits):
            inside = edit.hook.startswith(last)
            if (not inside and edit.hook.startswith("blocks.")) or edit.hook == f"{last}hook_resid_pre":
                continue
            if callable(edit.value) or (inside and edit.hook.removeprefix(last) not in self.NARROW):
                return False  # a function is shown all that it selects
        return len(self.read) < self.length

    def here(self, layer: int) -> Todo:
        todo = super().here(layer)
        if self.narrow and layer == len(self.blocks) - 1:
            todo.pop(f"blocks.{layer}.hook_resid_pre", None)  # made before the rows part
        return todo

    def first_half(self, layer: int, block: Any, x: Tensor) -> Tensor:
        held = self.base.keys_and_values(layer, self.first)
        if layer < len(self.blocks) - 1 or not self.narrow:
            return block.first_half(x, Mask(), self.angles, SharedPrefix(*held, self.visible, whole=self.base.mask))
        before = f"blocks.{layer}.hook_resid_pre"
        for i, edit in self.todo.get(before, []):
            edit.write(x[i], axes_of(self.model.hook(before)), self.rows)
        own = block.attn.keys_and_values(block.ln1(x), self.angles)
        self.halfway(layer)
        read = [place - self.first for place in self.read]
        angles = self.base.angles_at(self.read)
        return block.first_half(x[:, read], Mask(), angles, SharedPrefix(*held, self.visible[read], own))

    def halfway(self, layer: int) -> None:
        """In the last block only what is read goes on."""
        if self.narrow and layer == len(self.blocks) - 1:
            self._carry(self.read)

    def late(self, layer: int) -> Tensor | None:
        carried = self.places
        self.halfway(layer)
        new = super().late(layer)
        self._carry(carried)
        return new

    def entering(self, stage: int) -> Tensor | None:
        if self.narrow and stage == 2 * len(self.blocks):
            self._carry(self.read)
        return super().entering(stage)

    def _carry(self, places: list[int]) -> None:
        if places is not self.places:
            self.places = places
            self.rows = self._rows()

    def stream_name(self, stage: int) -> str:
        return END if stage == 2 * len(self.blocks) else super().stream_name(stage)

    def recorded(self, name: str) -> Tensor:
        act = self.base.acts[name]
        if self.places[-1] - self.places[0] + 1 == len(self.places):
            return act[:, self.places[0] : self.places[-1] + 1]
        return act[:, self.places]

    def logits(self, x: Tensor) -> Tensor:
        """Logits `[run, read, d_vocab]` of the places that are read."""
        ends = {name: writes for name, writes in self.todo.items() if not name.startswith("blocks.")}
        rest = None
        if len(self.places) > len(self.read):
            rest = [place - self.first for place in self.read]
            if not any(callable(edit.value) for writes in ends.values() for _, edit in writes):
                x, rest = x[:, rest], None
                self._carry(self.read)
        with attached(self.model, writers(self.model, ends, lambda: self.rows)):
            logits = self.model.read_out(x)
        return logits if rest is None else logits[:, rest]
