"""A tokenizer with one token per word that fits the random models: `<pad> <s> </s> <unk>`, `w4` … `w96`, `<image>`."""

from __future__ import annotations

from random_models import IMAGE, TEXT
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", IMAGE: "<image>"}


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {SPECIAL.get(i, f"w{i}"): i for i in range(TEXT["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
