"""What is special to Idefics3 and SmolVLM: tiles and their maps, their prompts, black pictures, options refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from cases_idefics3 import CASES, KINDS, config, inputs
from PIL import Image
from random_models import IMAGE, TEXT
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import Idefics3ImageProcessorPil, Idefics3Processor, PreTrainedTokenizerFast, SmolVLMImageProcessorPil

from llava_lens import HookedMLLM
from llava_lens.errors import LensError
from llava_lens.models.idefics3 import HookedIdefics3

SIDE, PATCH, SCALE = 32, 8, 2
SPECIAL = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", IMAGE: "<image>", 91: "<fake_token_around_image>"}
SPECIAL |= {92: "<global-img>", 93: "<end_of_utterance>"}
SPECIAL |= {60 + 4 * row + col: f"<row_{row + 1}_col_{col + 1}>" for row in range(4) for col in range(4)}
NEWLINES = {80: "\n", 81: "\n\n"}
TEMPLATE = (
    "w20 {% for message in messages %}w21 {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}w22{% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A word each, ends of lines too, and the marks around pictures."""
    words = {(SPECIAL | NEWLINES).get(i, f"w{i}"): i for i in range(TEXT["vocab_size"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n+"), "isolated")]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIAL.values()])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **names)


@cache
def processor(**changes: Any) -> Any:
    """Transformers' own, with small tiles and no download."""
    settings = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}} | changes
    tokens = (SIDE // PATCH // SCALE) ** 2
    return Idefics3Processor(Idefics3ImageProcessorPil(**settings), tokenizer(), tokens, TEMPLATE)


@cache
def model(kind: str = "idefics3") -> Any:
    found = next(case for case in CASES if case.name.startswith(kind))
    return HookedMLLM.from_hf(found.plain, processor())


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_a_batch_is_prepared_as_hugging_face_does():
    questions = ["w10 w11", "w12", "w13 w14 w15"]
    images = [[picture(70, 40), picture(20, 50, 1)], [picture(33, 33, 2)], [picture(300, 90, 3)]]
    prompts = [
        tokenizer().apply_chat_template(
            [{"role": "user", "content": [*[{"type": "image"}] * len(row), {"type": "text", "text": question}]}],
            chat_template=TEMPLATE,
            tokenize=False,
            add_generation_prompt=True,
        )
        for question, row in zip(questions, images, strict=True)
    ]
    true = processor()(text=prompts, images=images, padding=True, return_tensors="pt")
    ours = model().prepare(questions, images)
    assert torch.equal(ours.tokens, true["input_ids"]) and torch.equal(ours.attention_mask, true["attention_mask"])
    read = model().read_inputs(**true)
    assert torch.equal(ours.pixels, read.pixels) and not read.extras
    hf = CASES[1].plain
    with torch.no_grad():
        logits = hf(**true).logits
        assert torch.equal(model()(**true), logits) and torch.equal(model()(ours), logits)
        assert torch.equal(hf(**model().for_hf(ours)).logits, logits)
    roles = ours.roles_of(0)
    assert roles.n_sources == 2 and roles.n_images == len(read.row(0).roles or ()) or roles.n_images > 2
    marks = [label for label, token in zip(roles.labels, roles.tokens, strict=True) if "_" in token and token[0] == "<"]
    assert len(marks) > 6 and set(marks[:-1]) == {"template"}
    assert [roles.tokens[i] for i in roles.positions_of("w11")] == ["w11"]
