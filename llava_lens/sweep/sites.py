"""Where a hook sits in the order of a forward pass, and whether this library's engine knows that forward pass.

Unusual: stages count half blocks. A block `l` is entered at stage `2l`, its MLP half at `2l + 1`, and the end of the
stack is stage `2 · n_layers`; a change at a stage leaves everything before it as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from llava_lens.errors import UnknownHook, nearest
from llava_lens.layers import Attention, Block
from llava_lens.model import HookedLlava
from llava_lens.sweep.edits import FRONT
from llava_lens.vision import TOWERS

Room = Literal["tower", "projector", "embed", "decoder"]
SECOND_HALF = ("hook_resid_mid", "hook_mlp_in", "ln2.", "mlp.", "hook_attn_out", "attn.hook_z")
"""Hooks whose change can enter a run between attention and MLP: the attention's own work is as it was."""
AT_THE_END = ("hook_mlp_out", "hook_resid_post")
"""Hooks whose change can enter a run after the block."""
TOWER_ENDS = ("vision.hook_features", "vision.ln_post.")
"""Hooks behind the tower's last block."""
BRANCHES = ("hook_{}", "attn.hook_{}", "mlp.hook_{}", "{}")
DERIVED = ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result")
"""Hooks that no run starts from, and that take much memory to record."""
SEAMS = ("forward", "embed_inputs", "run_blocks", "read_out")
FRONT_SEAMS = ("splice", "encode_image")
TOWER_STEPS = ("forward", "start", "embed", "patches", "add_positions", "mask", "angles")
"""Steps that a class of towers must have left as they are; what it makes of its layers (`select`) is its own."""
FOLLOWED = ("mask", "positions", "arrange", "embed_tokens")
"""Steps that a class may have of its own: the shortened runs take them as they are."""


class Site(NamedTuple):
    """A hook's room, and the stage at which a change there enters its stack (-1: before the tower's first block)."""

    room: Room
    stage: int


def site_of(model: Any, name: str) -> Site:
    """The place of the hook called `name`; raises `UnknownHook` with the nearest names."""
    model.hook(name)
    block = re.fullmatch(r"(vision\.)?blocks\.(\d+)\.(.+)", name)
    if block:
        stage = 2 * int(block[2])
        late = 2 if block[3] in AT_THE_END else 1 if block[3].startswith(SECOND_HALF) else 0
        return Site("tower" if block[1] else "decoder", stage + late)
    if name.startswith("vision."):
        return Site("tower", 2 * model.vision.cfg.n_layers if name.startswith(TOWER_ENDS) else -1)
    if name.startswith("projector."):
        return Site("projector", 0)
    if name in ("hook_text_embed", "hook_embed"):
        return Site("embed", 0)
    return Site("decoder", 2 * model.cfg.n_layers)


def rank_of(model: Any, name: str) -> tuple[int, int]:
    """A hook's place in the order of a pass; what comes later never changes what comes earlier."""
    room, stage = site_of(model, name)
    inside = {"hook_text_embed": 0, "hook_embed": 1}.get(name, stage)
    if room == "projector":
        inside = [each for each in model.hook_dict if each.startswith("projector.")].index(name)
    return ("tower", "projector", "embed", "decoder").index(room), inside


def names_at(model: Any, hook: str) -> list[str]:
    """The full names of a hook in every layer, from TransformerLens's short name: `"z"`, `"vision.resid_pre"`.

    A full name without a layer (`"blocks.{layer}.attn.hook_z"` needs none, `"projector.hook_out"` has none) stays
    itself. Raises `UnknownHook` with the nearest names.
    """
    if hook in model.hook_dict:
        return [hook]
    tower = hook.startswith("vision.")
    prefix, short = ("vision." if tower else ""), hook.removeprefix("vision.")
    n_layers = model.vision.cfg.n_layers if tower and hasattr(model, "vision") else model.cfg.n_layers
    for branch in BRANCHES:
        name = branch.format(short)
        if n_layers and f"{prefix}blocks.0.{name}" in model.hook_dict:
            return [f"{prefix}blocks.{layer}.{name}" for layer in range(n_layers)]
    known = {re.sub(r"^(?:vision\.)?blocks\.\d+\.(?:attn\.|mlp\.)?(?:hook_)?", "", name) for name in model.hook_dict}
    raise UnknownHook(f"no hook is called {hook!r}{nearest(hook, [*known, *model.hook_dict])}")


def entered(model: Any, hooks: Iterable[str]) -> list[str]:
    """What runs that change at some hooks start from, beside what every base keeps: recorded with them."""
    names = list(dict.fromkeys(hooks))
    z = "attn.hook_z"
    wanted = [name.removesuffix(z) + "hook_attn_out" for name in names if name.endswith(z)]
    if any(name.startswith(FRONT) for name in names):
        blocks = [f"vision.blocks.{layer}." for layer in range(model.vision.cfg.n_layers)]
        wanted += [block + name for block in blocks for name in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")]
        wanted.append("vision.hook_embed")
    return [*(name for name in names if not name.endswith(DERIVED)), *wanted]


def why_not(model: Any, front: bool) -> str | None:
    """Why runs of this model cannot be shortened, None where they can; `front` asks about tower and embedding too."""
    kind = type(model)
    if not isinstance(model, HookedLlava):
        return f"{kind.__name__} is no HookedLlava"
    seams = (*SEAMS, *FRONT_SEAMS)
    own = [n for n in seams if getattr(kind, n) is not getattr(HookedLlava, n) or n in model.__dict__]
    plain = [name for name in own if name in SEAMS or front] + [n for n in FOLLOWED if n in model.__dict__]
    if plain:
        return f"{kind.__name__}.{plain[0]} is its own"
    if not all(type(block) is Block and type(block.attn) is Attention for block in model.blocks):
        return "the decoder's blocks are of another class"
    if front and hasattr(model, "vision"):
        if not any(_runs_as(type(model.vision), known) for known in TOWERS.values()):
            return f"the tower is a {type(model.vision).__name__}"
        if not all(type(block) is Block and type(block.attn) is Attention for block in model.vision.blocks):
            return "the tower's blocks are of another class"
    return why_watched(model)


def _runs_as(kind: type, known: type) -> bool:
    """Whether a class of towers runs its blocks as a known one does."""
    return issubclass(kind, known) and all(getattr(kind, step) is getattr(known, step) for step in TOWER_STEPS)


def why_watched(model: Any) -> str | None:
    """Who else is in the forward pass: hooks of this library or of torch, and methods put on single modules."""
    live = [name for name, hook in model.hook_dict.items() if hook.live]
    if live:
        return f"a hook on {live[0]!r} is held by the user"
    for name, module in model.named_modules():
        torchs = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(torchs):
            return f"a torch hook on {name or type(model).__name__!r} is held by the user"
        if "forward" in module.__dict__:
            return f"{name or type(model).__name__}.forward was replaced"
    return None
