"""What a config.json says in the families that are read here, what it leaves out filled in as transformers does.

Unusual: transformers' own classes for these families bring in its loading and distributed machinery, most of the time
that a first load takes; these have the fields that are read here, and leave the old spellings to the same base class.
"""

from typing import Any, Literal, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


class _Tower(PreTrainedConfig):
    hidden_size: int
    num_attention_heads: int

    def validate_architecture(self) -> None:
        """Asked for by `strict`."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"a width of {self.hidden_size} does not divide into {self.num_attention_heads} heads")


@no_type_check  # `strict` checks; jaxtyping would refuse the further names that a config.json holds
@strict
class Llama(_Tower):
    """A Llama or Vicuna decoder."""

    model_type = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **others: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**others)


@no_type_check
@strict
class ClipVision(_Tower):
    """CLIP's vision tower."""

    model_type = "clip_vision_model"
    base_config_key = "vision_config"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] | None = 224
    patch_size: int | list[int] | tuple[int, int] | None = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@no_type_check
@strict
class Clip(PreTrainedConfig):
    """A whole CLIP, of which the vision tower is read; the older `vision_config_dict` has precedence."""

    model_type = "clip"
    vision_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **others: Any) -> None:
        older = others.pop("vision_config_dict", None)
        self.vision_config = part(self.vision_config if older is None else older, "clip_vision_model")
        super().__post_init__(**others)


LLAVA_TOWER = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
"""The tower of a LLaVA whose config.json says nothing of it."""


@no_type_check
@strict
class Llava(PreTrainedConfig):
    """LLaVA-1.5."""

    model_type = "llava"
    attribute_map = {"image_token_id": "image_token_index"}
    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_index: int = 32000
    image_seq_length: int = 576
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    vision_feature_layer: int | list[int] = -2
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **others: Any) -> None:
        tower = LLAVA_TOWER if self.vision_config is None else self.vision_config
        self.vision_config = part(tower, "clip_vision_model")
        self.text_config = part(self.text_config, "llama")
        super().__post_init__(**others)


FAMILIES: dict[str, type[PreTrainedConfig]] = {kind.model_type: kind for kind in (Llama, ClipVision, Clip, Llava)}


def family(model_type: str) -> type[PreTrainedConfig]:
    """The class for a `model_type`; one of transformers for a family that is not read here."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def part(facts: Any, default: str) -> Any:
    """A config inside another one, of the family that it names itself or else of the default one."""
    if isinstance(facts, PreTrainedConfig):
        return facts
    facts = {} if facts is None else facts
    return family(facts.get("model_type", default))(**facts)
