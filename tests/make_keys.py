"""Write llava_lens/keys.py from the hook table: `python tests/make_keys.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from random_models import hf_llava

from llava_lens import HookedLlava, hook_table

TARGET = Path(__file__).parent.parent / "llava_lens" / "keys.py"
COMMAND = "python tests/make_keys.py"
NORMS = ("ln1.", "ln2.")


def sort_out(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Short names of one stack's block hooks (without its norms'), and the full names of the hooks outside blocks."""
    names = list(names)
    inside = [name.removeprefix("blocks.{layer}.") for name in names if name.startswith("blocks.")]
    short = {name.rpartition("hook_")[2] for name in inside if not name.startswith(NORMS)}
    return sorted(short), sorted(name for name in names if "blocks." not in name)


def literal(name: str, doc: str, values: list[str]) -> str:
    keys = [value + suffix for value in values for suffix in ("", "_grad")]
    lines = "".join(f'    "{key}",\n' for key in keys)
    return f'{name} = Literal[\n{lines}]\n"""{doc}"""\n'


def source() -> str:
    """The text of llava_lens/keys.py for the hooks there are now."""
    names = [row.name for row in hook_table(HookedLlava.from_hf(hf_llava()))]
    decoder_block, decoder = sort_out(names)
    tower_block, tower = sort_out(name.removeprefix("vision.") for name in names if name.startswith("vision."))
    norms = {name.rpartition("hook_")[2] for name in names if any(f".{norm}" in name for norm in NORMS)}
    parts = [
        f'"""The keys of a cache as types, for pyright; generated from the hook table by `{COMMAND}`."""\n',
        "from typing import Literal\n",
        literal("DecoderBlockKey", 'What `cache[key, layer]` takes: `cache["resid_post", 3]`.', decoder_block),
        literal("DecoderKey", "Full names of the hooks outside the blocks, for `cache[key]`.", decoder),
        literal("TowerBlockKey", 'What `cache.vision[key, layer]` takes: `cache.vision["pattern", 0]`.', tower_block),
        literal("TowerKey", "Full names of the tower's hooks outside its blocks, for `cache.vision[key]`.", tower),
        literal("NormKey", 'What `cache[key, layer, norm]` takes: `cache["scale", 0, "ln1"]`.', sorted(norms)),
        'Norm = Literal["ln1", "ln2"]\n"""The norm before the attention and the one before the MLP."""\n',
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(source())
