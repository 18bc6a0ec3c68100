"""HookedLlava: CLIP's tower, a projector and a Llama/Vicuna decoder in one forward that can be read aloud.

`embed_tokens → splice(encode_image) → positions, mask → blocks → ln_final → unembed`. A subclass names its parts as
class attributes and overrides only the steps that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llava_lens.config import LlavaConfig, ending_tokens
from llava_lens.errors import LensError
from llava_lens.facts import WHOLE, is_whole, tell, token_facts
from llava_lens.generate import generate as continue_prompt
from llava_lens.graphs import GraphRunner
from llava_lens.hooked import HookedModel
from llava_lens.hooks import Hook
from llava_lens.inputs import Inputs
from llava_lens.kv_cache import KVCache
from llava_lens.layers import Attention, Block, Embedding, GatedMLP, Mask
from llava_lens.norms import RMSNorm
from llava_lens.plan import Planned
from llava_lens.projector import Projector
from llava_lens.prompt import Processor
from llava_lens.reading import InputReader
from llava_lens.regions import Path
from llava_lens.rotary import Rotary
from llava_lens.shards import read_json
from llava_lens.vision import Vision as Tower
from llava_lens.vision import tower
from llava_lens.weights import LLAVA_TABLE, assign_state_dict, load_weights, open_checkpoint

ReturnType = Literal["logits", "loss", "both"] | None
Implementation = Literal["sdpa", "eager"]
M = TypeVar("M", bound="HookedLlava")
"""The class that a constructor is called on, so that a subclass gets its own type back."""


class HookedLlava(InputReader, Planned, HookedModel):
    """LLaVA with every activation named, readable and editable; logits are bit-equal to Hugging Face's.

    Decoder hooks carry TransformerLens's names (`blocks.5.attn.hook_pattern`); the tower's are the same under
    `vision.`, the projector's under `projector.`. A plain Llama/Vicuna is a HookedLlava without tower.
    """

    Config = LlavaConfig
    Processor = Processor
    Vision: Callable[[Any], Tower] = staticmethod(tower)
    Projector = Projector
    Rotary = Rotary
    Block = Block
    Attention = Attention
    Norm = RMSNorm
    Mlp = GatedMLP
    weight_table = LLAVA_TABLE
    path: Path = "reference"
    follows_inputs = False
    """Whether positions or mask are of the class's own, and so depend on the inputs throughout; set by itself."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.follows_inputs = (cls.positions, cls.mask) != (HookedLlava.positions, HookedLlava.mask)

    def __init__(self, cfg: LlavaConfig, processor: Processor | None = None):
        super().__init__()
        self.cfg = cfg
        self.processor = processor
        if cfg.vision is not None:
            self.vision = self.Vision(cfg.vision)
            self.projector = self.Projector(cfg)
        self.embed = Embedding(cfg.d_vocab, cfg.d_model)
        self.hook_text_embed = Hook("batch pos d_model")
        self.hook_embed = Hook("batch pos d_model")
        self.rotary = self.Rotary(cfg)
        self.graphs = GraphRunner()
        self.blocks = nn.ModuleList(
            self.Block(cfg, layer, self.Norm, self.Mlp, self.Attention) for layer in range(cfg.n_layers)
        )
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
        checkpoint = open_checkpoint(id_or_dir, vision_tower=vision_tower, families=cls.Config.families, **hub)
        generation = checkpoint.directory / "generation_config.json"
        ending = ending_tokens(read_json(generation)) if generation.is_file() else {}
        cfg = cls.Config.from_hf(checkpoint.config, model_name=str(id_or_dir), **ending)
        with torch.device("meta"):
            model = cls(cfg)
        load_weights(model, checkpoint, table=cls.weight_table, dtype=dtype, device=device)
        model.processor = cls.Processor.from_pretrained(checkpoint.directory, cfg)
        return model.ready(attn_implementation)

    @classmethod
    def from_hf(cls: type[M], hf_model: nn.Module, processor: Any = None) -> M:
        """Wrap a Hugging Face model that is in memory; the weights are shared, not copied."""
        config: Any = hf_model.config
        generation: Any = getattr(hf_model, "generation_config", None)
        ending = ending_tokens(generation.to_dict()) if generation is not None else {}
        with torch.device("meta"):
            model = cls(cls.Config.from_hf(config, **ending))
        assign_state_dict(model, hf_model.state_dict(), table=cls.weight_table)
        model.processor = None if processor is None else cls.Processor.from_hf(processor, model.cfg)
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

    def _note_placement(self) -> None:
        weight = self.embed.weight
        self.cfg = replace(self.cfg, device=weight.device, dtype=weight.dtype)
        self.settle_weights()

    generate = continue_prompt

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
        position_ids: Int[Tensor, "*axes #batch pos"] | None = None,
        loss_per_token: bool = False,
        **named: Any,
    ) -> Any:
        """Logits `[batch, pos, d_vocab]`, or what `return_type` asks for.

        `input` is `Inputs`, a processor's output, tokens `[batch, pos]` or text; the same by name: `input_ids`,
        `pixel_values`, `attention_mask`. With `start_at_layer` it is the stream `[batch, pos, d_model]` before that
        layer, and everything earlier is skipped; `stop_at_layer` returns the stream before that layer.
        `logits_to_keep` keeps the last n positions, or those indexed. `past_kv_cache` is extended in place and
        remembers the padding: later steps give no mask, that of their own positions, or that of all, past ones too.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise LensError(f"return_type {return_type!r}: expected 'logits', 'loss', 'both' or None")
        self.n_runs += 1
        first, last = self.layer_range(start_at_layer, stop_at_layer)
        continuing = past_kv_cache is not None and past_kv_cache.length > 0
        past_and_new = named.pop("attention_mask", None) if continuing else None
        if start_at_layer is None:
            inputs = self.read_inputs(input, **named)
            self.inputs_seen = inputs if self.is_caching else None  # a plain run holds on to no pictures
            x, tokens, attention_mask = self.embed_inputs(inputs), inputs.tokens, inputs.attention_mask
        else:
            self.inputs_seen = None
            inputs = self.inputs_beside(named) if self.follows_inputs else None
            x, tokens, attention_mask = self.read_stream(input, **named)
        if self.follows_inputs and position_ids is None:
            position_ids = self._next_positions(inputs, past_kv_cache, x)  # type: ignore[arg-type]
        attention_mask = attention_mask if past_and_new is None else past_and_new
        if past_kv_cache is not None:
            attention_mask = past_kv_cache.extend_mask(attention_mask, x, past_kv_cache.held_by(first, last))
        if stop_at_layer is not None or return_type is None:
            x = self.run_blocks(x, first, last, attention_mask, position_ids, past_kv_cache, inputs)
            return x if stop_at_layer is not None else None
        plain = past_kv_cache is None and position_ids is None and isinstance(logits_to_keep, int)
        plain = plain and not self.follows_inputs
        if plain and self.graphs.fits(self):
            logits = self.replay(x, first, last, attention_mask, logits_to_keep)  # type: ignore[arg-type]
        else:
            x = self.run_blocks(x, first, last, attention_mask, position_ids, past_kv_cache, inputs)
            logits = self.read_out(x, logits_to_keep)
        if return_type == "logits":
            return logits
        loss = self.loss(logits, tokens, attention_mask, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def embed_inputs(self, inputs: Inputs) -> Float[Tensor, "batch pos d_model"]:
        """Tokens embedded, with the picture's features in the places of its tokens; raises where they do not match."""
        tokens, slots = inputs.check(self.cfg).tokens, inputs.slots(self.cfg)
        tokens = tokens.masked_fill(slots, 0) if self.image_token_is_outside else tokens
        x = self.embed_tokens(tokens)
        self.expect("embed_tokens", x, (*tokens.shape, self.cfg.d_model))
        x = self.hook_text_embed(x)
        if inputs.pixels is not None:
            image = self.graphs(self, "image", self.encode_image, inputs.pixels)
            x = self.splice(x, slots, self.in_slots(image, inputs))
        return self.hook_embed(x)

    def in_slots(self, image: Float[Tensor, "image feature d_model"], inputs: Inputs) -> Tensor:
        """The features as `arrange` puts them, as many as there are image tokens."""
        found, wide = self.arrange(image, inputs), self.cfg.d_model
        n = sum(token_facts(inputs.tokens, self.cfg.image_token_id).slots)
        if found.shape[-1] != wide or found.numel() != n * wide:
            raise LensError(
                f"{type(self).__name__}: {n} image tokens, but encode_image gave {tuple(image.shape)} and arrange made "
                f"{tuple(found.shape)} of it; expected {n} vectors of {wide}"
            )
        return found

    def expect(self, step: str, got: Tensor, shape: tuple[int, ...]) -> None:
        """Raise `LensError` where a step of a subclass gave a tensor of another shape."""
        if tuple(got.shape) != shape:
            raise LensError(f"{type(self).__name__}.{step} gave {tuple(got.shape)}; expected {shape}")

    @property
    def image_token_is_outside(self) -> bool:
        """True where `<image>` has no row in the embedding matrix, as in the original release."""
        return self.cfg.image_token_id is not None and self.cfg.image_token_id >= self.cfg.d_vocab

    def embed_tokens(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The rows of the embedding matrix."""
        return self.embed(tokens)

    def encode_image(
        self, pixels: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image feature d_model"]:
        """What the decoder gets to see of each picture."""
        return self.project(self.vision(pixels), pixels)

    def project(
        self, features: Float[Tensor, "image feature d_features"], pixels: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image token d_model"]:
        """The tower's features through the projector; `pixels` are those they were made of, whose size may matter."""
        return self.projector(features)

    def arrange(self, image: Float[Tensor, "image feature d_model"], inputs: Inputs) -> Tensor:
        """The features in the order of the image tokens, `[…, d_model]`; all of them, one picture after another.

        A subclass whose `layout` says that some are left out, or stand in another order, says it here for the tensors.
        """
        return image

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
        inputs: Inputs | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream before block `last`, given the one before block `first`; `inputs` are those it comes from."""
        seen = past.held_by(first, last) if past is not None else 0
        if positions is None:
            angles = self.rotary.span(seen, seen + x.shape[1], x.dtype, x.device)
        else:
            angles = self.rotary(positions, x.dtype)
        mask = self.mask(attention_mask, seen, x, inputs)
        for block in self.blocks[first:last]:
            x = block(x, mask, angles, past)
        return x

    def replay(self, x: Tensor, first: int, last: int, attention_mask: Tensor | None, keep: int) -> Tensor:
        """`run_blocks` and `read_out`, recorded where a shape comes again."""
        whole = attention_mask is None or is_whole(attention_mask)

        def rest(x: Tensor, *mask: Tensor) -> Tensor:
            for each in mask:
                tell(each, WHOLE, whole)
            return self.read_out(self.run_blocks(x, first, last, mask[0] if mask else None, None, None), keep)

        masks = () if attention_mask is None else (attention_mask,)
        return self.graphs(self, ("logits", first, last, keep, whole), rest, x, *masks)

    def positions(
        self, inputs: Inputs, mask: Int[Tensor, "batch total"] | None = None, beyond: int = 0
    ) -> Int[Tensor, "*axes batch total"] | None:
        """The rotary positions of a prompt and of `beyond` tokens after it; None: 0, 1, 2 … for every row.

        `mask` is given where padding must not be counted, as in generation. Both count from 0 here.
        """
        return None if mask is None else (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)

    def _next_positions(self, inputs: Inputs, past: KVCache | None, x: Tensor) -> Tensor:
        """Positions of the class's own; behind a cache they go on from its last ones."""
        if past is not None and past.length and past.following is not None:
            found = past.following + torch.arange(x.shape[1], device=x.device)
        else:
            found = self.positions(inputs)
        if found is None:
            found = torch.arange(x.shape[1], device=x.device)[None]
        if found.shape[-1] != x.shape[1]:
            self.expect("positions", found, (*found.shape[:-1], x.shape[1]))
        if past is not None:
            top = found.amax(-1, keepdim=True) + 1
            past.following = top if top.ndim == 2 else top.amax(0, keepdim=True).expand_as(top)
        return found

    def mask(
        self, attention_mask: Int[Tensor, "batch key"] | None, seen: int, x: Tensor, inputs: Inputs | None = None
    ) -> Mask:
        """Causal, and blind to padding; no tensor is built where causality alone says it all.

        `attention_mask` covers the `seen` positions in the cache and those of `x`; `inputs` are those of this run.
        """
        length = x.shape[1]
        if attention_mask is not None and attention_mask.shape != (len(x), seen + length):
            raise LensError(f"attention_mask {tuple(attention_mask.shape)}: expected {(len(x), seen + length)}")
        padded = attention_mask is not None and not is_whole(attention_mask)
        if not padded and (length == 1 or seen == 0):
            return Mask(causal=True)
        if padded and length == 1:
            return Mask(attention_mask[:, None, None].bool())  # type: ignore[index]
        allowed = torch.ones(length, seen + length, dtype=torch.bool, device=x.device).tril(seen)[None, None]
        if padded:
            allowed = allowed & attention_mask[:, None, None].bool()  # type: ignore[index]
        return Mask(allowed.expand(len(x), -1, -1, -1))

    def read_out(self, x: Float[Tensor, "batch pos d_model"], keep: int | Tensor = 0) -> Tensor:
        """Logits of the positions to keep (all for 0)."""
        if isinstance(keep, int) and keep < 0:
            raise LensError(f"logits_to_keep={keep}: expected how many of the last positions, or a tensor of positions")
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
            seen = attention_mask[:, -tokens.shape[1] :].bool()
            counts &= seen[:, 1:] & seen[:, :-1]
        if self.cfg.image_token_id is not None:
            counts &= targets != self.cfg.image_token_id
        if not bool(counts.any()):
            raise LensError(f"no position of {tuple(tokens.shape)} tokens counts: a loss needs two words in a row")
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
        first, last = (first + n if first < 0 else first), (last + n if last < 0 else last)
        if first > last:
            raise LensError(f"start_at_layer={start} lies behind stop_at_layer={stop}")
        return first, last
