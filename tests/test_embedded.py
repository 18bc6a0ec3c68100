"""The embedded checkpoint end to end: pictures and words in, the same bits as Hugging Face's own classes out."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor

from llava_lens import HookedLlava
from llava_lens.errors import LensError
from llava_lens.tiny import BEFORE_TUNING, CHECKPOINT, questions, render_scene

SCENES = [render_scene(seed) for seed in range(1_000_000, 1_000_004)]
ASKED = [questions(scene)[0].text for scene in SCENES]


@pytest.fixture(scope="module")
def model():
    return HookedLlava.tiny()


@pytest.fixture(scope="module")
def hf():
    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def processor():
    return LlavaProcessor.from_pretrained(CHECKPOINT, backend="pil")


def test_a_batch_of_questions_equals_hugging_face(model, hf, processor):
    pictures = [scene.image for scene in SCENES]
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in ASKED]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    theirs = processor(images=pictures, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    ours = model.prepare(ASKED, pictures)
    assert torch.equal(ours.tokens, theirs["input_ids"]) and torch.equal(ours.pixels, theirs["pixel_values"])
    with torch.no_grad():
        logits = hf(**theirs).logits
        for given in (model(ours), model(**ours), model(**theirs), model(theirs), hf(**ours.for_hf()).logits):
            assert torch.equal(given, logits)
    kwargs = {"do_sample": False, "max_new_tokens": 4}
    assert torch.equal(model.generate(ours, max_new_tokens=4), hf.generate(**theirs, **kwargs))


def test_low_precision_equals_hugging_face(model):
    inputs = model.prepare(ASKED[0], SCENES[0].image)
    hf = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        ours = HookedLlava.from_pretrained(str(CHECKPOINT), dtype=torch.bfloat16)(inputs)
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, hf(**inputs.for_hf()).logits)


def test_the_decoder_before_tuning_reads_text_alone():
    model = HookedLlava.from_pretrained(str(BEFORE_TUNING))
    hf = LlamaForCausalLM.from_pretrained(BEFORE_TUNING).eval()
    inputs = model.prepare(f"{SCENES[0].text} {ASKED[0]}")
    with torch.no_grad():
        assert torch.equal(model(inputs), hf(**inputs.for_hf()).logits)
    assert not hasattr(model, "vision") and "vision.hook_pixels" not in model.hook_dict
    with pytest.raises(LensError, match="1 image for a model without a vision tower"):
        model.prepare(ASKED[0], SCENES[0].image)
    with pytest.raises(LensError, match="without a vision tower"):
        model(inputs.tokens, pixel_values=torch.zeros(1, 3, 64, 64))


def test_the_picture_decides_the_answer(model):
    """The same question about the same scene with one fact changed."""
    scene = next(s for s in map(render_scene, range(1_000_000, 1_000_100)) if s.find(shape="circle") == (0,))
    other = scene.recolored(0, "green" if scene.objects[0].color != "green" else "blue")
    for each in (scene, other):
        asked = model.prepare("What is the color of the circle?", each.image)
        assert model.generate(asked, max_new_tokens=2, return_type="text") == [each.objects[0].color]
