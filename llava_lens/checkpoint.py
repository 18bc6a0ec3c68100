"""Where a checkpoint lies and what it says of itself: a folder or a hub id becomes configuration and tensors.

Unusual: the original LLaVA release describes a Llama with `mm_…` keys and names its vision tower instead of holding
it; here it becomes the configuration that transformers would have written, and the tower's own folder is read too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError

from llava_lens.errors import nearest
from llava_lens.shards import WEIGHT_FILES, CheckpointError, Entry, read_headers, read_index, read_json

if TYPE_CHECKING:  # what transformers imports for these takes longer than a small load, so it waits for one
    from transformers import LlavaConfig, PreTrainedConfig

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""What is fetched from the hub before any weight: configuration, index, tokenizer and processor."""

CLIP_TEXT_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
"""What a full CLIP checkpoint holds beside its vision tower."""
LLAMA_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "attention_dropout", "mlp_bias"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
"""What the original release's config.json says of its decoder; the rest of that file is about training."""

ORIGINAL_LIMITS: tuple[tuple[str, tuple[Any, ...], Any, str], ...] = (
    ("image_aspect_ratio", ("pad", "square", None), None, "an image cut into tiles is LLaVA-NeXT's"),
    ("mm_patch_merge_type", ("flat", None), None, "features joined with newlines are LLaVA-NeXT's"),
    ("mm_projector_type", ("mlp2x_gelu",), "linear", "a projector of two layers with a GELU between them"),
    ("mm_use_im_start_end", (False, None), False, "marks around an image change where its features stand"),
    ("mm_vision_select_feature", ("patch", "cls_patch"), "patch", "patch features, or these and the class token"),
    ("mm_resampler_type", (None,), None, "features that reach the projector as they are"),
    ("s2", (False, None), False, "one scale per image"),
)
"""Keys of the original release: accepted values, what an absent key means, and why nothing else is accepted."""


class NotLlava(CheckpointError):
    """A checkpoint of another family, or a variant of LLaVA that this model does not compute."""


@dataclass(frozen=True)
class Checkpoint:
    """A located checkpoint: its configuration in transformers' terms, its folder and its tensors.

    `tower` is the separate vision tower that an original release names; None when one folder holds everything.
    """

    config: PreTrainedConfig
    directory: Path
    entries: tuple[Entry, ...]
    tower: Checkpoint | None = None

    @property
    def tensors(self) -> Iterator[Entry]:
        """The folder's tensors in file order (not the separate tower's), each read only by its `load()`."""
        return iter(self.entries)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the configuration names, else the one in which most of the weights are stored."""
        named = self.config.dtype or getattr(self.config.get_text_config(), "dtype", None)
        if named is not None:
            return getattr(torch, named) if isinstance(named, str) else named
        sizes = Counter[torch.dtype]()
        for entry in self.entries:
            if entry.dtype.is_floating_point:
                sizes[entry.dtype] += torch.Size(entry.shape).numel()
        return sizes.most_common(1)[0][0] if sizes else torch.float32


def open_checkpoint(
    id_or_dir: str | Path,
    vision_tower: str | Path | None = None,
    revision: str | None = None,
    families: Sequence[str] = ("llava", "llama"),
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Find a checkpoint and read its configuration and headers; no weight is read yet.

    `id_or_dir` is a folder or a hub id (`revision` picks its branch, tag or commit). `vision_tower`, a folder or hub
    id of a CLIP checkpoint, replaces the tower that an original release names; tower weights that the main checkpoint
    holds itself have precedence. `families` are the accepted `model_type`s; `token`, `cache_dir` and
    `local_files_only` go to the hub's client. Raises `CheckpointError`: no such checkpoint, damaged or unsafe files,
    another family (`NotLlava`), quantised weights.
    """
    hub = dict(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    folder = _locate(id_or_dir, hub | dict(revision=revision))
    facts = _facts(id_or_dir, folder)
    original = "mm_vision_tower" in facts and "vision_config" not in facts
    if original and facts["model_type"] in ("llava", "llava_llama"):
        _check_original(id_or_dir, facts)
    elif original or facts["model_type"] not in families:
        raise NotLlava(_another_family(id_or_dir, facts["model_type"], families))
    entries = _read_weights(id_or_dir, folder, hub)
    tower = None
    if original or vision_tower is not None:
        held = any("vision_tower." in entry.key for entry in entries)
        tower = _open_tower(vision_tower or facts["mm_vision_tower"] or "", hub, held, id_or_dir)
    config = _parse(id_or_dir, facts, tower if original else None)
    config._name_or_path = str(id_or_dir)
    return Checkpoint(config, folder, entries, tower)


def model_type_of(id_or_dir: str | Path, revision: str | None = None, **hub: Any) -> str:
    """The `model_type` that a checkpoint's config names; a release in LLaVA's original layout is a `"llava"`."""
    named = _facts(id_or_dir, _locate(id_or_dir, hub | dict(revision=revision)))
    return "llava" if named["model_type"] == "llava_llama" else named["model_type"]


def _locate(id_or_dir: str | Path, hub: dict[str, Any]) -> Path:
    """The folder itself, or the hub's snapshot with everything but the weights."""
    if not str(id_or_dir):
        raise CheckpointError("no checkpoint is named; expected a folder or a hub id")
    path = Path(id_or_dir)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; expected its folder, with config.json and the weights")
    return _download(str(id_or_dir), SMALL_FILES, hub)


def _download(repo: str, patterns: Sequence[str], hub: dict[str, Any]) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=[*patterns], ignore_patterns=["*/*"], **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repo!r} is neither a folder nor a checkpoint that the hub can deliver ({str(error).splitlines()[0]})"
        ) from error


