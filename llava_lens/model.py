"""HookedLlava: CLIP's tower, a projector and a Llama/Vicuna decoder in one forward that can be read aloud.

`embed_tokens → splice(encode_image) → positions, mask → blocks → ln_final → unembed`. A subclass names its parts as
class attributes and overrides only the steps that differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llava_lens.config import LlavaConfig
from llava_lens.errors import LensError
from llava_lens.hooked import HookedModel
from llava_lens.hooks import Hook
from llava_lens.inputs import Inputs, Processor, prepare
from llava_lens.layers import Block, GatedMLP, KVCache, Mask, RMSNorm, Rotary
from llava_lens.projector import Projector
from llava_lens.surface import TransformerLensSurface
from llava_lens.vision import Vision
from llava_lens.weights import LLAVA_TABLE, assign_state_dict, load_weights, open_checkpoint

ReturnType = Literal["logits", "loss", "both"] | None
Implementation = Literal["sdpa", "eager"]
M = TypeVar("M", bound="HookedLlava")
"""The class that a constructor is called on, so that a subclass gets its own type back."""


class HookedLlava(TransformerLensSurface, HookedModel):
    """LLaVA with every activation named, readable and editable; logits are bit-equal to Hugging Face's.

    Decoder hooks carry TransformerLens's names (`blocks.5.attn.hook_pattern`); the tower's are the same under
    `vision.`, the projector's under `projector.`. A plain Llama/Vicuna is a HookedLlava without tower.
    """

    Config = LlavaConfig
    Vision = Vision
    Projector = Projector
    Norm = RMSNorm
    Mlp = GatedMLP
    weight_table = LLAVA_TABLE

    def __init__(self, cfg: LlavaConfig, processor: Processor | None = None):
        super().__init__()
        self.cfg = cfg
        self.processor = processor
        self._held: Inputs | None = None
        if cfg.vision is not None:
            self.vision = self.Vision(cfg.vision)
            self.projector = self.Projector(cfg)
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.hook_text_embed = Hook("batch pos d_model")
        self.hook_embed = Hook("batch pos d_model")
        self.rotary = Rotary(cfg)
        self.blocks = nn.ModuleList(Block(cfg, layer, self.Norm, self.Mlp) for layer in range(cfg.n_layers))
        self.ln_final = self.Norm(cfg)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        self.hook_logits = Hook("batch pos d_vocab")
        if cfg.tie_word_embeddings:
            self.unembed.weight = self.embed.weight
        self.setup()

    # ---- ways in

    @classmethod
    def from_pretrained(
        cls: type[M],
        id_or_dir: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        vision_tower: str | None = None,
        attn_implementation: Implementation = "sdpa",
        **hub: Any,
    ) -> M:
        """Load a checkpoint from a folder or the hub: LLaVA-1.5 in any published layout, or a plain Llama/Vicuna.

        `dtype` defaults to the checkpoint's. `vision_tower` names the separate tower of an original release. `hub`
        goes to the hub's download (`revision`, `token`, …). Raises `LensError` naming the weight or the file at fault.
        """
        checkpoint = open_checkpoint(id_or_dir, vision_tower=vision_tower, **hub)
        cfg = cls.Config.from_hf(checkpoint.config, model_name=str(id_or_dir))
        with torch.device("meta"):
            model = cls(cfg)
        load_weights(model, checkpoint, table=cls.weight_table, dtype=dtype, device=device)
        model.processor = Processor.from_pretrained(checkpoint.directory, cfg)
        return model.ready(attn_implementation)

    @classmethod
    def from_hf(cls: type[M], hf_model: nn.Module, processor: Any = None) -> M:
        """Wrap a Hugging Face model that is in memory; the weights are shared, not copied."""
        config: Any = hf_model.config
        with torch.device("meta"):
            model = cls(cls.Config.from_hf(config))
        assign_state_dict(model, hf_model.state_dict(), table=cls.weight_table)
        model.processor = None if processor is None else Processor.from_hf(processor, model.cfg)
        implementation = (getattr(config, "text_config", None) or config)._attn_implementation
        return model.ready("eager" if implementation == "eager" else "sdpa")

    @classmethod
    def tiny(cls: type[M], device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> M:
        """The small trained LLaVA that ships with the package: no download."""
        from llava_lens.tiny import CHECKPOINT

        return cls.from_pretrained(str(CHECKPOINT), device=device, dtype=dtype)

    def ready(self: M, attn_implementation: Implementation = "sdpa") -> M:
        """Put a loaded model into inference mode with the given attention ("sdpa" or "eager", as in transformers)."""
        if attn_implementation not in ("sdpa", "eager"):
            raise LensError(f"attn_implementation {attn_implementation!r}: expected 'sdpa' or 'eager'")
        for name, module in self.named_modules():
            if name.endswith(".attn"):
                module.implementation = attn_implementation  # type: ignore[assignment]
        self._note_placement()
        return self.eval()

    def _apply(self: M, *args: Any, **kwargs: Any) -> M:
        super()._apply(*args, **kwargs)
        self._note_placement()
        return self

    def _note_placement(self) -> None:
        weight = self.embed.weight
        self.cfg = replace(self.cfg, device=weight.device, dtype=weight.dtype)

    # ---- inputs

    def prepare(self, question: str | list[str], image: Any = None, answer: str | list[str] = "", **how: Any) -> Inputs:
        """Question and picture(s) to `Inputs` on the model's device, through the checkpoint's own template.

        `image` is a PIL image, path or array, a list of them, or None; `answer` a start that the model continues.
        See `llava_lens.inputs.prepare` for the rest and for the errors.
        """
        if self.processor is None:
            raise LensError("this model has no processor; give one: HookedLlava.from_hf(model, processor)")
        return prepare(self.processor, self.cfg, question, image, answer=answer, **how).to(self.cfg.device)

    @contextmanager
    def looking_at(self: M, inputs: Inputs) -> Iterator[M]:
        """Hold a picture for tools that pass only tokens, TransformerLens's patching for instance."""
        before, self._held = self._held, inputs
        try:
            yield self
        finally:
            self._held = before

    def read_inputs(
        self,
        input: Inputs | Mapping[str, Any] | Tensor | str | list[str] | None = None,
        *,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        roles: Any = None,
    ) -> Inputs:
        """Whatever `forward` was given, as `Inputs` on the model's device; the held picture fills in for a missing one."""
        if isinstance(input, Inputs):
            inputs = input
        elif isinstance(input, Mapping):
            return self.read_inputs(**input)
        else:
            tokens = input_ids if input is None else input
            if isinstance(tokens, str | list):
                tokens = self.to_tokens(tokens)
            if not isinstance(tokens, Tensor):
                raise LensError(f"expected Inputs, tokens or text, got {type(tokens).__name__}")
            tokens = tokens if tokens.ndim == 2 else tokens[None]
            if pixel_values is None and self._held is not None:
                pixel_values, attention_mask = self._borrow(tokens, attention_mask)
            inputs = Inputs(tokens, pixel_values, attention_mask, roles)
        return inputs.to(self.cfg.device)

    def _borrow(self, tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        held = self._held
        assert held is not None
        times, rest = divmod(len(tokens), len(held.tokens))
        if rest:
            raise LensError(f"{len(tokens)} sequences cannot share the pictures of the {len(held.tokens)} looked at")
        pixels = held.pixels
        if pixels is not None and times > 1:
            pixels = pixels.repeat(times, 1, 1, 1)
        if attention_mask is None and held.attention_mask is not None and held.tokens.shape[1] == tokens.shape[1]:
            attention_mask = held.attention_mask.repeat(times, 1)
        return pixels, attention_mask

    # ---- the forward and its seams

    def forward(
        self,
        input: Inputs | Mapping[str, Any] | Tensor | str | list[str] | None = None,
        *,
        return_type: ReturnType = "logits",
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_to_keep: int | Tensor = 0,
        past_kv_cache: KVCache | None = None,
        position_ids: Int[Tensor, "#batch pos"] | None = None,
        loss_per_token: bool = False,
        **named: Any,
    ) -> Any:
        """Logits `[batch, pos, d_vocab]`, or what `return_type` asks for.

        `input` is `Inputs`, a processor's output, tokens `[batch, pos]` or text; the same by name: `input_ids`,
        `pixel_values`, `attention_mask`. With `start_at_layer` it is the stream `[batch, pos, d_model]` before that
        layer, and everything earlier is skipped; `stop_at_layer` returns the stream before that layer.
        `logits_to_keep` keeps the last n positions, or those indexed. `past_kv_cache` is extended in place.
        """
        self.n_runs += 1
        first, last = self.layer_range(start_at_layer, stop_at_layer)
        tokens = named.get("input_ids")
        attention_mask = named.get("attention_mask")
        if start_at_layer is None:
            inputs = self.inputs_seen = self.read_inputs(input, **named)
            tokens, attention_mask = inputs.tokens, inputs.attention_mask
            input = self.embed_inputs(inputs)
        elif not (isinstance(input, Tensor) and input.ndim == 3 and input.shape[-1] == self.cfg.d_model):
            raise LensError(f"start_at_layer needs the stream [batch, pos, {self.cfg.d_model}], got {_brief(input)}")
        x = self.run_blocks(input, first, last, attention_mask, position_ids, past_kv_cache)
        if stop_at_layer is not None or return_type is None:
            return x if stop_at_layer is not None else None
        logits = self.read_out(x, logits_to_keep)
        if return_type == "logits":
            return logits
        loss = self.loss(logits, tokens, attention_mask, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def embed_inputs(self, inputs: Inputs) -> Float[Tensor, "batch pos d_model"]:
        """Tokens embedded, with the picture's features in the places of its tokens."""
        tokens, slots = self.check_slots(inputs)
        x = self.hook_text_embed(self.embed_tokens(tokens))
        if inputs.pixels is not None:
            x = self.splice(x, slots, self.encode_image(inputs.pixels))
        return self.hook_embed(x)

    def embed_tokens(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The rows of the embedding matrix."""
        return self.embed(tokens)

    def encode_image(
        self, pixels: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image feature d_model"]:
        """What the decoder gets to see of each picture."""
        return self.projector(self.vision(pixels))

    def splice(
        self, text: Float[Tensor, "batch pos d_model"], slots: Bool[Tensor, "batch pos"], image: Tensor
    ) -> Float[Tensor, "batch pos d_model"]:
        """Image features in the slots, in reading order."""
        return text.masked_scatter(slots[..., None], image.to(text.dtype))

    def run_blocks(
        self,
        x: Float[Tensor, "batch pos d_model"],
        first: int,
        last: int,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        past: KVCache | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream before block `last`, given the one before block `first`."""
        seen = past.length if past is not None else 0
        if positions is None:
            positions = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        angles = self.rotary(positions, x.dtype)
        mask = self.mask(attention_mask, seen, x)
        for block in self.blocks[first:last]:
            x = block(x, mask, angles, past)
        return x

    def mask(self, attention_mask: Int[Tensor, "batch key"] | None, seen: int, x: Tensor) -> Mask:
        """Causal, and blind to padding; no tensor is built where causality alone says it all."""
        length = x.shape[1]
        if attention_mask is not None and attention_mask.shape != (len(x), seen + length):
            raise LensError(f"attention_mask {tuple(attention_mask.shape)}: expected {(len(x), seen + length)}")
        padded = attention_mask is not None and not bool(attention_mask.all())
        if not padded and (length == 1 or seen == 0):
            return Mask(causal=True)
        allowed = torch.ones(length, seen + length, dtype=torch.bool, device=x.device).tril(seen)[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None].bool()
        return Mask(allowed.expand(len(x), -1, -1, -1))

    def read_out(self, x: Float[Tensor, "batch pos d_model"], keep: int | Tensor = 0) -> Tensor:
        """Logits of the positions to keep (all for 0)."""
        x = self.ln_final(x)
        x = x[:, -keep:] if isinstance(keep, int) and keep else x if isinstance(keep, int) else x[:, keep]
        return self.hook_logits(self.unembed(x))

    def loss(self, logits: Tensor, tokens: Tensor | None, attention_mask: Tensor | None, per_token: bool) -> Tensor:
        """Next-token cross-entropy over text: targets that are padding or image tokens do not count.

        A scalar, or with `per_token` `[batch, pos - 1]` with zeros where nothing counts.
        """
        if tokens is None or logits.shape[1] != tokens.shape[1]:
            raise LensError("a loss needs the tokens and the logits of every position (logits_to_keep=0)")
        targets = tokens[:, 1:]
        counts = torch.ones_like(targets, dtype=torch.bool)
        if attention_mask is not None:
            counts &= attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
        if self.cfg.image_token_id is not None:
            counts &= targets != self.cfg.image_token_id
        targets = torch.where(counts, targets, 0)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none") * counts
        return losses if per_token else losses.sum() / counts.sum()

    # ---- checks

    def layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        """Both ends of the blocks to run, negative ones counted from the end; outside the model they raise."""
        n = self.cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n <= layer <= n:
                raise LensError(f"{name}={layer}: expected {-n} … {n} for {n} layers")
        first, last = (0 if start is None else start), (n if stop is None else stop)
        return (first + n if first < 0 else first), (last + n if last < 0 else last)

    def check_slots(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Tokens safe to embed and the mask of image slots; raises when slots and pictures do not match."""
        tokens, pixels, image_id = inputs.tokens, inputs.pixels, self.cfg.image_token_id
        if pixels is not None and self.cfg.vision is None:
            raise LensError(f"{len(pixels)} picture(s) given, but {self.cfg.model_name or 'this model'} has no tower")
        slots = torch.zeros_like(tokens, dtype=torch.bool) if image_id is None else tokens == image_id
        each = self.cfg.tokens_per_image
        given, found = (0 if pixels is None else len(pixels)), int(slots.sum())
        if found != given * each or (each and bool((slots.sum(1) % each).any())):
            raise LensError(
                f"{found} image tokens in the prompt, but {given} picture(s) fill {given * each} ({each} each)"
                + ("; pixels are missing: pass pixel_values, or use looking_at(inputs)" if not given else "")
            )
        if image_id is not None and image_id >= self.cfg.d_vocab:
            tokens = tokens.masked_fill(slots, 0)
        if tokens.numel() and (int(tokens.max()) >= self.cfg.d_vocab or int(tokens.min()) < 0):
            raise LensError(f"tokens {int(tokens.min())} … {int(tokens.max())}: expected 0 … {self.cfg.d_vocab - 1}")
        return tokens, slots


def _brief(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
