"""The embedded model: its words, its layout on disk, its training, and how often it is right."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llava_lens import tiny
from llava_lens.tiny import corpus, evaluate, gaze, train
from llava_lens.tiny.layout import BOS, IMAGE, UNK, Published, build_tokenizer
from llava_lens.tiny.pictures import patches_of, shown_by_patches, small
from llava_lens.tiny.tower import PatchHeads

MEGABYTE = 1_000_000
HOME = Path(tiny.__file__).parent


@pytest.fixture(scope="module")
def processor() -> Published:
    return LlavaProcessor.from_pretrained(tiny.CHECKPOINT, backend="pil")


@pytest.fixture(scope="module")
def model() -> Published:
    return LlavaForConditionalGeneration.from_pretrained(tiny.CHECKPOINT).eval()


def test_importing_scenes_needs_no_torch():
    code = """
        import sys, types
        package = types.ModuleType("llava_lens"); package.__path__ = [sys.argv[1]]; sys.modules["llava_lens"] = package
        import llava_lens.tiny
        assert not {"torch", "transformers", "transformer_lens", "matplotlib"} & set(sys.modules)
    """
    folder = str(HOME.parent)
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), folder], check=True)


def test_every_word_has_a_token_and_every_answer_is_one():
    tokenizer = build_tokenizer()
    for seed in range(60):
        scene = tiny.render_scene(seed)
        for question in tiny.questions(scene):
            said = f"USER: {scene.text} {question.text} ASSISTANT: {question.stem}"
            ids = tokenizer(said).input_ids
            assert ids[0] == BOS and UNK not in ids
            assert len(tokenizer(question.answer, add_special_tokens=False).input_ids) == 1
            assert tokenizer(f"{said} {question.answer}").input_ids == [*ids, *corpus.encode(question.answer)]


def test_training_reads_text_as_the_shipped_processor_does(processor: Published):
    scene = tiny.render_scene(5)
    question = tiny.questions(scene)[0]
    for mode in evaluate.MODES:
        prompt = evaluate.prompt(scene, question, mode)
        images = [scene.image] if mode == "image" else None
        given = processor(images=images, text=[prompt], return_tensors="pt")["input_ids"][0].tolist()
        picture = corpus.encode("USER:") + (IMAGE,) * 64 if mode == "image" else corpus.encode("USER: " + scene.text)
        assert given == [BOS, *picture, *corpus.encode(f"{question.text} ASSISTANT:")]


def test_training_sees_pictures_as_the_shipped_processor_does(processor: Published):
    scene = tiny.render_scene(5)
    given = processor.image_processor(scene.image, return_tensors="np")["pixel_values"][0]
    ours = (small(scene.image) / 255 - 0.5) / 0.25
    assert np.abs(given - ours.transpose(2, 0, 1)).max() < 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_patches_are_labelled_by_the_object_they_show(seed: int):
    scene = tiny.render_scene(seed)
    shown, offset = shown_by_patches(scene)
    for i, thing in enumerate(scene.objects):
        ys, xs = np.nonzero(thing.mask)
        patches, counts = np.unique(ys // 32 * 8 + xs // 32, return_counts=True)
        fullest = patches[counts.argmax()]
        assert tiny.SHAPES[shown[fullest, 0]] == thing.shape and tuple(tiny.COLORS)[shown[fullest, 1]] == thing.color
        assert patches_of(scene, i).sum() * 32**2 == pytest.approx(thing.coverage.sum(), rel=1e-4)
        row, column = divmod(int(fullest), 8)
        aim = (column + 0.5 + offset[fullest, 0], row + 0.5 + offset[fullest, 1])
        assert np.allclose(np.array(aim) * 32, thing.center, atol=1e-3)


def test_the_chat_template_takes_strings_and_parts(processor: Published):
    text = "What is the color of the circle?"
    parts = [{"type": "image"}, {"type": "text", "text": text}]
    for content, expected in ((f"<image>\n{text}", f"<image>\n{text}"), (parts, f"<image>\n{text}"), (text, text)):
        chat = [{"role": "user", "content": content}]
        assert processor.apply_chat_template(chat, add_generation_prompt=True) == f"USER: {expected} ASSISTANT:"
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "red"}] * 2
    said = processor.apply_chat_template(turns)
    assert said == f"USER: {text} ASSISTANT: red</s>" * 2


def test_the_checkpoints_are_small_and_hold_no_pickle():
    weights = {folder: folder / "model.safetensors" for folder in (tiny.CHECKPOINT, tiny.BEFORE_TUNING)}
    assert weights[tiny.CHECKPOINT].stat().st_size <= 12 * MEGABYTE
    assert sum(path.stat().st_size for path in weights.values()) <= 12 * MEGABYTE
    for folder in weights:
        assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".jinja"}


def test_published_classes_load_the_checkpoints(model: Published):
    text, vision = model.config.text_config, model.config.vision_config
    assert text.num_hidden_layers >= 4 and text.num_attention_heads >= 8
    assert vision.image_size // vision.patch_size >= 8
    assert isinstance(AutoProcessor.from_pretrained(tiny.CHECKPOINT), LlavaProcessor)
    load: Published = LlamaForCausalLM.from_pretrained
    before, report = load(tiny.BEFORE_TUNING, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    vocabulary = AutoTokenizer.from_pretrained(tiny.BEFORE_TUNING).get_vocab()
    assert vocabulary == AutoTokenizer.from_pretrained(tiny.CHECKPOINT).get_vocab()
    after = model.model.language_model.state_dict()
    assert before.model.state_dict().keys() == after.keys()
    assert any(not torch.equal(weight, after[name]) for name, weight in before.model.state_dict().items())


def test_the_example_is_answered_right(model: Published, processor: Published):
    example = json.loads((HOME / "example.json").read_text())
    picture = Image.open(HOME / "example.png").convert("RGB")
    scene = tiny.render_scene(example["seed"])
    assert np.array_equal(np.asarray(picture), np.asarray(scene.image)) and len(scene.objects) >= 3
    question = next(q for q in tiny.questions(scene) if q.text == example["question"])
    assert (question.answer, question.stem) == (example["answer"], example["stem"])
    short = f"USER: <image>\n{question.text} ASSISTANT:"
    for prompt in (short, f"{short} {question.stem}"):
        assert evaluate.answers(model, processor, [prompt], [scene], "image") == [question.answer]


def test_wilson_interval():
    low, high = evaluate.wilson(8, 10)  # worked by hand from the formula with z² = 3.8415
    assert (low, high) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert evaluate.wilson(0, 10)[0] == pytest.approx(0) and evaluate.wilson(10, 10)[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="3 right of 2 asked is no share"):
        evaluate.wilson(3, 2)


def test_the_share_of_right_answers_on_some_scenes():
    for found in evaluate.evaluate(n_scenes=100):
        assert found.asked >= 90 and found.interval[1] >= (0.99 if found.kind == "color" else 0.95), str(found)


def test_the_page_shows_the_tables_that_were_measured():
    measured = [evaluate.Accuracy(**row) for row in json.loads((HOME / "accuracy.json").read_text())]
    page = (HOME / "README.md").read_text()
    assert len(measured) == 10 and all(str(row) in page for row in measured)
    assert gaze.table(json.loads((HOME / "gaze.json").read_text())) in page


@pytest.mark.slow
@pytest.mark.parametrize("mode", evaluate.MODES)
def test_the_promised_share_of_right_answers(mode: str):
    for found in evaluate.evaluate(n_scenes=2000, modes=(mode,)):
        assert found.asked >= 2000 or found.kind != "color"
        assert found.share >= (0.99 if found.kind == "color" else 0.95), str(found)


def test_the_strongest_patch_is_on_the_asked_object():
    for stem in (False, True):
        found = gaze.measure(n_scenes=60, stem=stem)
        assert found["on_object"] > 0.8 and found["chance"] < 0.3 and found["moves"] > 0.6, found


def test_training_runs_and_resumes(tmp_path: Path):
    """All stages at small sizes; a run stopped in every stage and resumed gives the weights of one that was not."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(["--out", str(whole), "--quick", "--device", "cpu"])
    for stage in train.STAGES:
        first = train.Trainer(parts, train.QUICK)
        first.stop_after = 3
        first.run(stage)
        train.main(["--out", str(parts), "--quick", "--device", "cpu", "--resume", "--stage", stage])
    for folder in ("before_tuning", "tower", "checkpoint"):
        one, other = ((path / folder / "model.safetensors").read_bytes() for path in (whole, parts))
        assert one == other, folder
    LlavaForConditionalGeneration.from_pretrained(whole / "checkpoint")


