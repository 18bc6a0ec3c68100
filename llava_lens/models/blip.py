"""BLIP for question answering with every activation named, readable and editable; bit-equal to Hugging Face's.

`vision(pixels)` → `encoder(question, picture)` → `decoder(answer, question)`: three stacks, each of which looks at the
one before it by cross-attention. Unusual: the answer looks at the question's padding too, as it does in
transformers, so of a padded batch only the longest question is answered as it would be alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llava_lens.checkpoint import open_checkpoint
from llava_lens.errors import LensError, nearest
from llava_lens.hooked import HookedModel
from llava_lens.hooks import Hook
from llava_lens.models.blip_cache import BlipCache
from llava_lens.models.blip_config import BlipConfig
from llava_lens.models.blip_inputs import NAMES, BlipInputs, prepare, processor_of, read_processor
from llava_lens.models.blip_parts import AnswerDecoder, BertStack, BlipVision
from llava_lens.prompt import Processor
from llava_lens.rename import Row, Table, Unused
from llava_lens.surface import TransformerLensSurface
from llava_lens.weights import assign_state_dict, load_weights

M = TypeVar("M", bound="HookedBlip")
"""The class that a constructor is called on, so that a subclass gets its own type back."""

BERT_ROWS = (
    ("embeddings.word_embeddings.weight", "embed.weight"),
    ("embeddings.position_embeddings.weight", "pos_embed.weight"),
    ("embeddings.LayerNorm.{p}", "ln_embed.{p}"),
    *(
        (f"encoder.layer.{{l}}.{theirs}.{{p}}", f"blocks.{{l}}.{ours}.{{p}}")
        for theirs, ours in (
            *(
                (f"{attention}.{part}", f"{attn}.{proj}")
                for attention, attn in (("attention", "attn"), ("crossattention", "cross_attn"))
                for part, proj in (
                    ("self.query", "q_proj"),
                    ("self.key", "k_proj"),
                    ("self.value", "v_proj"),
                    ("output.dense", "o_proj"),
                )
            ),
            ("attention.output.LayerNorm", "ln1"),
            ("crossattention.output.LayerNorm", "ln_cross"),
            ("intermediate.dense", "mlp.in_proj"),
            ("output.dense", "mlp.out_proj"),
            ("output.LayerNorm", "ln2"),
        )
    ),
)
"""What both texts have, in the checkpoint's words and in ours."""

BLIP_TABLE: Table = (
    Row("vision_model.embeddings.class_embedding", "vision.class_embed"),
    Row("vision_model.embeddings.patch_embedding.{p}", "vision.patch_embed.{p}"),
    Row("vision_model.embeddings.position_embedding", "vision.pos_embed"),
    Row("vision_model.encoder.layers.{l}.layer_norm1.{p}", "vision.blocks.{l}.ln1.{p}"),
    Row("vision_model.encoder.layers.{l}.self_attn.qkv.{p}", "vision.blocks.{l}.attn.qkv_proj.{p}"),
    Row("vision_model.encoder.layers.{l}.self_attn.projection.{p}", "vision.blocks.{l}.attn.o_proj.{p}"),
    Row("vision_model.encoder.layers.{l}.layer_norm2.{p}", "vision.blocks.{l}.ln2.{p}"),
    Row("vision_model.encoder.layers.{l}.mlp.fc1.{p}", "vision.blocks.{l}.mlp.in_proj.{p}"),
    Row("vision_model.encoder.layers.{l}.mlp.fc2.{p}", "vision.blocks.{l}.mlp.out_proj.{p}"),
    Row("vision_model.post_layernorm.{p}", "vision.ln_final.{p}"),
    *(Row(f"text_encoder.{theirs}", f"encoder.{ours}") for theirs, ours in BERT_ROWS),
    *(Row(f"text_decoder.bert.{theirs}", f"decoder.{ours}") for theirs, ours in BERT_ROWS),
    Row("text_decoder.cls.predictions.transform.dense.{p}", "decoder.head.dense.{p}"),
    Row("text_decoder.cls.predictions.transform.LayerNorm.{p}", "decoder.head.ln.{p}"),
    Row("text_decoder.cls.predictions.decoder.{p}", "decoder.unembed.{p}"),
    Row("text_decoder.cls.predictions.bias", "decoder.bias"),
    Unused("text_encoder.embeddings.position_ids"),
    Unused("text_decoder.bert.embeddings.position_ids"),
)
"""`BlipForQuestionAnswering` as transformers saves it."""


