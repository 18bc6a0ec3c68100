"""Prompts become tokens and roles; the truth is Hugging Face's `LlavaProcessor` on the same text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers import LlavaConfig as HfLlavaConfig

from llava_lens.config import LlavaConfig
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.pictures import Picture
from llava_lens.preparation import prepare
from llava_lens.prompt import Processor
from llava_lens.roles import Roles

SIDE, PATCH = 24, 8  # 3 × 3 patches
SLOT = "<image>\n"
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The chat template that LLaVA-1.5 is published with."""
CHATML = (
    "{{ '<s>' }}{% for m in messages %}{{ '[' + m['role'] + ']\n' + (m['content'] | trim) + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
"""One that takes strings alone, trims them, writes `<s>` itself and ends in a new line."""
TEMPLATES = {"LLaVA": LLAVA_TEMPLATE, "Vicuna": None, "strings alone": CHATML}

WORDS = "what is the color of circle square how many objects are there user assistant red a and it left or compare with"
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
CORPUS = [
    "USER: \nWhat is the color of the circle? ASSISTANT: The color of the circle is red",
    "USER: \nHow many objects are there? Compare with it. ASSISTANT: There are two",
]


def wrapped(tokenizer: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **{**named, **special})


@cache
def word_level() -> PreTrainedTokenizerFast:
    """Lower-cased words and marks, one token each, as the embedded model's."""
    words = [*SPECIAL, *WORDS.split(), *"?.:,[]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(r"[^a-z0-9\-]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    return wrapped(tokenizer, additional_special_tokens=["<image>"])


def llama_like(image_token: bool) -> PreTrainedTokenizerFast:
    """Byte-fallback BPE on `▁`-marked text with a prepended mark, as Llama's; its vocabulary is small: words split."""
    marked = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence(marked)
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # no token across words, as in Llama's
    trained.train_from_iterator(CORPUS, trainer)
    tokenizer = Tokenizer(trained.model)
    tokenizer.normalizer = normalizers.Sequence(marked)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if image_token:
        tokenizer.add_special_tokens([AddedToken("<image>", normalized=False), AddedToken("<pad>", normalized=False)])
        return wrapped(tokenizer)
    return wrapped(tokenizer, pad_token="<unk>")


TOKENIZERS = {"word level": word_level, "Llama-like": cache(lambda: llama_like(True))}
EVERY_TOKENIZER = pytest.mark.parametrize("kind", TOKENIZERS)
EVERY_TEMPLATE = pytest.mark.parametrize("template", TEMPLATES)


def hf_config(n_vocabulary: int, image_id: int, full: bool = False, n_ctx: int = 128) -> HfLlavaConfig:
    text = LlamaConfig(
        vocab_size=n_vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=n_ctx,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, projection_dim=8,
    )  # fmt: skip
    return HfLlavaConfig(
        text_config=text, vision_config=vision, image_token_index=image_id, image_seq_length=9 + full,
        vision_feature_select_strategy="full" if full else "default",
    )  # fmt: skip


def setup(kind: str = "word level", template: str = "LLaVA", full: bool = False, n_ctx: int = 128) -> tuple[Any, Any]:
    """Hugging Face's processor and our config of the same checkpoint."""
    tokenizer: Any = TOKENIZERS[kind]()
    hf = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full" if full else "default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[template],
    )
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    return hf, LlavaConfig.from_hf(hf_config(len(tokenizer), image_id, full, n_ctx))


def picture(seed: int = 0, width: int = 50, height: int = 31) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def said(roles: Roles, role: str) -> str:
    """The text that a role's tokens cover."""
    return roles.text[
        slice(
            min(roles.spans[i][0] for i in roles.positions(role).tolist()),
            max(roles.spans[i][1] for i in roles.positions(role).tolist()),
        )
    ]


ASKED = ["What is the color of the circle?", "How many objects are there, and it is red?"]


# Against Hugging Face


@EVERY_TOKENIZER
@EVERY_TEMPLATE
@pytest.mark.parametrize("n_images", [0, 1, 2])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("answer", ["", "The color of the circle is"])
def test_tokens_and_pixels_are_hugging_faces(kind: str, template: str, n_images: int, full: bool, answer: str) -> None:
    hf, cfg = setup(kind, template, full)
    pictures = [picture(i, 50 + i, 31 + 9 * i) for i in range(n_images)]
    ours = prepare(hf, cfg, ASKED[0], pictures, answer)
    expected = f"USER: {SLOT * n_images}{ASKED[0]} ASSISTANT:" + (f" {answer}" if answer else "")
    if template == "strings alone":
        expected = f"<s>[user]\n{SLOT * n_images}{ASKED[0]}\n[assistant]\n{answer}"
    roles = ours.roles_of()
    assert roles.text == expected
    once = {"add_special_tokens": False} if expected.startswith("<s>") else {}
    theirs = hf(text=expected, images=pictures or None, return_tensors="pt", **once)
    assert torch.equal(ours.tokens, theirs["input_ids"]) and ours.attention_mask is None
    if n_images:
        assert ours.pixels is not None and torch.equal(ours.pixels, theirs["pixel_values"])
    else:
        assert ours.pixels is None and "pixel_values" not in ours
    assert roles.tokens == tuple(hf.tokenizer.convert_ids_to_tokens(ours.tokens[0].tolist()))


@EVERY_TOKENIZER
def test_the_published_templates_text_is_what_hugging_face_renders(kind: str) -> None:
    hf, cfg = setup(kind)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": ASKED[1]}]
    theirs = hf.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prepare(hf, cfg, ASKED[1], [picture(), picture()]).roles_of().text == theirs


@EVERY_TOKENIZER
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_is_hugging_faces(kind: str, side: str) -> None:
    hf, cfg = setup(kind)
    images = [picture(0), [picture(1), picture(2)], None]
    ours = prepare(hf, cfg, [*ASKED, "red?"], images, answer=["The", "", ""], padding_side=side)
    assert ours.roles is not None and ours.attention_mask is not None
    texts = [roles.text for roles in ours.roles]
    flat = [picture(0), picture(1), picture(2)]
    theirs = hf(text=texts, images=flat, padding=True, padding_side=side, return_tensors="pt")
    for key, ours_value in ours.for_hf().items():
        assert torch.equal(ours_value, theirs[key]), key
    assert [roles.labels.count("padding") for roles in ours.roles] == (theirs["attention_mask"] == 0).sum(1).tolist()
    for i in range(3):
        seen = theirs["attention_mask"][i].nonzero()[:, 0]
        assert ours.roles[i].last == seen[-1] and torch.equal(ours.positions("all", row=i), seen)


def test_hugging_faces_model_takes_the_inputs_and_its_slots_are_the_image_positions() -> None:
    hf, cfg = setup("word level", full=True)
    model: Any = LlavaForConditionalGeneration(hf_config(len(hf.tokenizer), 4, full=True)).eval()
    ours = prepare(hf, cfg, ASKED, [[picture(0), picture(1)], None])
    with torch.no_grad():
        assert model(**ours.for_hf()).logits.isfinite().all()
        features = torch.cat(list(model.model.get_image_features(ours.pixels, return_dict=True).pooler_output))
        embedded = model.get_input_embeddings()(ours.tokens)
        mask = model.model.get_placeholder_mask(ours.tokens, embedded, features)[..., 0]
    assert torch.equal(mask[0].nonzero()[:, 0], ours.positions("image", row=0))


# The original release: no word for an image


def original_tokens(prompt: str, tokenizer: Any, n: int, image_id: int) -> list[int]:
    """The release's own way: chunks between images, the `<s>` of all but the first dropped."""
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids += [image_id] * n + chunk[1:]
    return ids


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_a_vocabulary_without_an_image_token_is_split_at_the_placeholders(n_images: int) -> None:
    tokenizer = llama_like(False)
    cfg = LlavaConfig.from_hf(hf_config(len(tokenizer), len(tokenizer)))
    ours = prepare(tokenizer, cfg, ASKED[0], [picture()] * n_images)
    roles = ours.roles_of()
    expected = f"USER: {SLOT * n_images}{ASKED[0]} ASSISTANT:"
    assert roles.text == expected and said(roles, "question") == ASKED[0]
    assert ours.tokens[0].tolist() == original_tokens(expected, tokenizer, 9, len(tokenizer))
    assert [roles.labels.count(x) for x in ("image", "padding")] == [9 * n_images, 0]


def test_an_image_token_that_is_not_the_configs_is_refused() -> None:
    hf, _ = setup()
    other = LlavaConfig.from_hf(hf_config(len(hf.tokenizer), 7))
    with pytest.raises(LensError, match=r"tokenizer's <image> is 4, the config's image_token_id 7"):
        prepare(hf, other, ASKED[0], picture())


# Roles


@EVERY_TOKENIZER
@EVERY_TEMPLATE
@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_roles_cover_the_prompt(kind: str, template: str, n_images: int) -> None:
    hf, cfg = setup(kind, template)
    roles = prepare(hf, cfg, ASKED[0], [picture()] * n_images, "The color is").roles_of()
    assert said(roles, "question").strip() == ASKED[0] and said(roles, "answer").strip() == "The color is"
    assert "".join(said(roles, "template").split()) in ("ASSISTANT:", "[assistant]")
    assert roles.labels[0] == "system" and roles.positions("last").tolist() == [len(roles) - 1]
    assert len(roles.positions("image")) == 9 * n_images == roles.labels.count("image")
    order = [label for i, label in enumerate(roles.labels) if i == 0 or roles.labels[i - 1] != label]
    images = ["image", "system"] * n_images if kind == "Llama-like" else ["image"] * bool(n_images)
    assert order == ["system", *images, "question", "template", "answer"]
    assert set(roles.positions("text").tolist()) | set(roles.positions("image").tolist()) == set(range(len(roles)))


@EVERY_TOKENIZER
def test_a_question_that_repeats_the_templates_words_is_still_found(kind: str) -> None:
    hf, cfg = setup(kind)
    for question in ("user", "ASSISTANT:", "user: assistant: a", "a"):
        roles = prepare(hf, cfg, question).roles_of()
        assert said(roles, "question").strip() == question
        assert roles.spans[roles.positions("question")[0]][0] in (5, 6)  # after "USER: ", with or without the blank


@EVERY_TOKENIZER
@pytest.mark.parametrize("template", ["LLaVA", "Vicuna"])
def test_placeholders_in_the_question_stay_where_they_are(kind: str, template: str) -> None:
    hf, cfg = setup(kind, template)
    ours = prepare(hf, cfg, "compare <image> with <image>.", [picture(0), picture(1)])
    roles = ours.roles_of()
    assert roles.text == "USER: compare <image> with <image>. ASSISTANT:"
    theirs = hf(text=roles.text, images=[picture(0), picture(1)], return_tensors="pt")
    assert torch.equal(ours.tokens, theirs["input_ids"])
    assert said(roles, "question").strip() == "compare <image> with <image>."
    between = roles.labels[roles.token_of(2, 2, image=0) + 1 : roles.token_of(0, 0, image=1)]
    assert set(between) == {"question"} and len(between) >= 1


@EVERY_TOKENIZER
def test_blanks_and_placeholders_around_a_question_are_not_part_of_it(kind: str) -> None:
    hf, cfg = setup(kind)
    plain = prepare(hf, cfg, GOOD, picture()).roles_of()
    assert prepare(hf, cfg, f"<image>\n{GOOD}", picture()).roles_of() == plain
    hf, cfg = setup(kind, "strings alone")
    assert prepare(hf, cfg, f" {GOOD}\n").roles_of() == prepare(hf, cfg, GOOD).roles_of()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_patch_has_its_position_and_back(full: bool, side: str) -> None:
    hf, cfg = setup(full=full)
    ours = prepare(hf, cfg, [*ASKED], [[picture(0), picture(1)], [picture(2)]], padding_side=side)
    for row, n_images in ((0, 2), (1, 1)):
        roles = ours.roles_of(row)
        slots = (ours.tokens[row] == cfg.image_token_id).nonzero()[:, 0].tolist()
        expected = []
        for image in range(n_images):
            assert roles.grid(image) == (3, 3) and len(roles.positions("image", image)) == 9 + full
            expected += [None] * full + [(image, r, c) for r in range(3) for c in range(3)]
        assert [roles.patch_of(p) for p in slots] == expected
        for position, patch in zip(slots, expected, strict=True):
            if patch:
                image, r, c = patch
                assert roles.token_of(row=r, col=c, image=image) == position == roles.patch_positions(image)[r, c]
        rest = set(range(len(roles))) - set(slots)
        assert all(roles.patch_of(p) is None for p in rest)
        assert torch.cat([roles.positions("image", k) for k in range(n_images)]).tolist() == slots


def test_roles_lead_back_to_the_original_picture() -> None:
    hf, cfg = setup()
    roles = prepare(hf, cfg, ASKED[0], [picture(0, 60, 30), picture(1, 24, 48)]).roles_of()
    assert [roles.image_size(k) for k in (0, 1)] == [(60, 30), (24, 48)]
    assert roles.region(0) == (15.0, 0.0, 45.0, 30.0) and roles.region(1) == (0.0, 12.0, 24.0, 36.0)
    assert roles.box_of_patch(0, 2, image=1) == (16.0, 12.0, 24.0, 20.0)
    assert roles.patch_of_pixel(44, 29) == (2, 2) and roles.patch_of_pixel(45, 29) is None
    mask = np.zeros((48, 24), bool)
    mask[19:21, 3] = True
    assert roles.patches_of_mask(mask, image=1).nonzero().tolist() == [[0, 0], [1, 0]]
    assert roles.patches_of_mask(torch.from_numpy(mask), image=1, buffer=1).sum() == 6
    laid = roles.to_original(torch.arange(9.0).reshape(3, 3))
    assert laid.shape == (30, 60) and laid[29, 44] == 8 and np.isnan(laid[29, 45])


@EVERY_TOKENIZER
def test_words_are_found_in_question_and_answer_only(kind: str) -> None:
    hf, cfg = setup(kind)
    inputs = prepare(hf, cfg, "How many circle objects are there or user?", picture(), "the circle is")
    roles = inputs.roles_of()
    for word, times in (("circle", 2), ("Circle", 2), ("how many", 1), ("user", 1), ("is", 1)):
        positions = inputs.positions_of(word)
        spelled = hf.tokenizer.decode(inputs.tokens[0, positions]).replace(" ", "").lower()
        assert spelled == word.replace(" ", "").lower() * times, word
        assert {roles.labels[i] for i in positions.tolist()} <= {"question", "answer"}
    with pytest.raises(LensError, match=r"no word 'circel' in the question or the given answer; nearest: 'circle'"):
        inputs.positions_of("circel")
    for absent in ("assistant", "circ", "any", "user? assistant", "", "image"):
        with pytest.raises(LensError, match="no word"):
            inputs.positions_of(absent)


def test_characters_that_are_several_byte_tokens_are_one_word() -> None:
    hf, cfg = setup("Llama-like")
    question = "Où est le café ☕, 你好?"
    inputs = prepare(hf, cfg, question, picture(), "ça")
    roles = inputs.roles_of()
    assert said(roles, "question").strip() == question and said(roles, "answer").strip() == "ça"
    assert torch.equal(inputs.tokens, hf(text=roles.text, images=picture(), return_tensors="pt")["input_ids"])
    for word in ("café", "你好", "ça"):
        assert hf.tokenizer.decode(inputs.tokens[0, inputs.positions_of(word)]).strip() == word


def test_a_whole_prompt_is_taken_as_it_is() -> None:
    hf, cfg = setup()
    prompt = "USER: <image>\nWhat is the color?\nhow many ASSISTANT: The circle is"
    ours = prepare(hf, cfg, prompt, picture(), template=False)
    assert torch.equal(ours.tokens, hf(text=prompt, images=picture(), return_tensors="pt")["input_ids"])
    roles = ours.roles_of()
    assert roles.text == prompt and said(roles, "question") == "What is the color?\nhow many"
    assert said(roles, "answer") == "The circle is"
    turns = prepare(hf, cfg, "USER: a ASSISTANT: red USER: it and ASSISTANT:", template=False, answer="the").roles_of()
    assert said(turns, "question") == "it and" and said(turns, "answer") == "the"
    plain = prepare(hf, cfg, "the circle is", template=False)
    assert plain.roles_of().text == "the circle is" and said(plain.roles_of(), "question") == "the circle is"
    assert prepare(hf, cfg, "<image>", picture(), template=False).n_pos == 10


def test_roles_survive_json() -> None:
    hf, cfg = setup(full=True)
    inputs = prepare(hf, cfg, ASKED, [[picture(0), picture(1)], None], answer="it is")
    for roles in inputs.roles or ():
        again = Roles.from_json(json.loads(json.dumps(roles.to_json())))
        assert again == roles and hash(again) == hash(roles)


# The mapping


def test_a_row_alone_is_what_it_would_have_been_alone() -> None:
    hf, cfg = setup()
    images: list[Any] = [None, [picture(1), picture(2)], picture(0)]
    questions = ["red?", *ASKED]
    batch = prepare(hf, cfg, questions, images)
    for i, (question, image) in enumerate(zip(questions, images, strict=True)):
        row, alone = batch.row(i), prepare(hf, cfg, question, image)
        assert row.roles == alone.roles and list(row) == list(alone)
        assert all(torch.equal(row[key], alone[key]) for key in alone.for_hf())
    assert torch.equal(batch.row(-1).tokens, batch.row(2).tokens)
    with pytest.raises(LensError, match="row 3 of 3"):
        batch.row(3)


def test_inputs_unpack_under_hugging_faces_names() -> None:
    hf, cfg = setup()
    alone, batch = prepare(hf, cfg, ASKED[0], picture()), prepare(hf, cfg, ASKED)
    assert list(alone) == ["input_ids", "pixel_values", "roles"] and len(alone) == 3
    assert list(batch) == ["input_ids", "attention_mask", "roles"] and "pixel_values" not in batch
    assert {**alone}["pixel_values"] is alone.pixels and set(alone.for_hf()) == {"input_ids", "pixel_values"}
    with pytest.raises(KeyError, match="'pixel_values'; there are input_ids, attention_mask, roles"):
        batch["pixel_values"]
    assert alone == alone and alone != prepare(hf, cfg, ASKED[0], picture()) and len({alone, batch}) == 2
    half = alone.to(torch.float16)
    assert half.pixels is not None and half.pixels.dtype == torch.float16 and half.tokens.dtype == torch.int64
    assert (
        repr(alone)
        == "Inputs(1 × 22 tokens, 1 image 24×24, 'USER: <image>\\nWhat is the color of the circle? ASSISTANT:')"
    )
    assert repr(batch).startswith("Inputs(2 × 16 tokens, 3 padding, 'USER: What") and batch.to("cpu").batch_size == 2
    assert repr(alone.roles_of()) == "Roles(3 system, 9 image, 8 question, 2 template)"


def test_ready_made_tokens_get_the_roles_that_can_be_known() -> None:
    hf, cfg = setup(full=True)
    theirs = hf(
        text=["red <image>", "<image> red <image> a"], images=[picture()] * 3, padding=True, return_tensors="pt"
    )
    ours = Inputs.from_tokens(theirs["input_ids"], cfg, theirs["pixel_values"], theirs["attention_mask"], hf.tokenizer)
    assert [roles.n_images for roles in ours.roles or ()] == [1, 2] and ours.n_images == 3
    assert ours.positions("text", row=1).tolist() == [0, 11, 22] and ours.positions_of("red", row=0).tolist() == [12]
    assert ours.roles_of(1).patch_of(2) == (0, 0, 0) and ours.roles_of(1).token_of(2, 2, image=1) == 21
    assert torch.equal(ours.row(0).tokens, hf(text="red <image>", images=picture(), return_tensors="pt")["input_ids"])
    words = hf(text="the circle is", return_tensors="pt")["input_ids"]
    assert Inputs.from_tokens(words, cfg, tokenizer=hf.tokenizer).positions_of("circle").tolist() == [2]
    single = Inputs.from_tokens(torch.tensor([2, 6, 7]), cfg)
    assert single.tokens.shape == (1, 3) and single.positions("last").tolist() == [2]
    with pytest.raises(LensError, match=r"make the inputs with model.prepare"):
        ours.roles_of(0).region()
    with pytest.raises(LensError, match=r"carry no text; make the inputs with model.prepare"):
        single.positions_of("red")


def test_llama_like_ready_made_tokens_spell_their_words() -> None:
    hf, cfg = setup("Llama-like")
    tokens = hf(text="USER: the circle is red", return_tensors="pt")["input_ids"]
    inputs = Inputs.from_tokens(tokens, cfg, tokenizer=hf.tokenizer)
    found = [inputs.roles_of().tokens[i] for i in inputs.positions_of("circle").tolist()]
    assert "".join(found).replace("▁", "") == "circle" and inputs.roles_of().text.strip().endswith("the circle is red")


# From disk


@pytest.mark.parametrize("layout", ["new", "old"])
def test_a_checkpoints_folder_gives_the_processor(
    layout: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hf, cfg = setup()
    hf.save_pretrained(tmp_path)
    if layout == "old":
        (tmp_path / "chat_template.jinja").unlink()
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": LLAVA_TEMPLATE}))
        settings = json.loads((tmp_path / "processor_config.json").read_text()).pop("image_processor")
        settings["image_processor_type"] = "CLIPImageProcessor"
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        (tmp_path / "processor_config.json").unlink()
    processor = Processor.from_pretrained(tmp_path, cfg)
    assert processor.chat_template == LLAVA_TEMPLATE and processor.image is not None
    ours, theirs = prepare(processor, cfg, ASKED[0], picture()), prepare(hf, cfg, ASKED[0], picture())
    assert ours.roles == theirs.roles and torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("pads", [True, False])
def test_the_original_release_pads_where_its_config_says_so(pads: bool, tmp_path: Path) -> None:
    tokenizer = llama_like(False)
    tokenizer.save_pretrained(tmp_path)
    aspect = {"image_aspect_ratio": "pad"} if pads else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **aspect}))
    cfg = LlavaConfig.from_hf(hf_config(len(tokenizer), len(tokenizer)))
    processor = Processor.from_pretrained(tmp_path, cfg)
    ours = prepare(processor, cfg, ASKED[0], picture(0, 60, 30))
    assert ours.roles_of().region() == ((0.0, -15.0, 60.0, 45.0) if pads else (15.0, 0.0, 45.0, 30.0))
    if pads:  # with CLIP's mean colour, as the release does
        assert ours.pixels is not None and ours.pixels[0, :, 0].abs().max() < 0.02


