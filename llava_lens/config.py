"""What a model is made of, as frozen facts with TransformerLens's names; each config reads itself from Hugging Face's.

Unusual: `vision.n_layers` counts the tower layers that *run*. LLaVA reads an inner layer (23 of CLIP's 24), so the
layers above it are neither built nor loaded. What takes transformers long to import is asked for only where it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava_lens.activations import activation
from llava_lens.errors import LensError
from llava_lens.facts import fact
from llava_lens.pictures import Layout, Picture, side_of

if TYPE_CHECKING:
    from transformers import LlamaConfig

V = TypeVar("V", bound="VisionConfig")
D = TypeVar("D", bound="DecoderConfig")
L = TypeVar("L", bound="LlavaConfig")
CPU = torch.device("cpu")
NOT_ARCHITECTURE = ("model_name", "tokenizer_name", "device", "dtype", "eos_token_ids", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What the vision tower and the decoder have in common: a stack of pre-norm transformer blocks.

    Where `positional_embedding_type` is "rotary", queries and keys are turned, and shown so too.
    """

    positional_embedding_type: ClassVar[str] = "standard"

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    act_fn: str
    eps: float
    normalization_type: str
    n_key_value_heads: int
    n_ctx: int
    attn_bias: bool = False
    attn_out_bias: bool | None = None  # None: as `attn_bias`
    mlp_bias: bool = False
    gated_mlp: bool = False
    attn_only: bool = False
    final_rms: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_key_value_heads} key/value heads evenly")
        if self.attn_out_bias is None:
            object.__setattr__(self, "attn_out_bias", self.attn_bias)
        activation(self.act_fn)


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TowerConfig):
    """A vision tower: pictures cut into square patches, with CLIP's class token in front or without one.

    `merge` patches in each direction become one token of the decoder.
    """

    image_size: int
    patch_size: int
    n_channels: int = 3
    n_layers_total: int = 0
    feature_layers: tuple[int, ...] = ()
    family: str = "clip_vision_model"
    feature_layers_listed: bool = False  # a list, even of one, is joined: a copy whose layout decides bf16's last bit
    joined_whole: bool = False  # joined with the class token, which is then cut off: once more the layout
    class_token: bool = True
    keep_class_token: bool = False
    merge: int = 1

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per image as (rows, columns)."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def token_grid(self) -> tuple[int, int]:
        """The decoder's tokens of one picture as (rows, columns)."""
        rows, cols = self.grid
        return rows // self.merge, cols // self.merge

    @property
    def n_features(self) -> int:
        """Vectors that one picture sends to the projector: its patches, and the class token where it is kept."""
        return self.n_patches + self.keep_class_token

    @property
    def n_merged(self) -> int:
        """Vectors that one picture sends to the decoder, in the projector's own hooks too."""
        return self.token_grid[0] * self.token_grid[1] + self.keep_class_token

    @property
    def d_merged(self) -> int:
        """Numbers that the projector gets for each of them."""
        return self.d_model * len(self.feature_layers) * self.merge**2

    def patches_of(self, token: int) -> list[int]:
        """Which of a picture's patches one of its tokens (without the class token) shows, all in reading order."""
        (row, col), columns = divmod(token, self.token_grid[1]), self.grid[1]
        rows, cols = (range(at * self.merge, (at + 1) * self.merge) for at in (row, col))
        return [r * columns + c for r in rows for c in cols]

    @classmethod
    def towers(cls) -> Mapping[str, Mapping[str, Any]]:
        """The towers that a config of this class describes, by `model_type`: where each differs from CLIP's."""
        return TOWERS

    @classmethod
    def from_hf(
        cls: type[V], hf: Any, feature_layer: int | Sequence[int] = -1, select: str = "default", **changes: Any
    ) -> V:
        """Read a tower's config (`towers`); `feature_layer` counts as Hugging Face does (0 = before the first block).

        `family` stands in for the config's `model_type`, where that says nothing.

        Raises `ValueError` for another tower, sides that are not whole numbers, layers that are not there, and a
        class token that is to be cut off where there is none.
        """
        family = changes.get("family", hf.model_type)
        if family not in (towers := cls.towers()):
            raise ValueError(f"a tower of {family!r}; expected {' or '.join(map(repr, towers))}")
        facts = dict(towers[family]) | changes
        image_size, patch_size = side_of(hf.image_size), side_of(hf.patch_size)
        if image_size is None or patch_size is None:
            raise ValueError(
                f"image_size {hf.image_size!r} and patch_size {hf.patch_size!r}: expected one integer each"
            )
        class_token = facts.get("class_token", True)
        if select not in ("default", "full") or (select == "default" and not class_token):
            expected = "'default' or 'full'" if class_token else "'full': this tower has no class token to cut off"
            raise ValueError(f"vision_feature_select_strategy {select!r}: expected {expected}")
        total = hf.num_hidden_layers
        asked = (feature_layer,) if isinstance(feature_layer, int) else tuple(feature_layer)
        bad = [layer for layer in asked if not -total - 1 <= layer <= total]
        if bad or not asked:
            raise ValueError(f"vision_feature_layer {feature_layer!r}: expected {-total - 1} … {total}")
        layers = tuple(layer if layer >= 0 else total + 1 + layer for layer in asked)
        fields = dict(
            family=family,
            n_layers=max(layers),
            n_layers_total=total,
            feature_layers=layers,
            feature_layers_listed=not isinstance(feature_layer, int),
            keep_class_token=select == "full" and class_token,
            d_model=hf.hidden_size,
            n_heads=hf.num_attention_heads,
            n_key_value_heads=hf.num_attention_heads,
            d_head=hf.hidden_size // hf.num_attention_heads,
            d_mlp=hf.intermediate_size,
            act_fn=hf.hidden_act,
            eps=hf.layer_norm_eps,
            normalization_type="LN",
            n_ctx=(image_size // patch_size) ** 2 + class_token,
            attn_bias=True,
            mlp_bias=True,
            image_size=image_size,
            patch_size=patch_size,
            n_channels=hf.num_channels,
        )
        return cls(**{**fields, **facts})


TOWERS: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": {},
    "siglip_vision_model": {"class_token": False},
}
"""The towers that a LLaVA may have, by `model_type`: where each differs from CLIP's."""