class HookedBlip(HookedModel):
    """BLIP's tower, question encoder and answer decoder; hooks carry TransformerLens's names behind the stack's.

    `vision.blocks.0.attn.hook_pattern`, `encoder.blocks.0.cross_attn.hook_pattern`, `decoder.blocks.0.hook_mlp_out`.
    """

    Cache = BlipCache
    weight_table = BLIP_TABLE
    tied_weights = (("decoder.embed.weight", "decoder.unembed.weight"), ("decoder.unembed.bias", "decoder.bias"))

    def __init__(self, cfg: BlipConfig, processor: Processor | None = None):
        super().__init__()
        self.cfg = cfg
        self.processor = processor
        self.vision = BlipVision(cfg.vision)
        self.encoder = BertStack(cfg.text)
        self.decoder = AnswerDecoder(cfg.text)
        self.hook_logits = Hook("batch pos d_vocab")
        self.setup()

    # ---- ways in

    @classmethod
    def from_pretrained(
        cls: type[M], id_or_dir: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", **hub: Any
    ) -> M:
        """Load a checkpoint from a folder or the hub (`hub` goes to its download: `revision`, `token`, …).

        `dtype` defaults to the checkpoint's. Raises `LensError` naming the weight or the file at fault.
        """
        checkpoint = open_checkpoint(id_or_dir, families=("blip",), **hub)
        with torch.device("meta"):
            model = cls(BlipConfig.from_hf(checkpoint.config, model_name=str(id_or_dir)))
        load_weights(model, checkpoint, table=cls.weight_table, dtype=dtype, device=device)
        model.processor = read_processor(checkpoint.directory, model.cfg)
        return model._ready()

    @classmethod
    def from_hf(cls: type[M], hf_model: nn.Module, processor: Any = None) -> M:
        """Wrap a `BlipForQuestionAnswering` that is in memory; the weights are shared, not copied."""
        config: Any = hf_model.config
        with torch.device("meta"):
            model = cls(BlipConfig.from_hf(config))
        assign_state_dict(model, hf_model.state_dict(), table=cls.weight_table)
        model.processor = None if processor is None else processor_of(processor, model.cfg)
        return model._ready()

    def _ready(self: M) -> M:
        self._note_placement()
        return self.eval()

    def _note_placement(self) -> None:
        weight = self.encoder.embed.weight
        self.cfg = replace(self.cfg, device=weight.device, dtype=weight.dtype)

    # ---- inputs and words

    def prepare(self, question: str | list[str], image: Any, answer: str | list[str] = "") -> BlipInputs:
        """Questions and pictures as inputs on the model's device; `answer` is a start that the model goes on from."""
        if self.processor is None:
            raise LensError("this model has no processor; give one: HookedBlip.from_hf(model, processor)")
        return prepare(self.processor, self.cfg, question, image, answer).to(self.cfg.device)

    def read_inputs(self, input: Any = None, **named: Any) -> BlipInputs:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What `forward` was given, checked and on the model's device."""
        if isinstance(input, BlipInputs | Mapping) and named:
            raise LensError(f"{', '.join(named)} given beside {type(input).__name__}, which holds the whole input")
        if isinstance(input, Mapping) and not isinstance(input, BlipInputs):
            return self.read_inputs(**input)
        if not isinstance(input, BlipInputs):
            given = dict(named) if input is None else {"input_ids": input, **named}
            unknown = next((name for name in given if name not in NAMES), None)
            if unknown is not None:
                raise LensError(f"unknown input {unknown!r}{nearest(unknown, NAMES)}; known: {', '.join(NAMES)}")
            if not isinstance(given.get("input_ids"), Tensor):
                raise LensError("expected BlipInputs, or input_ids and pixel_values")
            input = BlipInputs(**{NAMES[name]: tensor for name, tensor in given.items()})
        return input.check(self.cfg).to(self.cfg.device)

    tokenizer = TransformerLensSurface.tokenizer
    to_single_token = TransformerLensSurface.to_single_token
    word_ids = TransformerLensSurface.word_ids
    _vocabulary_id = TransformerLensSurface._vocabulary_id

    # ---- the forward

    def forward(self, input: Any = None, **named: Any) -> Float[Tensor, "batch decoder_pos d_vocab"]:
        """Logits of the answer's next token at every decoder position.

        `input` is `BlipInputs` or a mapping; or by name, as in transformers: `input_ids`, `pixel_values`,
        `attention_mask`, `decoder_input_ids`, `decoder_attention_mask`. Without decoder tokens the answer is at its
        start, `[batch, 1, d_vocab]`. Raises `LensError` for inputs that do not fit.
        """
        self.n_runs += 1
        inputs = self.read_inputs(input, **named)
        self.inputs_seen = inputs if self.is_caching else None
        question = self.encode_question(inputs, self.vision(inputs.pixels))
        return self.read_answer(self.answer_tokens(inputs), question, inputs.decoder_mask)

    def encode_question(
        self, inputs: BlipInputs, picture: Float[Tensor, "batch source d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The question after it has looked at the picture, `vision(pixels)`."""
        return self.encoder(inputs.tokens, picture, inputs.attention_mask)

    def read_answer(
        self,
        tokens: Int[Tensor, "batch pos"],
        question: Float[Tensor, "batch source d_model"],
        mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of an answer's tokens, given the encoded question."""
        return self.hook_logits(self.decoder.read_out(self.decoder(tokens, question, mask)))

    def answer_tokens(self, inputs: BlipInputs) -> Int[Tensor, "batch pos"]:
        """The answer so far: the decoder's tokens, or the start token alone."""
        if inputs.decoder_tokens is not None:
            return inputs.decoder_tokens
        return torch.full((inputs.batch_size, 1), self.cfg.bos_token_id, device=self.cfg.device)

    @torch.no_grad()
    def generate(self, input: Any = None, max_new_tokens: int = 19, **named: Any) -> Int[Tensor, "batch pos"]:
        """Greedy answers with the start token in front, each up to its end token and then padded.

        Hooks are live, the decoder's at every step. The whole answer runs anew at each step: answers are short. As in
        transformers, a start in the inputs is not continued.
        """
        if max_new_tokens < 1:
            raise LensError(f"max_new_tokens={max_new_tokens}; expected 1 or more")
        self.n_runs += 1
        inputs = self.read_inputs(input, **named)
        question = self.encode_question(inputs, self.vision(inputs.pixels))
        tokens = self.answer_tokens(replace(inputs, decoder_tokens=None, decoder_mask=None))
        going = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            chosen = self.read_answer(tokens, question)[:, -1].argmax(-1)
            chosen = torch.where(going, chosen, self.cfg.pad_token_id)
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
            going = going & (chosen != self.cfg.sep_token_id)
            if not bool(going.any()):
                break
        return tokens

    # ---- what is LLaVA's alone

    def run_with_cache(self, *model_args: Any, pos_slice: Any = None, **how: Any) -> tuple[Any, Any]:
        """As `HookedModel.run_with_cache`, with a `BlipCache`; `vision_pos_slice` cuts the tower's positions.

        Raises `LensError` for `pos_slice`, which would cut question and answer at the same places.
        """
        if pos_slice is not None:
            raise LensError("pos_slice: question and answer have positions of their own; cut the entries instead")
        return super().run_with_cache(*model_args, **how)

    def cache_bytes(self, *model_args: Any, **how: Any) -> int:
        """Raises `LensError`: the size of a cache is not foretold for BLIP."""
        raise LensError("cache_bytes is LLaVA's; run_with_cache(…)[1].nbytes tells what was kept")

    def why_silent(self, name: str) -> str:
        """A guess for the message of a hook that never fired."""
        return "the run did not reach it"
