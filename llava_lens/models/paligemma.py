"""PaliGemma: SigLIP's tower up to its last norm, one linear layer, and a Gemma decoder that reads the prompt both ways.

Unusual: prompt and picture see all of one another, later places too; what is written after them sees only what comes
before. `token_type_ids` say which is which, 0 and 1 per token. Without them every place sees what comes before it:
Hugging Face computes the same, except for sdpa without padding, where it drops the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from llava_lens import derived, kernels
from llava_lens.config import LlavaConfig, TowerConfig, VisionConfig
from llava_lens.errors import LensError
from llava_lens.hooks import Hook, splice
from llava_lens.images import ImageProcessor
from llava_lens.inputs import Inputs
from llava_lens.layers import Mask
from llava_lens.model import HookedLlava
from llava_lens.norms import LayerNorm, RMSNorm, Stream
from llava_lens.prompt import Processor, Prompt
from llava_lens.rename import LLAVA_TABLE, Row
from llava_lens.vision import SiglipVision

PREFIX, SUFFIX = 0, 1
"""What `token_type_ids` say of the prompt, and of what follows it."""
OWN_WORDS = [*(f"<loc{i:04}>" for i in range(1024)), *(f"<seg{i:03}>" for i in range(128))]
"""Places and shapes that PaliGemma writes; a tokenizer without them gets them, as from Hugging Face's processor."""
PALIGEMMA_TABLE = (
    Row("tower:post_layernorm.{p}", "vision.ln_post.{p}"),
    Row("projector:linear.{p}", "projector.linear.{p}"),
    *LLAVA_TABLE,
)


def _of_gemma(hf: Any) -> dict[str, Any]:
    return {"attn_bias": hf.attention_bias}


class PaliGemmaConfig(LlavaConfig):
    """Sizes of a PaliGemma; PaliGemma 2, whose decoder is Gemma 2, is refused."""

    families: ClassVar[tuple[str, ...]] = ("paligemma",)
    architecture: ClassVar[str] = "PaliGemmaForConditionalGeneration"
    decoders: ClassVar[Mapping[str, Callable[[Any], dict[str, Any]]]] = {"gemma": _of_gemma}

    @classmethod
    def facts_of(cls, hf: Any) -> dict[str, Any]:
        tower, width = hf.vision_config.model_type, hf.text_config.hidden_size
        if tower != "siglip_vision_model":
            raise ValueError(f"a tower of {tower!r}; expected 'siglip_vision_model'")
        if hf.projection_dim != width:
            raise ValueError(f"projection_dim {hf.projection_dim}; expected {width}, the decoder's hidden_size")
        return super().facts_of(hf) | {"tie_word_embeddings": hf.tie_word_embeddings}  # the decoder's own counts not


class GemmaNorm(RMSNorm):
    """`(1 + weight) ∘ x / rms(x)`, rounded to the stream's precision only after the gain."""

    def __init__(self, cfg: TowerConfig):
        super().__init__(cfg)
        self.weight = nn.Parameter(torch.zeros(cfg.d_model))

    @property
    def w(self) -> Float[Tensor, " d_model"]:
        """The gain, in float32 or better."""
        return 1 + kernels.upcast(self.weight)

    def forward(self, x: Stream) -> Stream:
        if self.norm.open(x, self.weight):
            return self.told(x, kernels.rms_norm(x, self.w, self.eps)[0])
        wide, mean_square = kernels.rms_norm_parts(x, self.eps)
        if not self.norm.live:
            return (wide * self.w).to(x.dtype)
        wide, touched = self.scaled(x, wide, mean_square)
        out, before = (wide * self.w).to(x.dtype), wide.to(x.dtype)
        recipe = None if touched else partial(derived.norm, "normalized", x, self.eps, False)
        after, changed = self.hook_normalized.look(before, recipe)
        return splice(out, (after * self.w).to(x.dtype), before, after) if changed else out

    def after_adding(self, x: Stream, branch: Stream) -> tuple[Stream, Stream]:
        total, out, _ = kernels.add_rms_norm(x, branch, self.w, self.eps)
        return total, out


class PaliGemmaVision(SiglipVision):
    """SigLIP's tower with the norm behind its last layer, whose output are the features."""

    def __init__(self, cfg: VisionConfig):
        super().__init__(cfg)
        self.ln_post = LayerNorm(cfg)

    def select(self, streams: list[Tensor]) -> Float[Tensor, "image feature d_model"]:
        """The last layer, normed."""
        return self.ln_post(super().select(streams))


class LinearProjector(nn.Module):
    """One linear layer; `hook_out` is what takes the place of the `<image>` tokens."""

    def __init__(self, cfg: LlavaConfig):
        super().__init__()
        assert cfg.vision is not None
        self.hook_in = Hook("batch feature d_features")
        self.linear = nn.Linear(cfg.vision.d_model, cfg.d_model)
        self.hook_out = Hook("batch feature d_model")

    def forward(self, features: Float[Tensor, "image feature d_features"]) -> Float[Tensor, "image feature d_model"]:
        return self.hook_out(self.linear(self.hook_in(features)))