# Bad input

GOOD = "What is the color?"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"question": " \n"}, r"an empty question \(' \\n'\); expected some text"),
    "too few placeholders": (
        {"question": "<image> red?", "image": [picture()] * 2},
        "1 <image> in '<image> red.', but 2 images given; expected as many, or no <image> at all",
    ),
    "placeholders, no image": ({"question": "<image> red?"}, "1 <image> in .*, but 0 images given"),
    "image, whole prompt without": (
        {"question": GOOD, "image": picture(), "template": False},
        r"0 <image> in .*, but 1 image given; expected as many$",
    ),
    "unknown words": (
        {"question": "What is the colour of a zebra?"},
        r"does not know: 'colour'; nearest: 'color' \| 'zebra' \| in 'USER: What.*; it knows \d+ words",
    ),
    "unknown word in the answer": ({"question": GOOD, "answer": "the circel"}, "'circel'; nearest: 'circle'"),
    "too long": (
        {"question": "red " * 99, "image": [picture()] * 3},
        "question 0 takes 131 tokens, 104 of text and 27 of images; the context holds 128",
    ),
    "one of several too long": ({"question": [GOOD, "red " * 199]}, "question 1 takes .* the context holds 128"),
    "fewer images than questions": (
        {"question": [GOOD] * 3, "image": [picture()] * 2},
        "2 images for 3 questions; expected one entry per question",
    ),
    "more answers than questions": ({"question": GOOD, "answer": ["a", "b"]}, "2 answers for 1 questions"),
    "no questions": ({"question": []}, "no question; expected a string or a list"),
    "not a string": ({"question": [3]}, "question of type int; expected a string"),
    "answer not a string": ({"question": GOOD, "answer": [None]}, "answer of type NoneType; expected a string"),
    "bad side": ({"question": GOOD, "padding_side": "middle"}, "padding_side 'middle'; expected 'left' or 'right'"),
    "bad image": ({"question": GOOD, "image": [picture(), 5]}, "type int; expected a path"),
    "missing image": ({"question": GOOD, "image": "nowhere.png"}, "no image file 'nowhere.png'"),
    "pictures in one array": ({"question": GOOD, "image": np.zeros((2, 9, 9, 3), np.uint8)}, "holds 2 pictures"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_what_was_given_and_expected(name: str) -> None:
    given, message = REFUSED[name]
    hf, cfg = setup()
    with pytest.raises(LensError, match=message):
        prepare(hf, cfg, **given)


def test_one_picture_serves_all_questions() -> None:
    hf, cfg = setup()
    shared, each = prepare(hf, cfg, ASKED, picture()), prepare(hf, cfg, ASKED, [picture(), picture()])
    assert shared.roles == each.roles and torch.equal(shared["pixel_values"], each["pixel_values"])


def test_a_model_without_a_tower_takes_questions_but_no_images() -> None:
    hf, _ = setup()
    blind = LlavaConfig.from_hf(hf_config(len(hf.tokenizer), 4).text_config)
    assert prepare(hf.tokenizer, blind, ASKED[0]).roles_of().n_images == 0
    with pytest.raises(LensError, match="1 image for a model without a vision tower; expected none"):
        prepare(hf, blind, ASKED[0], picture())


def test_ready_made_tensors_are_held_against_the_config() -> None:
    _, cfg = setup()
    slots, pixels = torch.tensor([[2, *[4] * 9, 6]]), torch.zeros(1, 3, SIDE, SIDE)
    assert Inputs.from_tokens(slots, cfg, pixels).n_images == 1
    refused: list[tuple[tuple[Any, ...], str]] = [
        ((slots, cfg), r"9 image tokens in the prompt, but 0 picture\(s\) fill 0 \(9 each\); pixels are missing"),
        ((slots[:, 1:-2], cfg, pixels), r"8 image tokens in the prompt, but 1 picture\(s\) fill 9 \(9 each\)"),
        ((slots, cfg, torch.zeros(1, 3, SIDE, 30)), r"shape \(1, 3, 24, 30\); expected \[image, 3, 24, 24\]"),
        ((slots, cfg, pixels / 0), "not finite"),
        ((slots + 900, cfg), r"token ids 902 … 906; expected 0 … \d+"),
        ((torch.zeros(1, 200, dtype=torch.long), cfg), "a prompt of 200 tokens .* the context holds 128"),
        ((slots, cfg, pixels, torch.full_like(slots, 2)), "other values than 0 and 1"),
        ((slots, cfg, pixels, torch.ones(1, 3, dtype=torch.long)), r"attention_mask has shape \(1, 3\); expected"),
    ]
    for arguments, message in refused:
        with pytest.raises(LensError, match=message):
            Inputs.from_tokens(*arguments)
    with pytest.raises(LensError, match=r"18 image tokens .* but 2 picture\(s\) fill 18 \(9 each\); by row 10, 8"):
        Inputs.from_tokens(torch.tensor([[2, *[4] * 10], [2, *[4] * 8, 2, 2]]), cfg, torch.zeros(2, 3, SIDE, SIDE))


def test_wrong_selectors_name_the_right_ones() -> None:
    hf, cfg = setup()
    batch = prepare(hf, cfg, ASKED, picture())
    refused: list[tuple[Any, str]] = [
        (lambda: batch.positions("question"), "a batch of 2: say which row=0 … 1"),
        (lambda: batch.positions("questoin", row=0), "unknown role 'questoin'; nearest: 'question'; known: system"),
        (lambda: batch.positions("image", 1, row=0), "image 1; expected 0 … 0"),
        (lambda: batch.positions("question", 0, row=0), "only the role 'image' belongs to an image"),
        (lambda: batch.roles_of(0).token_of(3, 0), r"patch \(3, 0\) of image 0; expected rows 0 … 2, columns 0 … 2"),
        (lambda: batch.roles_of(0).patch_of(99), r"position 99; expected 0 … \d+"),
        (lambda: batch.roles_of(0).box_of_patch(-1, 0), r"patch \(-1, 0\)"),
        (lambda: prepare(hf, cfg, GOOD).roles_of().grid(), "none: the prompt has no image"),
        (lambda: Inputs(torch.ones(1, 2, dtype=torch.long)).positions("last"), "these inputs carry no roles"),
        (lambda: Roles(("system", "pixel")), r"roles \['pixel'\]; expected system, image"),
        (lambda: Roles(("system", "image"), pictures=(Picture((2, 2)),)), "1 image positions; the 1 images take 4"),
    ]
    for ask, message in refused:
        with pytest.raises(LensError, match=message):
            ask()


def test_a_template_that_loses_the_question_is_refused() -> None:
    hf, cfg = setup()
    silent = Processor(hf.tokenizer, Processor.from_hf(hf, cfg).image, "{{ 'USER: ASSISTANT:' }}")
    with pytest.raises(LensError, match="does not keep the question and its 1 <image>; write the whole prompt"):
        prepare(silent, cfg, GOOD, picture())