def test_each_stage_trains_what_it_says(tmp_path: Path):
    train.main(["--out", str(tmp_path), "--quick", "--device", "cpu"])
    before = LlamaForCausalLM.from_pretrained(tmp_path / "before_tuning").model.state_dict()
    aligned = LlavaForConditionalGeneration.from_pretrained(tmp_path / "aligned")
    tuned = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    untouched = aligned.model.language_model.state_dict()
    assert all(torch.equal(weight, untouched[name]) for name, weight in before.items())
    assert _same(aligned.model.vision_tower, tuned.model.vision_tower)
    assert not _same(aligned.model.multi_modal_projector, tuned.model.multi_modal_projector)
    assert not _same(aligned.model.language_model, tuned.model.language_model)


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_loss_of_training_is_the_published_one(model: Published, processor: Published):
    """The shortcut from the tower's features on gives the logits of the whole published forward."""
    scene = tiny.render_scene(8)
    batch = processor(images=[scene.image], text=["USER: <image>\nWhere is the star? ASSISTANT:"], return_tensors="pt")
    with torch.no_grad():
        hidden = model.model.vision_tower(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states
        shortcut = train.see(model, batch["input_ids"], hidden[-2][:, 1:])
        assert torch.allclose(shortcut, model(**batch).logits, atol=1e-4)


def test_quick_heads_read_every_layer():
    heads = PatchHeads(32)
    hidden = tuple(torch.randn(2, 65, 32) for _ in range(5))
    assert [tuple(out.shape) for out in heads.read(hidden)] == [(2, 64, 29), (2, 64, 29)]


def test_a_wrong_number_of_kept_pictures_is_named(tmp_path: Path):
    quick = replace(train.QUICK, pictures=4)
    train.Trainer(tmp_path, quick).pictures()
    with pytest.raises(ValueError, match="holds 4 pictures, wanted are 5"):
        train.Trainer(tmp_path, replace(quick, pictures=5)).pictures()
