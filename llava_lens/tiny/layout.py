"""The parts of the small LLaVA that are not trained: tokenizer, processor and configurations, in published layouts."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from llava_lens.tiny.vocabulary import words

CANVAS, IMAGE_SIZE, PATCH = 256, 64, 8
FEATURE_LAYER = -2
PAD, UNK, BOS, EOS, IMAGE = range(5)
# A model or processor of transformers: its own annotations do not describe how it is called or moved.
Published = Any

# LLaVA-1.5's conversation, `USER: <image>\n{question} ASSISTANT: {answer}</s>USER: …`, of strings or of parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token if not loop.last or not continue_final_message else '' }}"
    "{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per lower-cased word or mark; `<s>` is put first, as Llama's tokenizer does."""
    vocabulary = {word: i for i, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^a-z0-9\-]"), "isolated")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def build_processor() -> LlavaProcessor:
    """Pictures to 64 × 64 pixels in 8 × 8 patches, `<image>` to 64 tokens."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def text_config(n_layers: int = 4, width: int = 128) -> LlamaConfig:
    """The decoder's: eight heads, Llama's block, an unembedding of its own."""
    return LlamaConfig(
        vocab_size=len(words()),
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=n_layers,
        num_attention_heads=8,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def vision_config(n_layers: int = 4, width: int = 128) -> CLIPVisionConfig:
    """The tower's: CLIP's, on 8 × 8 patches of 8 × 8 pixels."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=width * 4,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        hidden_act="quick_gelu",
        projection_dim=width,
    )


def llava_config(text: LlamaConfig, vision: CLIPVisionConfig) -> LlavaConfig:
    """LLaVA-1.5's: the tower's second last layer without the class token, through two layers with a GELU."""
    build: Published = LlavaConfig
    return build(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        tie_word_embeddings=False,
        pad_token_id=PAD,
    )


def generation_config() -> GenerationConfig:
    return GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=8)
