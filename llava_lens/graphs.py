"""Work of one shape that is recorded once as a CUDA graph and then replayed: the host launches one thing, not hundreds.

Unusual: no Python runs in a replay, so a graph serves only while no hook listens and gradients are off, and it is
dropped when a weight moves or changes. By default only the fused path on CUDA uses graphs; `GraphRunner.enabled` pins
it. A decode step is made for recording: it looks at the whole room of the cache under a mask, and writes in place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from llava_lens.facts import WHOLE, carry, tell, tell_written
from llava_lens.hooks import Hook
from llava_lens.inputs import Inputs
from llava_lens.kv_cache import KVCache, Room
from llava_lens.rotary import REACH

Function = Callable[..., Tensor]
MODEL = "llava_lens.model"
MOST_MET = 64
WORTHWHILE = 5
"""Steps to come from which on it pays to record one."""
BUCKET = 128
"""Rooms of decode steps are multiples of so many positions, so that one recording serves prompts of many lengths."""


class Recording(NamedTuple):
    """A graph (anything with `replay`), what it reads and the tensor it writes; `kept` is read too, and so stays."""

    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor
    kept: Any


def record(function: Function, inputs: tuple[Tensor, ...], pool: Any) -> tuple[Any, Tensor]:
    """Run twice on a stream aside, so that libraries have set themselves up, and then into a CUDA graph."""
    with torch.cuda.device(inputs[0].device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(2):
                function(*inputs)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = function(*inputs)
    return graph, output


class Watch:
    """What a recording takes for granted: nobody listens, and the weights are the same.

    Modules are listed once; after a module was exchanged by hand, call `GraphRunner.clear`.
    """

    def __init__(self, model: Any):
        modules = list(model.modules())
        kinds = ("_forward_hooks", "_forward_pre_hooks")  # gradients are off, so nothing fires backward
        self.listeners = [getattr(module, kind) for module in modules for kind in kinds]
        self.hooks = [module for module in modules if isinstance(module, Hook)]
        self.places = [(held, key) for m in modules for held in (m._parameters, m._buffers) for key in held]
        self.attentions = [module for module in modules if hasattr(module, "implementation")]

    def is_heard(self) -> bool:
        """Whether any module has a listener."""
        recorded = any(hook.recorder is not None for hook in self.hooks)
        return recorded or any(self.listeners) or bool(_has_any_global_hook())

    def weights(self) -> list[tuple[int, int] | None]:
        """Where each weight lies, and how often it was edited."""
        held = [tensors.get(key) for tensors, key in self.places]
        return [None if w is None else (w.data_ptr(), -1 if w.is_inference() else w._version) for w in held]

    def plan(self, model: Any) -> Hashable:
        """Which code runs."""
        return getattr(model, "path", "reference"), *(attention.implementation for attention in self.attentions)


class GraphRunner:
    """The recordings of one model, at most `limit`, the longest unused going first; they share one pool of memory."""

    def __init__(self, limit: int = 8, record: Callable[..., tuple[Any, Tensor]] = record, device_type: str = "cuda"):
        self.limit, self.record, self.device_type = limit, record, device_type
        self.enabled: bool | None = None
        self.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphRunner, (self.limit,)  # a copied or loaded model records for itself

    def clear(self) -> None:
        """Forget every recording, and the rooms of decode steps."""
        self.recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self.met: OrderedDict[Hashable, None] = OrderedDict()
        self.steps: dict[Hashable, StaticStep] = {}
        self.watch: Watch | None = None
        self.weights: Any = None
        self.pool: Any = None

    def fits(self, model: Any) -> bool:
        """Whether work may be recorded and replayed now."""
        wanted = getattr(model, "path", "reference") == "fused" if self.enabled is None else self.enabled
        if not wanted or model.cfg.device.type != self.device_type or torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled(self.device_type):
            return False
        if self.device_type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        self.watch = self.watch or Watch(model)
        return not self.watch.is_heard()

    def __call__(self, model: Any, what: Hashable, function: Function, *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, replayed where that may be; `what` names everything but the tensors it depends on.

        Recording costs a few runs, so a shape that comes for the first time is run plainly.
        """
        if not self.fits(model):
            return function(*inputs)
        self._drop_stale(model)
        key = self._key(model, what, inputs)
        if key not in self.recordings and key not in self.met:
            self.met[key] = None
            while len(self.met) > MOST_MET:
                self.met.popitem(last=False)
            return function(*inputs)
        return replay(self.find(model, what, function, *inputs), *inputs)

    def find(self, model: Any, what: Hashable, function: Function, *inputs: Tensor) -> Recording:
        """The recording of `function` for tensors like these, made now if there is none that still holds."""
        self._drop_stale(model)
        key = self._key(model, what, inputs)
        if key not in self.recordings:
            self._record(model, key, function, inputs)
        self.recordings.move_to_end(key)
        return self.recordings[key]

    def _key(self, model: Any, what: Hashable, inputs: tuple[Tensor, ...]) -> Hashable:
        assert self.watch is not None
        return what, self.watch.plan(model), *((tuple(x.shape), x.dtype, x.device) for x in inputs)

    def _drop_stale(self, model: Any) -> None:
        watch = self.watch = self.watch or Watch(model)
        now = watch.weights()
        if now != self.weights:
            self.clear()
            self.watch, self.weights = watch, now

    def _record(self, model: Any, key: Hashable, function: Function, inputs: tuple[Tensor, ...]) -> None:
        while len(self.recordings) >= self.limit:
            self.recordings.popitem(last=False)
        if self.pool is None and self.device_type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(False), torch.no_grad():
            static = tuple(carry(x, x.clone()) for x in inputs)
            graph, output = self.record(function, static, self.pool)
        self.recordings[key] = Recording(graph, static, output, model.rotary.tables)

    def step(self, model: Any, batch: int, capacity: int) -> StaticStep | None:
        """A decode step with an empty room for so many positions; None where it could not be replayed."""
        own_forward = type(model).forward.__module__ != MODEL  # a step goes past `forward`
        if own_forward or not self.fits(model) or model.rotary.depends_on_length:
            return None
        self._drop_stale(model)
        capacity = -(-capacity // BUCKET) * BUCKET
        key = (batch, capacity, model.cfg.dtype)
        step = self.steps.pop(key, None)
        if step is not None and step.busy:
            self.steps[key] = step
            return None
        while len(self.steps) >= self.limit // 2:
            self.steps.pop(next(iter(self.steps)))
        self.steps[key] = step = step or StaticStep(model, batch, capacity)
        step.reset()
        step.busy = True
        return step


def replay(recording: Recording, *inputs: Tensor) -> Tensor:
    """What the recording gives for these inputs, in a tensor of its own."""
    for held, given in zip(recording.inputs, inputs, strict=True):
        held.copy_(given)
    recording.graph.replay()
    return recording.output.clone()


class WholeRoom(KVCache):
    """What a static step attends to: every place of the room, those not yet written too; a mask hides them."""

    def __init__(self, rooms: list[Room | None], column: Int[Tensor, "1"]):
        super().__init__(len(rooms))
        self.rooms, self.column = rooms, column

    @property
    def length(self) -> int:
        """All places but one, so that the mask of a step covers the room."""
        return next(room.k.shape[2] for room in self.rooms if room is not None) - 1

    def held_by(self, first: int, last: int) -> int:
        return self.length

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one new position at `column`; returns the whole room."""
        room = self.rooms[layer]
        assert room is not None
        return room.k.index_copy_(2, self.column, k), room.v.index_copy_(2, self.column, v)


class StaticStep:
    """One new token per row, always in the same tensors: fill `past` with the prompt, then call `start` and `step`.

    `past` is an ordinary cache of `capacity` positions over the same room, and `hand_over` makes it show what the
    steps wrote, so that ordinary steps can follow.
    """

    def __init__(self, model: Any, batch: int, capacity: int):
        cfg, weight = model.cfg, model.embed.weight
        self.model, self.capacity = model, capacity
        with torch.inference_mode(False), torch.no_grad():
            shape = (batch, cfg.n_key_value_heads, capacity, cfg.d_head)
            self.rooms = [Room(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(cfg.n_layers)]
            self.column = torch.zeros(1, dtype=torch.long, device=weight.device)
            self.position = self.column.new_zeros(batch, 1)
            self.seen = self.column.new_ones(batch, capacity)
            self.places = torch.arange(capacity, device=weight.device)
        self.reset()

    def reset(self) -> None:
        """An empty cache over the same room."""
        self.past = KVCache(len(self.rooms), self.capacity)
        self.past.rooms = list(self.rooms)
        self.whole = WholeRoom(list(self.rooms), self.column)
        self.busy, self.written = False, 0
        self.recording: Recording | None = None

    def start(self) -> None:
        """Take over where the prompt ended; padding, and what lies behind the last place, stays hidden."""
        self.written = self.past.length
        self.column.fill_(self.written)
        self.position.fill_(self.written)
        self.seen.fill_(1)
        if self.past.attention_mask is not None:
            self.seen[:, : self.written] = self.past.attention_mask
            self.position.copy_(self.past.attention_mask.sum(-1, keepdim=True))

    def step(self, token: Int[Tensor, "batch 1"], check: bool = True) -> Float[Tensor, "batch d_vocab"]:
        """Logits behind one more token of each row. Without `check` weights and code are taken to be as they were."""
        self.model.n_runs += 1
        recording = None if check else self.recording
        if recording is None:
            recording = self.recording = self.model.graphs.find(self.model, ("step", self), self.run, token)
        logits = replay(recording, token)
        self.column.add_(1)
        self.position.add_(1)
        self.written += 1
        return logits

    def run(self, token: Int[Tensor, "batch 1"]) -> Float[Tensor, "batch d_vocab"]:
        """What is recorded: reads `column`, `position` and `seen`, and writes the room; repeating it is harmless."""
        model, cfg = self.model, self.model.cfg
        mask = self.seen * (self.places <= self.column)
        tell(mask, WHOLE, False)
        tell(self.position, REACH, (0, self.capacity - 1))
        tell_written(token, cfg.image_token_id)
        x = model.embed_inputs(Inputs(token))
        x = model.run_blocks(x, 0, cfg.n_layers, mask, self.position, self.whole)
        return model.read_out(x, 1)[:, -1]

    def hand_over(self) -> KVCache:
        """`past`, showing everything written."""
        for layer, room in enumerate(self.rooms):
            entry = room.k[:, :, : self.written], room.v[:, :, : self.written]
            self.past.entries[layer] = entry
            self.past.rooms[layer] = Room(room.k, room.v, entry)
        if self.past.attention_mask is not None:
            self.past.attention_mask = self.seen[:, : self.written].clone()
        return self.past