def _read_weights(id_or_dir: str | Path, folder: Path, hub: dict[str, Any]) -> tuple[Entry, ...]:
    """The headers; from the hub the weights are fetched first, safetensors only where there are any."""
    if not Path(id_or_dir).is_dir():
        for name in WEIGHT_FILES:
            index = name.endswith(".json")
            if index and not (folder / name).is_file():
                continue
            wanted = set(read_index(folder / name).values()) if index else {name}
            _download(str(id_or_dir), sorted(wanted), hub | dict(revision=folder.name))  # which is the commit
            if index or (folder / name).is_file():
                break
    return tuple(read_headers(folder))


def _facts(id_or_dir: str | Path, folder: Path) -> dict[str, Any]:
    """config.json, refused when it names no family or quantised weights."""
    if not (folder / "config.json").is_file():
        held = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{id_or_dir} is not a checkpoint: expected config.json; found {held}")
    facts = read_json(folder / "config.json")
    if not isinstance(facts.get("model_type"), str):
        raise CheckpointError(f"{folder / 'config.json'} names no model_type; expected 'llava' or 'llama'")
    for part in (facts, facts.get("text_config"), facts.get("vision_config")):
        if isinstance(part, dict) and part.get("quantization_config"):
            method = part["quantization_config"].get("quant_method", "unknown method")
            raise CheckpointError(f"{id_or_dir} holds quantised weights ({method}); expected fp32, fp16 or bf16")
    return facts


def _another_family(id_or_dir: str | Path, given: str, families: Sequence[str]) -> str:
    expected = " or ".join(map(repr, families))
    return f"{id_or_dir} is a {given!r} checkpoint; expected {expected}{nearest(given, families, n=1)}"


def _check_original(id_or_dir: str | Path, facts: dict[str, Any]) -> None:
    for key, accepted, default, why in ORIGINAL_LIMITS:
        given = facts.get(key, default)
        if given not in accepted:
            values = " or ".join(repr(value) for value in accepted if value is not None) or "none"
            raise NotLlava(f"{id_or_dir} has {key} {given!r}; expected {values}: {why}")


def _parse(id_or_dir: str | Path, facts: dict[str, Any], tower: Checkpoint | None = None) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    try:
        return _llava_config(facts, tower.config) if tower else CONFIG_MAPPING[facts["model_type"]].from_dict(facts)
    except (KeyError, TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{id_or_dir}: config.json describes no {facts['model_type']!r} ({reason})") from error


def _open_tower(id_or_dir: str | Path, hub: dict[str, Any], held: bool, owner: str | Path) -> Checkpoint:
    """A CLIP checkpoint's vision half; its weights are not fetched when the main checkpoint has them (`held`)."""
    try:
        folder = _locate(id_or_dir, hub)
        facts = _facts(id_or_dir, folder)
    except CheckpointError as error:
        raise CheckpointError(f"the vision tower of {owner}: {error}; vision_tower= names another") from error
    families = ("clip", "clip_vision_model")
    if facts["model_type"] not in families:
        raise NotLlava(f"the vision tower of {owner}: {_another_family(id_or_dir, facts['model_type'], families)}")
    config = _parse(id_or_dir, facts)
    entries = () if held else _read_weights(id_or_dir, folder, hub)
    seeing = tuple(entry for entry in entries if not entry.key.startswith(CLIP_TEXT_HALF))
    return Checkpoint(getattr(config, "vision_config", config), folder, seeing)


def _llava_config(facts: dict[str, Any], vision: Any) -> LlavaConfig:
    """The original release in transformers' terms; `<image>` is the first id outside its vocabulary."""
    from transformers import LlamaConfig, LlavaConfig

    if facts.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ValueError(
            f"the tower is of width {vision.hidden_size}; expected {facts['mm_hidden_size']} (mm_hidden_size)"
        )
    text = LlamaConfig(**{key: facts[key] for key in LLAMA_FIELDS if facts.get(key) is not None})
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text.vocab_size,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=facts.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if facts.get("mm_vision_select_feature") == "cls_patch" else "default",
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=facts.get("dtype") or facts.get("torch_dtype"),
    )
