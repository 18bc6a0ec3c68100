"""Published weights on our parameters: a strict rename, tensor by tensor, onto a model built on "meta".

Unusual: all headers are checked before the first weight is read, and the model is touched only when every weight is
there, so a failed load leaves it as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llava_lens.checkpoint import Checkpoint, NotLlava, open_checkpoint
from llava_lens.rename import (
    CLIP_TABLE,
    LLAMA_TABLE,
    LLAVA_TABLE,
    UNKNOWN,
    Fold,
    Row,
    Table,
    UnknownWeights,
    Unused,
    look_up,
    nearest_key,
    published,
    rename,
)
from llava_lens.shards import CheckpointError, CorruptFile, Entry, UnsafeFile

__all__ = [
    "CLIP_TABLE",
    "LLAMA_TABLE",
    "LLAVA_TABLE",
    "Checkpoint",
    "CheckpointError",
    "CorruptFile",
    "Fold",
    "MissingWeights",
    "NotLlava",
    "Row",
    "Table",
    "UnknownWeights",
    "UnsafeFile",
    "Unused",
    "WrongWeights",
    "assign_state_dict",
    "load_weights",
    "open_checkpoint",
    "rename",
]


Source = Checkpoint | Mapping[str, Tensor]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHOWN = 8  # names in one message


class MissingWeights(CheckpointError):
    """The model has weights that the checkpoint does not hold."""


class WrongWeights(CheckpointError):
    """A weight has another shape or kind of number than the model expects, or comes twice with different values."""


def load_weights(
    model: nn.Module,
    source: Source,
    table: Table = LLAVA_TABLE,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> None:
    """Give every parameter of a model (built on "meta") its tensor from a checkpoint or a state dict.

    `dtype` None keeps the checkpoint's (a state dict's tensors keep theirs); without a cast nothing is copied.
    Raises `MissingWeights`, `UnknownWeights`, `WrongWeights` or `CorruptFile`, and then leaves the model untouched.
    """
    plan = _plan(model, source, table)
    if dtype is None and isinstance(source, Checkpoint):
        dtype = source.dtype
    total = sum(entry.nbytes for entry in plan.values())
    loaded: dict[str, Tensor] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress or total < 1e9) as bar:
        for name, entry in plan.items():
            loaded[name] = entry.load().detach().to(device=device, dtype=dtype)
            bar.update(entry.nbytes)
    _assign(model, _untie(model, loaded))


def assign_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], table: Table = LLAVA_TABLE) -> None:
    """Share a state dict's tensors with the model, uncopied; raises as `load_weights` does."""
    load_weights(model, state_dict, table)


def _plan(model: nn.Module, source: Source, table: Table) -> dict[str, Entry]:
    """Which entry each of the model's weights comes from, in file order, after every check that headers allow."""
    wanted = model.state_dict(keep_vars=True)
    if isinstance(source, Checkpoint):
        plan = _match(model, wanted, source.tensors, table)
        if source.tower is not None:
            plan = {**_match(model, wanted, source.tower.tensors, table), **plan}
    else:
        tensors = source.items()
        plan = _match(model, wanted, (Entry(k, tuple(t.shape), t.dtype, lambda t=t: t) for k, t in tensors), table)
    missing = [name for name in wanted if name not in plan and _tied_to(model, name) not in plan]
    missing += [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in wanted]
    if missing:
        names = _some([_spelt(name, plan, table) for name in missing[:SHOWN]], len(missing))
        raise MissingWeights(f"{len(missing)} weights are missing: {names}")
    for name, entry in plan.items():
        _check(name, entry, wanted[name])
    return plan


def _match(model: nn.Module, wanted: Mapping[str, Tensor], entries: Iterable[Entry], table: Table) -> dict[str, Entry]:
    plan: dict[str, Entry] = {}
    unknown: list[str] = []
    for entry in entries:
        name = look_up(entry.key, table)
        if name is None or _never_runs(model, name):
            continue
        if name not in wanted:
            unknown.append(entry.key)
        elif name in plan:
            raise WrongWeights(f"{entry.key!r} and {plan[name].key!r} are both {name}; expected one of them")
        else:
            plan[name] = entry
    if unknown:
        reasons = [_why_unknown(key, table) for key in unknown[:SHOWN]]
        raise UnknownWeights(f"{len(unknown)} weights are unknown: {_some(reasons, len(unknown), '; ')}")
    return plan


def _why_unknown(key: str, table: Table) -> str:
    name = look_up(key, table)
    return f"{key!r}{nearest_key(key, table)}" if name == UNKNOWN else f"{key!r} (the model has no {name})"


def _check(name: str, entry: Entry, wanted: Tensor) -> None:
    if entry.shape != tuple(wanted.shape):
        raise WrongWeights(f"{entry.key!r} has shape {entry.shape}; expected {tuple(wanted.shape)} for {name}")
    if wanted.is_floating_point() and entry.dtype not in FLOATS:
        raise WrongWeights(f"{entry.key!r} is stored as {entry.dtype}; expected one of {', '.join(map(str, FLOATS))}")


def _never_runs(model: nn.Module, name: str) -> bool:
    """True for the tower's blocks above the feature layer, which the checkpoint holds and the model does not build."""
    vision = getattr(getattr(model, "cfg", None), "vision", None)
    block = re.match(r"vision\.blocks\.(\d+)\.", name)
    return bool(vision and block and vision.n_layers <= int(block[1]) < vision.n_layers_total)


def _ties(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Pairs of weights that are one tensor: those that the model names, or both ends of a tied decoder."""
    tied = getattr(getattr(model, "cfg", None), "tie_word_embeddings", False)
    return getattr(model, "tied_weights", (("embed.weight", "unembed.weight"),) if tied else ())


def _tied_to(model: nn.Module, name: str) -> str | None:
    """The weight that `name` shares its tensor with."""
    return {a: b for pair in _ties(model) for a, b in (pair, pair[::-1])}.get(name)


def _untie(model: nn.Module, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor for both ends of a tie, whichever of them the checkpoint holds; both must be equal."""
    for pair in _ties(model):
        ends = [name for name in pair if name in loaded]
        if len(ends) == 2 and not torch.equal(loaded[ends[0]], loaded[ends[1]]):
            raise WrongWeights(f"{ends[0]} and {ends[1]} differ; expected equals, as tie_word_embeddings says")
        loaded = loaded | ({name: loaded[ends[0]] for name in pair} if ends else {})
    return loaded


def _assign(model: nn.Module, loaded: Mapping[str, Tensor]) -> None:
    made: dict[int, nn.Parameter] = {}
    for name, tensor in loaded.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, leaf)
        if isinstance(old, nn.Parameter):
            made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=old.requires_grad))
            tensor = made[id(tensor)]
        setattr(owner, leaf, tensor)


def _spelt(name: str, plan: Mapping[str, Entry], table: Table) -> str:
    key = published(name, [entry.key for entry in plan.values()], table)
    return f"{name} (published as {key})" if key else name


def _some(names: list[str], total: int, between: str = ", ") -> str:
    more = f"{between}and {total - len(names)} more" if total > len(names) else ""
    return between.join(names) + more
