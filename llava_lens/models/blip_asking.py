"""What is asked of a BLIP trace, in the words of the other interventions: hooks, positions, noise, metric, answer.

Unusual: positions are those of one stack, and each stack has roles of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.query import names_of
from llava_lens.analysis.interventions.corruptions import Noise
from llava_lens.analysis.interventions.where import Patches
from llava_lens.errors import LensError, nearest
from llava_lens.models.blip import HookedBlip
from llava_lens.models.blip_config import STACKS
from llava_lens.roles import SELECTORS, Roles
from llava_lens.sweep.edits import places
from llava_lens.sweep.metrics import Bound, Metric, ids_of, metric_of, one_id, prob
from llava_lens.sweep.sites import BRANCHES

NOISY = {"vision.hook_embed": 0, "vision.hook_features": 1, "encoder.hook_embed": 1, "encoder.hook_full_embed": 1}
"""Where embeddings are corrupted, and the first of the stacks whose states that changes."""
OF_PICTURES = ("all", "image", "class")
Groups = dict[str, list[int]]


def hooks_of(model: HookedBlip, restore: str) -> tuple[list[str], str]:
    """The hooks of all layers that a stack and a short name mean, and the stack."""
    stack, _, short = restore.partition(".")
    if stack not in STACKS:
        raise LensError(f"restore={restore!r}; expected a stack in front: {', '.join(f'{s}.…' for s in STACKS)}")
    blocks = [f"{stack}.blocks.{layer}." for layer in range(len(getattr(model, stack).blocks))]
    parts = (*BRANCHES, "cross_attn.hook_{}")
    found = next((part.format(short) for part in parts if blocks[0] + part.format(short) in model.hook_dict), None)
    if found is None:
        known = {name.rpartition("hook_")[2] for name in model.hook_dict if name.startswith(blocks[0])}
        raise LensError(f"no hook is called {restore!r}{nearest(short, known)}")
    if "pos" not in model.hook(blocks[0] + found).axes.split():
        raise LensError(f"{restore!r} has no positions of its own; restore z, attn_out, mlp_out, resid_post …")
    return [block + found for block in blocks], stack


def noise_hook(corruption: Noise, given: str | None, restore: str, stack: str) -> str:
    """The hook at which noise enters; raises `LensError` for one behind what is restored."""
    at = corruption.at
    of_picture = at in OF_PICTURES if isinstance(at, str) else isinstance(at, Patches) or is_mask(at)
    hook = given or ("vision.hook_features" if of_picture else "encoder.hook_embed")
    if hook not in NOISY:
        raise LensError(f"noise_at={hook!r}{nearest(hook, NOISY)}; expected one of {', '.join(NOISY)}")
    if NOISY[hook] > STACKS.index(stack):
        raise LensError(f"{restore!r} lies before {hook!r}, which is corrupted; give noise_at='vision.hook_embed'")
    return hook


def answer_ids(model: HookedBlip, metric: Any) -> list[int]:
    """The answer's tokens, none where the clean run chooses; raises `LensError` for what is no metric."""
    kind = prob() if metric is None else metric_of(metric)
    if not isinstance(kind, Metric):
        raise LensError(f"metric {metric!r}; expected one of llava_lens.analysis.interventions.metrics: prob(…) …")
    if kind.answer is None or kind.kind == "kl":
        return []
    return [one_id(model, kind.answer, "answer")] if "logit" in kind.kind else ids_of(model, kind.answer)


def bind(model: HookedBlip, metric: Any, ids: list[int], logits: Float[Tensor, "1 pos d_vocab"]) -> Bound:
    """The metric with its answer filled in."""
    kind = prob() if metric is None else metric_of(metric)
    if kind.kind == "kl":
        return Bound(kind, clean=logits[0, -1:].log_softmax(-1))
    versus = None
    if kind.kind == "logit_diff":
        versus = one_id(model, kind.versus, "versus")
    return Bound(kind, ids or [int(logits[0, -1].argmax())], versus)


def settled(bound: Bound, clean: Tensor, corrupt: Tensor) -> Bound:
    """The metric scaled by two runs, where it is a recovery."""
    if not bound.metric.recover:
        return bound
    raw = replace(bound, span=None)
    low, high = (float(raw(logits[:, raw.places(logits.shape[1])])[0]) for logits in (corrupt, clean))
    if abs(high - low) <= 1e-9 * max(1.0, abs(high)):
        raise LensError(f"nothing to recover: {bound.metric.kind} is {high:.6g} on the clean and on the corrupt run")
    return replace(bound, span=(low, high))


def select(roles: Roles, at: Any, stack: str) -> list[int]:
    """Positions of one stack: all for None, a role, a word, numbers, or in the tower "image", "class" and patches."""
    if at is None or (isinstance(at, str) and at == "all"):
        return [i for i, label in enumerate(roles.labels) if label != "padding"]
    at = Patches(at) if is_mask(at) else at
    if isinstance(at, Patches) or (stack == "vision" and isinstance(at, str)):
        if stack != "vision" or (isinstance(at, str) and at not in OF_PICTURES):
            raise LensError(f"{at!r} in {stack!r}; expected 'all', 'image', 'class' or patches in 'vision' alone")
        patches = roles.patch_positions().flatten().tolist()
        if isinstance(at, Patches):
            return [patches[i] for i in at.numbers(roles)]
        return patches if at == "image" else [0]
    if isinstance(at, str):
        found = roles.positions(at) if at in (*SELECTORS, "last") else roles.positions_of(at)
        if not len(found):
            raise LensError(f"{stack!r} has no {at!r}; it has {', '.join(dict.fromkeys(roles.labels))}")
        return found.tolist()
    if isinstance(at, list | tuple) and any(not isinstance(each, int) for each in at):
        return sorted({i for each in at for i in select(roles, each, stack)})
    numbers, n = list(places(at.tolist() if isinstance(at, np.ndarray) else at) or ()), len(roles)
    wrong = next((i for i in numbers if not -n <= i < n), None)
    if wrong is not None:
        raise LensError(f"position {wrong} in {stack!r}; expected 0 … {n - 1}")
    return sorted({i % n for i in numbers})


def is_mask(at: Any) -> bool:
    """Whether positions are given as booleans over a picture."""
    return isinstance(at, Tensor | np.ndarray) and str(at.dtype) in ("bool", "torch.bool")


def groups_of(roles: Roles, at: Any, stack: str) -> tuple[str, Groups]:
    """The result's second axis, and the positions of each of its cells that are swept."""
    if isinstance(at, Mapping):
        return "group", {str(name): select(roles, each, stack) for name, each in at.items()}
    return "position", {str(i): [i] for i in select(roles, at, stack)}


def position_names(roles: Roles) -> tuple[int | str, ...]:
    """What the positions of a stack are called."""
    names = names_of(roles)
    return ("class token", *names[1:]) if roles.pictures else names


def spelled(model: HookedBlip, ids: list[int]) -> Any:
    """An answer in words where there is a tokenizer, else in ids."""
    if model.processor is None or any(i >= len(model.tokenizer) for i in ids):
        return ids[0] if len(ids) == 1 else list(ids)
    return model.tokenizer.decode(ids)