def ending_tokens(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`eos_token_ids` and `pad_token_id` as far as a config.json or generation_config.json states them.

    >>> ending_tokens({"eos_token_id": 2, "pad_token_id": None})
    {'eos_token_ids': (2,)}
    """
    eos, pad = facts.get("eos_token_id"), facts.get("pad_token_id")
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    stated = {"eos_token_ids": tuple(i for i in ids if i >= 0), "pad_token_id": None if pad is None or pad < 0 else pad}
    return {name: value for name, value in stated.items() if value not in ((), None)}


def _of_qwen2(hf: Any) -> dict[str, Any]:
    slides = "sliding_attention" in (hf.layer_types or ())
    return {"attn_bias": True, "attn_out_bias": False, "window": hf.sliding_window if slides else None}


DECODERS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "llama": lambda hf: {"attn_bias": hf.attention_bias, "mlp_bias": hf.mlp_bias},
    "mistral": lambda hf: {"window": hf.sliding_window},
    "qwen2": _of_qwen2,
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(TowerConfig):
    """A Llama-family decoder. `rope` is Hugging Face's `rope_parameters` (type, theta, factors).

    `window` is how far attention reaches back; a longer text is refused, so that within one it never matters.
    """

    decoders: ClassVar[Mapping[str, Callable[[Any], dict[str, Any]]]] = DECODERS
    """The decoders that a model of this class may have, by `model_type`: what each config says in its own way."""

    d_vocab: int
    window: int | None = None
    rope: Mapping[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    model_name: str = ""
    tokenizer_name: str = ""
    default_prepend_bos: bool = True
    positional_embedding_type: str = "rotary"  # type: ignore[misc]
    original_architecture: str = "LlamaForCausalLM"
    vision: VisionConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_hf(cls: type[D], hf: Any, **changes: Any) -> D:
        """Read a decoder's config (`decoders`; Vicuna's is a `LlamaConfig`). Raises `ValueError` for another."""
        if hf.model_type not in cls.decoders:
            raise ValueError(f"a decoder of {hf.model_type!r}; expected {' or '.join(map(repr, cls.decoders))}")
        fields = dict(
            n_layers=hf.num_hidden_layers,
            d_model=hf.hidden_size,
            n_heads=hf.num_attention_heads,
            n_key_value_heads=hf.num_key_value_heads or hf.num_attention_heads,
            d_head=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            d_mlp=hf.intermediate_size,
            act_fn=hf.hidden_act,
            eps=hf.rms_norm_eps,
            normalization_type="RMS",
            final_rms=True,
            n_ctx=hf.max_position_embeddings,
            gated_mlp=True,
            d_vocab=hf.vocab_size,
            rope=dict(hf.rope_parameters or {}),
            tie_word_embeddings=getattr(hf, "tie_word_embeddings", False),
            model_name=getattr(hf, "_name_or_path", "") or "",
            **ending_tokens(hf.to_dict()),
        )
        return cls(**{**fields, **cls.decoders[hf.model_type](hf), **changes})

    @property
    def max_positions(self) -> int | None:
        """Positions that a text may take; None where the rotary scaling stretches with the text."""
        if self.rope.get("rope_type") == "dynamic":
            return self.window
        return self.n_ctx if self.window is None else min(self.n_ctx, self.window)

    def rope_frequencies(self, seq_len: int | None = None) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[d_head / 2]` in fp32 and the factor on cos and sin, for a sequence of `seq_len`.

        Only the scalings that depend on the length ("dynamic", "longrope") look at `seq_len`.
        """
        kind = self.rope.get("rope_type", "default")
        if kind == "default":
            exponents = torch.arange(0, self.d_head, 2, dtype=torch.float) / self.d_head
            return 1.0 / (self.rope.get("rope_theta", 10000.0) ** exponents), 1.0
        if kind not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"unknown rope scaling {kind!r}; known: default, {', '.join(ROPE_INIT_FUNCTIONS)}")
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[kind](self._as_llama(), torch.device("cpu"), seq_len=seq_len)
        return inv_freq.float(), attention_factor

    def rope_length(self, seq_len: int) -> int | None:
        """The length that the frequencies depend on: None while every sequence shares one set of frequencies."""
        kind = self.rope.get("rope_type", "default")
        if "dynamic" in kind:
            return seq_len if seq_len > self.n_ctx else None
        if kind == "longrope":
            original = self.rope["original_max_position_embeddings"]
            return original + 1 if seq_len > original else None
        return None

    def _as_llama(self) -> LlamaConfig:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.d_model,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_key_value_heads,
            head_dim=self.d_head,
            max_position_embeddings=self.n_ctx,
            rope_parameters=dict(self.rope),
        )


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(DecoderConfig):
    """A decoder with a vision tower and a two-layer projector in front; `vision` is None for a decoder alone."""

    families: ClassVar[tuple[str, ...]] = ("llava", *DECODERS)
    """The `model_type`s of the checkpoints that this class reads."""
    architecture: ClassVar[str] = "LlavaForConditionalGeneration"
    """The name of the class in transformers."""
    Tower: ClassVar[type[VisionConfig]] = VisionConfig
    """The class that reads the tower's config."""

    image_token_id: int | None = None
    projector_act_fn: str = "gelu"
    projector_bias: bool = True

    @cached_property
    def tokens_per_image(self) -> int:
        """Stream positions that one picture takes, where that is always the same; 0 for a model without a tower."""
        return self.layout().n_tokens if self.vision else 0

    def layout(self, size: tuple[int, int] | None = None) -> Layout:
        """How an image of this width and height (where those matter) stands in a prompt.

        A subclass overrides it where images are cut, or take more tokens the larger they are; it raises `LensError`
        where it needs a size and gets none.
        """
        if self.vision is None:
            raise LensError("an image for a model without a vision tower")
        picture = Picture(self.vision.token_grid, self.vision.keep_class_token)
        return Layout(picture.n_tokens, (picture,))

    def seeing(self: L, pixels: torch.Tensor | None) -> L:
        """Itself with the tower's grid and lengths for pixel values `[picture, channel, height, width]`, or none.

        A subclass whose pictures may have any size overrides it; here all have one.
        """
        return self

    def layouts(self, extras: Mapping[str, Tensor]) -> Iterator[Layout] | None:
        """How all images of a batch stand in their prompts, in order, as their extras say; None where they say nothing.

        Here `image_sizes` `[image, (height, width)]` says it.
        """
        sizes = extras.get("image_sizes")
        if sizes is None:
            return None
        return (self.layout((width, height)) for height, width in fact(sizes, "sizes", lambda sizes: sizes.tolist()))

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that name this architecture; two models with equal configs share them."""
        facts = {name: value for name, value in asdict(self).items() if name not in NOT_ARCHITECTURE}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def check_pixels(self, shape: tuple[int, ...]) -> None:
        """Raise `LensError` for pixel values `[picture, channel, height, width]` that the tower cannot see."""
        assert self.vision is not None
        side = self.vision.image_size
        if shape[1:] != (self.vision.n_channels, side, side):
            expected = f"[image, {self.vision.n_channels}, {side}, {side}]"
            raise LensError(f"pixel values of shape {shape}; expected {expected}")

    @classmethod
    def from_hf(cls: type[L], hf: Any, **changes: Any) -> L:
        """Read the config of one of the `families`, or of a decoder alone where those are among them.

        Raises `ValueError` for any other, naming what was given.
        """
        if hf.model_type not in cls.families:
            raise ValueError(f"a {hf.model_type!r} checkpoint; expected {' or '.join(map(repr, cls.families))}")
        if hf.model_type in cls.decoders:
            return super().from_hf(hf, **changes)
        return super().from_hf(hf.text_config, **{**cls.facts_of(hf), **changes})

    @classmethod
    def facts_of(cls, hf: Any) -> dict[str, Any]:
        """What the config says of tower, projector and image tokens. A subclass takes these and adds its own."""
        layer = getattr(hf, "vision_feature_layer", -1)
        select = getattr(hf, "vision_feature_select_strategy", "full")
        return dict(
            vision=cls.Tower.from_hf(hf.vision_config, layer, select),
            image_token_id=hf.image_token_id,
            projector_act_fn=getattr(hf, "projector_hidden_act", "gelu"),
            projector_bias=getattr(hf, "multimodal_projector_bias", True),
            original_architecture=cls.architecture,
            tie_word_embeddings=hf.tie_word_embeddings or hf.text_config.tie_word_embeddings,
            model_name=getattr(hf, "_name_or_path", "") or "",
        )
