"""The run that interventions are made on: one row, run once, with everything that later runs start from.

Unusual: a second run that begins with the same tokens and pictures starts from the first one's keys and values, so what
both have in common is the same to the bit, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llava_lens.errors import LensError
from llava_lens.hooks import Hook, reader
from llava_lens.layers import Mask
from llava_lens.rotary import Angles
from llava_lens.sweep.attach import Todo, attached, writers
from llava_lens.sweep.edits import FRONT, Edit, axes_of
from llava_lens.sweep.prefix import SharedPrefix
from llava_lens.sweep.rows import Row, shared_length
from llava_lens.sweep.sites import site_of

EMBEDDING = ("hook_text_embed", "hook_embed")
BLOCK_ENTRIES = ("hook_resid_pre", "hook_resid_mid", "attn.hook_rot_k", "attn.hook_v")
"""What runs start from in each of the decoder's blocks."""
END = "stream after the last block"
"""The entry of the final stream; no hook carries this name."""


class Base:
    """Recorded activations `[1, place, …]` of one row without its padding, and the runs that go on from them.

    `edits` hold throughout (a corruption, say) and sit in front of the decoder's blocks. `acts` holds what was asked
    for and what runs start from; tower entries count pictures.
    """

    def __init__(self, model: Any, row: Row, names: Iterable[str] = (), edits: Sequence[Edit] = ()):
        self.model, self.row, self.edits = model, row, tuple(edits)
        late = [e.hook for e in self.edits if site_of(model, e.hook).room == "decoder"]
        if late:
            raise LensError(f"a lasting edit at {late[0]!r}; expected hooks before the decoder's blocks")
        self.names = tuple(dict.fromkeys((*self.needed(), *names)))
        self.acts: dict[str, Tensor] = {}
        self.shared = 0
        self.like: Base | None = None

    @classmethod
    def of(
        cls,
        model: Any,
        row: Row,
        names: Iterable[str] = (),
        edits: Sequence[Edit] = (),
        like: Base | None = None,
    ) -> Base:
        """Run a row; what it has in common with the run `like` is taken from there. The same prompt is the same run."""
        base = cls(model, row, names, edits)
        if like is not None and not base.edits and not like.edits:
            pictured = like.row.inputs.pixels is not None
            like.require(name for name in base.names if pictured or not name.startswith(FRONT))
            shared = base._common(like)
            if shared == len(row.columns) == len(like.row.columns):
                base.acts, base.shared, base.like = dict(like.acts), shared, like
                return base
            if shared:
                base._branch(like, min(shared, len(row.columns) - 1))
                return base
        base._run()
        return base

    def require(self, names: Iterable[str]) -> None:
        """Record what is missing, in another run."""
        if missing := [name for name in names if name not in self.acts]:
            again = Base.of(self.model, self.row, (*self.names, *missing), self.edits, self.like)
            self.names, self.acts, self.shared = again.names, again.acts, again.shared

    def needed(self) -> list[str]:
        """Entries that every base keeps."""
        blocks = BLOCK_ENTRIES
        names = [f"blocks.{layer}.{name}" for layer in range(self.model.cfg.n_layers) for name in blocks]
        pictures = ["projector.hook_out"] if self.row.inputs.pixels is not None else []
        return [*names, *pictures, "hook_text_embed", "hook_embed", END]

    # ---- running

    def _run(self) -> None:
        inputs = self.row.compact.check(self.model.cfg)
        todo: Todo = {}
        for edit in self.edits:
            todo.setdefault(edit.hook, []).append((edit.image if edit.hook.startswith(FRONT) else 0, edit))
        fixed = writers(self.model, {n: w for n, w in todo.items() if n.startswith(FRONT)}, lambda: None)
        moving = {n: w for n, w in todo.items() if not n.startswith(FRONT)}
        held = attached(self.model, fixed | writers(self.model, moving, lambda: self.row.rows))
        with torch.inference_mode(), held, self._recording(self.names, self.acts):
            x = self.model.embed_inputs(inputs)
            for block in self.model.blocks:
                x = block(x, self.mask, self.angles)
            self._read_out(x)
        self.acts[END] = x

    def _read_out(self, x: Tensor) -> None:
        """Only where something behind the blocks is recorded."""
        if any(name.startswith(("ln_final.", "hook_logits")) for name in self.names):
            self.model.read_out(x)

    def _branch(self, like: Base, shared: int) -> None:
        """Run only what comes after the common part."""
        model, own = self.model, {}
        names = [n for n in self.names if not n.startswith(FRONT)]
        same_pictures = self._pictures_as(like)
        front = [] if same_pictures else [n for n in self.names if n.startswith(FRONT)]
        with torch.inference_mode(), self._recording([*names, *front], own):
            x = self._embed(like if same_pictures else None)[:, shared:]
            angles = self.angles_at(slice(shared, None))
            visible = self.visible(shared)
            for layer, block in enumerate(model.blocks):
                x = block(x, Mask(), angles, SharedPrefix(*like.keys_and_values(layer, shared), visible))
            self._read_out(x)
        own[END] = x
        for name in self.names:
            if name.startswith(FRONT) and name not in own:
                own[name] = like.acts[name]
            elif not name.startswith(FRONT) and name not in EMBEDDING:
                own[name] = self._joined(name, like.acts[name], own[name], shared)
        self.acts, self.shared, self.like = own, shared, like

    def _embed(self, like: Base | None) -> Tensor:
        model, inputs = self.model, self.row.compact.check(self.model.cfg)
        if like is None or inputs.pixels is None:
            return model.embed_inputs(inputs)
        slots = inputs.slots(model.cfg)
        tokens = inputs.tokens.masked_fill(slots, 0) if model.image_token_is_outside else inputs.tokens
        text = model.hook_text_embed(model.embed_tokens(tokens))
        return model.hook_embed(model.splice(text, slots, model.in_slots(like.acts["projector.hook_out"], inputs)))

    def _joined(self, name: str, before: Tensor, own: Tensor, shared: int) -> Tensor:
        axes = self.model.hook(name).axes.split() if name != END else ["batch", "pos", "d_model"]
        axis = next(i for i, a in enumerate(axes) if a in ("pos", "query"))
        head = before.narrow(axis, 0, shared)
        if "key" in axes:  # earlier queries see nothing of what comes later
            gap = own.shape[-1] - head.shape[-1]
            fill = -torch.inf if name.endswith("scores") else 0.0
            head = head[..., : own.shape[-1]] if gap <= 0 else torch.nn.functional.pad(head, (0, gap), value=fill)
        return torch.cat((head, own), axis)

    def _common(self, like: Base) -> int:
        if self.row.n_columns != like.row.n_columns and self.model.cfg.rope.get("rope_type") in ("dynamic", "longrope"):
            return 0  # the rotary frequencies depend on the length
        shared = shared_length(self.row, like.row, self.model)
        apart = not self.is_causal or not torch.equal(self.positions[..., :shared], like.positions[..., :shared])
        return 0 if apart and shared < max(len(self.row.columns), len(like.row.columns)) else shared

    def _pictures_as(self, like: Base) -> bool:
        ours, theirs = self.row.inputs.pixels, like.row.inputs.pixels
        return ours is None or (theirs is not None and torch.equal(ours, theirs))

    def _recording(self, names: Iterable[str], into: dict[str, Tensor]) -> Any:
        @reader
        def keep(act: Tensor, hook: Hook) -> None:
            into[str(hook.name)] = act

        return attached(self.model, {name: keep for name in names if name != END})

    # ---- reading

    @cached_property
    def positions(self) -> Tensor:
        """The rotary positions of every column, padding included."""
        found = self.model.positions(self.row.inputs)
        return torch.arange(self.row.n_columns, device=self.model.cfg.device)[None] if found is None else found

    @property
    def is_causal(self) -> bool:
        """Whether no place sees what comes after it."""
        return self._seen is None

    @cached_property
    def _seen(self) -> Tensor | None:
        """Which places each place sees, where that is the model's own matter and not only causal."""
        return self.row.seen(self.model)

    @property
    def mask(self) -> Mask:
        """What the places see of one another."""
        return Mask(causal=True) if self._seen is None else Mask(self._seen[None, None])

    def visible(self, first: int) -> Tensor:
        """Which of the places from `first` on each of them sees, `[place, place]`."""
        if self._seen is not None:
            return self._seen[first:, first:]
        length = len(self.row.columns) - first
        return torch.ones(length, length, dtype=torch.bool, device=self.model.cfg.device).tril()

    @cached_property
    def angles(self) -> Angles:
        """The rotary angles of every place."""
        whole = self.model.rotary(self.positions, self.model.cfg.dtype)
        keep = list(self.row.columns)
        return Angles(whole.cos[:, :, keep], whole.sin[:, :, keep])

    def angles_at(self, which: slice | list[int]) -> Angles:
        """Those of some places."""
        return Angles(self.angles.cos[:, :, which], self.angles.sin[:, :, which])

    def keys_and_values(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of the first places, `[kv_head, length, d_head]` each."""
        k, v = (self.acts[f"blocks.{layer}.attn.{name}"][0, :length] for name in ("hook_rot_k", "hook_v"))
        return k.transpose(0, 1), v.transpose(0, 1)

    def entering(self, stage: int) -> Tensor:
        """The stream `[1, place, d_model]` at a stage of the decoder."""
        layer, half = divmod(stage, 2)
        if layer == self.model.cfg.n_layers:
            return self.acts[END]
        return self.acts[f"blocks.{layer}.hook_resid_{'mid' if half else 'pre'}"]

    def logits(self, places: Sequence[int]) -> Tensor:
        """Logits `[place, d_vocab]` of some places."""
        with torch.inference_mode():
            return self.model.read_out(self.acts[END][:, list(places)])[0]

    def of_sample(self, edit: Edit) -> Tensor:
        """The recorded activation that an edit is about, without its batch axis."""
        act = self.acts[edit.hook]
        return act[edit.image] if edit.hook.startswith(FRONT) else act[0]

    def is_noop(self, edit: Edit) -> bool:
        """Whether an edit would leave what was recorded as it is, to the bit."""
        if callable(edit.value) or edit.hook not in self.acts:
            return False
        act, axes = self.of_sample(edit), axes_of(self.model.hook(edit.hook))
        rows = None if edit.hook.startswith(FRONT) else self.row.rows
        if edit.pos is not None and edit.how == "replace" and isinstance(edit.value, Tensor):
            part = edit.part(act, axes, rows)
            if part.shape == edit.value.shape:
                return torch.equal(part, edit.value.to(part))
        after = act.clone()
        edit.write(after, axes, rows)
        return torch.equal(after, act)