class PaliGemmaImages(ImageProcessor):
    """SigLIP's image processor: every picture is resized to the tower's square, whatever its shape."""

    classes = ("SiglipImageProcessorPil",)


class PaliGemmaProcessor(Processor):
    """Writes prompts as Hugging Face's processor does: pictures, `<bos>`, the text, a line end; then the answer.

    A start of the answer stands there as the processor puts a `suffix`, but without its end. The tokenizer is
    readied as that processor does it: no `<bos>` or `<eos>` of its own, and `OWN_WORDS` known.
    """

    Images: ClassVar[type[ImageProcessor]] = PaliGemmaImages

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer.add_tokens(OWN_WORDS)
        self.tokenizer.add_bos_token = self.tokenizer.add_eos_token = False

    @classmethod
    def image_processor(cls, settings: Any, cfg: LlavaConfig) -> ImageProcessor | None:
        if not settings and cfg.vision is not None:
            settings = {"size": {"height": cfg.vision.image_size, "width": cfg.vision.image_size}}
        return super().image_processor(settings, cfg)

    def extras(self, images: Sequence[Image.Image], inputs: Any, cfg: LlavaConfig) -> dict[str, Tensor]:
        rows = [[SUFFIX if label == "answer" else PREFIX for label in roles.labels] for roles in inputs.roles]
        return {"token_type_ids": torch.tensor(rows)}

    def render(self, question: str, n_images: int, answer: str = "", template: bool = True) -> Prompt:
        """Without a placeholder in the question, one per image is put in front; `<bos>` follows the last."""
        if not template:
            return super().render(question, n_images, answer, template)
        token, bos = self.image_token, self.tokenizer.bos_token
        said = question if token in question else token * n_images + question
        start, end = super().render(said, n_images, template=False).question
        at = said.rfind(token) + len(token) if n_images else 0
        text, answer = f"{said[:at]}{bos}{said[at:]}\n", answer.lstrip()
        asked = (start + len(bos) * (start >= at), end + len(bos) * (end >= at))
        return Prompt(text + answer, asked, (len(text), len(text) + len(answer)))


class HookedPaliGemma(HookedLlava):
    """PaliGemma (the first) with every activation named, readable and editable; logits are bit-equal to Hugging Face's.

    Positions count from 1, and embeddings are scaled by `√d_model` in the model's own precision.
    """

    Config = PaliGemmaConfig
    Processor = PaliGemmaProcessor
    Vision = PaliGemmaVision
    Projector = LinearProjector
    Norm = GemmaNorm
    weight_table = PALIGEMMA_TABLE
    extra_inputs = ("token_type_ids", "labels")

    @property
    def embed_scale(self) -> float:
        """What embeddings are multiplied by: `√d_model` as the model's precision holds it."""
        return float(torch.tensor(self.cfg.d_model**0.5, dtype=torch.float32).to(self.embed.weight.dtype))

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """What each token puts into the stream."""
        return self.embed.weight * self.embed_scale

    def embed_tokens(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The rows of the embedding matrix, scaled."""
        return self.embed(tokens) * self.embed_scale

    def from_hf_layout(self, pixels: Any, extras: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Without the `labels` that a processor of transformers always adds: they are for training."""
        return pixels, {name: extra for name, extra in extras.items() if name != "labels"}

    def positions(
        self, inputs: Inputs, mask: Int[Tensor, "batch total"] | None = None, beyond: int = 0
    ) -> Int[Tensor, "*axes batch total"]:
        """Counted from 1; without a `mask` the padding counts too, as in Hugging Face's forward."""
        if mask is not None:
            return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0) + 1
        return torch.arange(inputs.n_pos + beyond, device=inputs.tokens.device)[None] + 1

    def mask(
        self, attention_mask: Int[Tensor, "batch key"] | None, seen: int, x: Tensor, inputs: Inputs | None = None
    ) -> Mask:
        """Causal, but for the prompt, all of which sees all of it; behind a cache always causal."""
        types: Any = None if inputs is None else inputs.extras.get("token_type_ids")
        plain = super().mask(attention_mask, seen, x, inputs)
        if types is None or seen:
            return plain
        if types.shape[-1] != x.shape[1] or len(types) not in (1, len(x)):
            raise LensError(f"token_type_ids {tuple(types.shape)}: expected {tuple(x.shape[:2])}, as the tokens")
        prefix = types == PREFIX
        earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        allowed = earlier | (prefix[:, :, None] & prefix[:, None])
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None].bool()
        return Mask(allowed[:, None].expand(len(x), -1, -1, -1))
