"""A cache on disk: one safetensors file, with a manifest that knows which model and which inputs it belongs to.

Unusual: the file appears whole or not at all, and tensors that share memory are written once and shared again on
loading. What is still to be formed stays so: its sources are written, and the name and digest of the weight it takes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_lens.derived import Derived, identity
from llava_lens.entries import Entries, Held
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.roles import Roles

MANIFEST, VERSION, READ = "llava_lens_cache", 2, (1, 2)
"""Where the manifest is, the format written, and those that are read: files of format 1 hold every entry formed."""
INPUTS = "inputs:"
"""Prefix of the inputs' tensors; no hook name contains a colon."""
IN_INPUTS = ("tokens", "pixels", "attention_mask")
"""Fields of the inputs that hold a tensor; the rest are extras."""


def save_cache(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write a cache so that `path` holds either what it held before or all of the new file.

    Raises `LensError` for a cache without its model, `OSError` where the file cannot be written.
    """
    if cache.model is None:
        raise LensError("this cache has lost its model, so no file could say whose it is; set cache.model first")
    inputs = cache.inputs
    parts = {INPUTS + name: getattr(inputs, name, None) for name in IN_INPUTS}
    parts |= {INPUTS + name: tensor for name, tensor in (inputs.extras if inputs is not None else {}).items()}
    given = {name: tensor for name, tensor in parts.items() if tensor is not None}
    entries, recipes = plain(cache)
    tensors, aliases = distinct({**entries, **given})
    facts = {
        "version": VERSION,
        "model": passport(cache.model),
        "has_batch_dim": cache.has_batch_dim,
        "has_image_dim": cache.has_image_dim,
        "kept": cache.kept,
        "aliases": aliases,
        "recipes": recipes,
        "asked": None if cache.asked is None else sorted(cache.asked),
        "roles": [r.to_json() for r in inputs.roles] if inputs is not None and inputs.roles is not None else None,
    }
    write_whole(tensors, {MANIFEST: json.dumps(facts, ensure_ascii=False)}, Path(os.path.realpath(path)))


def plain(cache: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A cache's tensors, sources of recipes behind them as `name:role`, and for each recipe what else it takes.

    A weight that is the model's is only named. Raises `LensError` for a recipe that cannot be formed any more.
    """
    held = cache.cache_dict.held()
    parameters = {identity(p): name for name, p in cache.model.named_parameters()}
    tensors = {name: act for name, act in held.items() if isinstance(act, Tensor)}
    recipes: dict[str, Any] = {}
    for name, recipe in held.items():
        if not isinstance(recipe, Derived):
            continue
        recipe.check(name)
        named = {role: parameters.get(identity(weight)) for role, weight in recipe.weights.items()}
        own = {role: weight for role, weight in recipe.weights.items() if named[role] is None}
        tensors |= {f"{name}:{role}": tensor for role, tensor in (recipe.sources | own).items()}
        recipes[name] = {
            "kind": recipe.kind,
            "facts": recipe.facts,
            "dtype": None if recipe.dtype is None else str(recipe.dtype).removeprefix("torch."),
            "batched": recipe.batched,
            "sources": list(recipe.sources),
            "weights": {
                role: {"name": named[role], "digest": digest([w]), "dtype": str(w.dtype).removeprefix("torch.")}
                for role, w in recipe.weights.items()
            },
        }
    return tensors, recipes


def distinct(entries: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Entries in memory of their own, on the CPU, and for each left out the name it is stored under."""
    seen: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    storages: set[int] = set()
    for name, act in entries.items():
        first = seen.setdefault(identity(act), name)
        if first != name:
            aliases[name] = first
            continue
        held = act.detach().cpu().contiguous()
        storage = held.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != held.nbytes:
            held = held.clone()  # part of another tensor's memory, as the tower's features are
        storages.add(held.untyped_storage().data_ptr())
        tensors[name] = held
    return tensors, aliases


def write_whole(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write beside `path`, flush to the disk, then take its place in one step; leaves nothing behind on failure."""
    draft = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        save_file(tensors, draft, metadata)
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}; the file that was there is untouched") from error
    finally:
        draft.unlink(missing_ok=True)


class Loaded(NamedTuple):
    """What a file holds: a cache's entries, the inputs of its run, and the manifest's other facts."""

    entries: Entries
    inputs: Inputs | None
    facts: dict[str, Any]


def load_cache(
    path: str | os.PathLike[str],
    model: Any,
    names_filter: Any = None,
    device: torch.device | str | None = None,
    any_weights: bool = False,
) -> Loaded:
    """Read a cache for `model`, on its device unless another is given.

    `names_filter` picks entries as in `run_with_cache`. Raises `LensError` for a file that is cut off or not a cache,
    for another model's cache, and for one of other weights in the same architecture, unless `any_weights`.
    """
    device = model.cfg.device if device is None else device
    try:
        with safe_open(path, framework="pt") as file:
            facts = read_manifest((file.metadata() or {}).get(MANIFEST), path)
            check_passport(facts["model"], passport(model), path, any_weights)
            there = {name: name for name in file.keys()} | facts["aliases"]  # noqa: SIM118
            given, recipes = [name for name in there if name.startswith(INPUTS)], facts["recipes"]
            names = [*(name for name in there if ":" not in name), *recipes]
            if names_filter is not None:
                names = chosen(model, names_filter, names)
            parts = [
                part for name in names for part in ([name] if name not in recipes else parts_of(name, recipes[name]))
            ]
            held = {stored: file.get_tensor(stored).to(device) for stored in {there[name] for name in [*parts, *given]}}
    except SafetensorError as error:
        raise LensError(f"{path} is not a safetensors file, or was cut off: {error}") from error
    if names_filter is not None:
        facts["asked"] = None
    inputs = read_inputs({name: held[there[name]] for name in given}, facts["roles"])
    tensors, weights = {name: held[there[name]] for name in parts}, dict(model.named_parameters())
    entries: dict[str, Held] = {
        name: recipe_of(name, recipes[name], tensors, weights) if name in recipes else tensors[name] for name in names
    }
    return Loaded(Entries(entries), inputs, facts)


def parts_of(name: str, recipe: dict[str, Any]) -> list[str]:
    """The names that a recipe's tensors have in a file."""
    own = [role for role, weight in recipe["weights"].items() if weight["name"] is None]
    return [f"{name}:{role}" for role in (*recipe["sources"], *own)]


def recipe_of(name: str, facts: dict[str, Any], tensors: dict[str, Tensor], weights: dict[str, Any]) -> Derived:
    """A recipe with the tensors of the file and the weights of the model; broken where those are not the run's."""
    found, broken = {}, None
    for role, saved in facts["weights"].items():
        if saved["name"] is None:
            found[role] = tensors[f"{name}:{role}"]
            continue
        weight, dtype = weights[saved["name"]].detach(), getattr(torch, saved["dtype"])
        same = digest([weight]) == saved["digest"] and dtype.itemsize <= weight.dtype.itemsize
        if not same:
            broken = f"this model's {saved['name']} is not the one of the run ({saved['dtype']})"
        found[role] = weight.to(dtype)
    sources = {role: tensors[f"{name}:{role}"] for role in facts["sources"]}
    dtype = None if facts["dtype"] is None else getattr(torch, facts["dtype"])
    return Derived(facts["kind"], sources, found, facts["facts"], dtype, facts["batched"], broken)


def chosen(model: Any, names_filter: Any, there: list[str]) -> list[str]:
    """The entries that a filter picks from a file, gradients along with their activations."""
    wanted = set(model.hook_names(names_filter))
    names = [name for name in there if name.removesuffix("_grad") in wanted]
    if not names:
        raise LensError(f"the filter picks none of the {len(there)} entries in the file")
    return names


def read_manifest(text: str | None, path: Any) -> dict[str, Any]:
    """The facts of a file; raises `LensError` where there are none, or of a newer format."""
    if text is None:
        raise LensError(f"{path} is a safetensors file, but no cache: LlavaCache.save did not write it")
    facts = json.loads(text)
    if facts["version"] not in READ:
        raise LensError(
            f"{path} has cache format {facts['version']}; this release reads {' and '.join(map(str, READ))}"
        )
    return {"recipes": {}} | facts


def read_inputs(tensors: dict[str, Tensor], roles: list[str] | None) -> Inputs | None:
    """The inputs of a file, None if it has none."""
    if not tensors:
        return None
    parts = {name.removeprefix(INPUTS): tensor for name, tensor in tensors.items()}
    own = {name: parts.pop(name) for name in IN_INPUTS if name in parts}
    return Inputs(**own, roles=None if roles is None else tuple(map(Roles.from_json, roles)), extras=parts)


def passport(model: Any) -> dict[str, str]:
    """What names a model: its architecture's fingerprint, a digest of its weights, and what it is called."""
    return {
        "architecture": model.cfg.fingerprint,
        "weights": weights_digest(model),
        "name": model.cfg.model_name,
    }


def check_passport(saved: dict[str, str], now: dict[str, str], path: Any, any_weights: bool) -> None:
    """Raise `LensError` where a cache and a model do not belong together, naming both."""
    theirs, ours = (f"{p['name'] or 'a model without a name'} ({{}} {{}})" for p in (saved, now))
    for what in ("architecture", "weights"):
        if saved[what] != now[what] and not (what == "weights" and any_weights):
            hint = "; any_weights=True takes it all the same" if what == "weights" else ""
            raise LensError(
                f"{path} is a cache of {theirs.format(what, saved[what])}, "
                f"but the model is {ours.format(what, now[what])}{hint}"
            )


def weights_digest(model: torch.nn.Module, per_weight: int = 64) -> str:
    """Sixteen hex digits over up to `per_weight` evenly spread values of each weight, as bfloat16.

    Rounding first makes it the same in every precision a checkpoint is loaded in.
    """
    return digest((weight for _, weight in sorted(model.named_parameters())), per_weight)


def digest(weights: Iterable[Tensor], per_weight: int = 64) -> str:
    """The digest of some weights, as `weights_digest`."""
    samples = [
        weight.detach().reshape(-1)[:: max(1, weight.numel() // per_weight)][:per_weight].to(torch.bfloat16)
        for weight in weights
    ]
    return hashlib.sha256(torch.cat(samples).view(torch.int16).cpu().numpy().tobytes()).hexdigest()[:16]
