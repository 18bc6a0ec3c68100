"""LLaVA-NeXT, LLaVA-OneVision and ViP-LLaVA: what their tiles, marks and norms add to what every model promises."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import cases_llava_next as next_cases
import cases_llava_onevision as one_cases
import numpy as np
import pytest
import torch
from model_battery import random_model
from PIL import Image
from random_models import IMAGE, ROPES
from safetensors.torch import save_file
from tiles import PATCH, SIDE, TEXT, both, photo, processor
from torch import Tensor
from transformers import (
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)
from word_tokenizer import word_tokenizer

from llava_lens import HookedMLLM
from llava_lens.checkpoint import open_checkpoint
from llava_lens.errors import LensError
from llava_lens.inputs import standing
from llava_lens.models.llava_next import HookedLlavaNext, LlavaNextConfig, Tiled
from llava_lens.models.llava_onevision import HookedLlavaOnevision, LlavaOnevisionConfig
from llava_lens.models.vipllava import HookedVipLlava
from llava_lens.weights import load_weights

SHAPES = [(48, 48), (30, 61), (90, 31), (200, 7), (7, 201), (5, 5), (301, 299), (72, 25), (33, 100)]
SLOW = pytest.mark.slow


# ---- layouts


@pytest.mark.parametrize("family", ["next", "one"])
def test_tokens_are_packed_as_hugging_face_packs_them(family: str) -> None:
    hf, model = both(family)
    generator = torch.Generator().manual_seed(0)
    how: dict[str, Any] = {"vision_feature_select_strategy": "default"} if family == "next" else {}
    how |= {"vision_aspect_ratio": "anyres_max_4"} if family == "one" else {}
    mixed = 0
    for height, width in SHAPES:
        layout = model.cfg.layout((width, height))
        image = torch.randn(len(layout.pictures), 9, 64, generator=generator)
        sizes = torch.tensor([[height, width]])
        (true,), _ = hf.model.pack_image_features([image], sizes, image_newline=hf.model.image_newline, **how)
        with torch.no_grad():
            assert torch.equal(model.pack(image, layout), true), (height, width)
        told = processor(family)._get_number_of_features(height, width, SIDE, SIDE) - (family == "next")
        assert layout.n_tokens == len(true) == told
        mixed += layout.pictures[-1].mixed
    assert mixed == (3 if family == "one" else 0)


def test_every_token_but_the_line_ends_is_of_one_picture() -> None:
    for family, (height, width) in itertools.product(("next", "one"), SHAPES):
        layout = both(family)[1].cfg.layout((width, height))
        assert isinstance(layout, Tiled)
        ranks = [rank for picture in layout.pictures for rank in picture.ranks or ()]
        ends = [9 + (row + 1) * (layout.across.tokens + 1) - 1 for row in range(layout.down.tokens)]
        assert sorted(ranks + ends) == list(range(layout.n_tokens))


# ---- preparation


@pytest.mark.parametrize("family", ["next", "one", "vip"])
def test_preparing_is_hugging_faces_own(family: str) -> None:
    hf, model = both(family)
    images = [photo(30, 61), photo(100, 33), photo(50, 50)]
    texts = [TEXT, "w9 <image> w4 <image> w12"]
    rows = [images[:1], images[1:]]
    with torch.no_grad():
        for side in ("left", "right"):
            model.processor.tokenizer.padding_side = side
            given: Any = images if family == "vip" else rows
            theirs = processor(family)
            theirs.tokenizer.padding_side = side
            true = theirs(images=given, text=texts, return_tensors="pt", padding=True)
            ours = model.prepare(texts, rows, template=False, padding_side=side)
            read = model.read_inputs(**true)
            assert torch.equal(ours.tokens, true["input_ids"]) and torch.equal(
                ours.attention_mask, true["attention_mask"]
            )
            assert torch.equal(ours.pixels, read.pixels) and dict(ours.extras).keys() == dict(read.extras).keys()
            assert all(torch.equal(ours.extras[name], read.extras[name]) for name in ours.extras)
            seen = true["attention_mask"].bool()
            logits = hf(**true).logits[seen]
            assert torch.equal(model(**true)[seen], logits) and torch.equal(model(ours)[seen], logits)
            assert torch.equal(hf(**model.for_hf(ours)).logits[seen], logits)


def test_a_row_of_a_batch_is_as_alone() -> None:
    for family in ("next", "one"):
        model = both(family)[1]
        rows = [[photo(30, 61)], [photo(70, 71), photo(50, 50)], [photo(70, 71)]]
        texts = [TEXT, "w9 <image> w4 <image> w12", TEXT]
        batch = model.prepare(texts, rows, template=False)
        with torch.no_grad():
            for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
                one, cut = model.prepare(text, row, template=False), batch.row(i)
                assert torch.equal(one.tokens, cut.tokens) and one.roles == cut.roles
                assert torch.equal(one.pixels, cut.pixels)
                assert all(torch.equal(one.extras[name], cut.extras[name]) for name in one.extras)
                assert torch.equal(model(one), model(cut))


@pytest.mark.parametrize("family", ["next", "one"])
@pytest.mark.parametrize(
    "size", [(30, 61), *(pytest.param(size, marks=SLOW) for size in [(90, 31), (72, 25), (50, 50)])]
)
def test_every_pixel_value_comes_from_where_the_roles_say(family: str, size: tuple[int, int]) -> None:
    """Each pixel of the image says its own place in its colour, and is moved to the nearest without mixing."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    ids = Image.fromarray(np.stack((x + 1, y + 1, np.full_like(x, 255)), -1).astype(np.uint8))
    raw = processor(family, resample=Image.Resampling.NEAREST, do_rescale=False, do_normalize=False)
    model = HookedMLLM.from_hf(both(family)[0], raw)
    inputs = model.prepare(TEXT, ids, template=False)
    roles, seen = inputs.roles_of(), 0
    for image, (pixels, picture) in enumerate(zip(inputs.pixels.numpy(), roles.pictures, strict=True)):
        for row, col in itertools.product(*map(range, picture.grid)) if not picture.mixed else ():
            left, top, right, bottom = roles.box_of_patch(row, col, image)
            rows, cols = picture.box(row, col, PATCH)
            column, line, inside = pixels[:, rows, cols].astype(int)
            for v, u in np.argwhere(inside > 0):
                at_x, at_y = left + (right - left) * (u + 0.5) / PATCH, top + (bottom - top) * (v + 0.5) / PATCH
                assert column[v, u] - 1 in {int(at_x - 1e-9), int(at_x + 1e-9)}
                assert line[v, u] - 1 in {int(at_y - 1e-9), int(at_y + 1e-9)}
                seen += 1
    assert seen >= SIDE * SIDE


def test_painting_a_patch_changes_the_pixel_values_of_its_own_tokens_and_no_other() -> None:
    """At 48 × 48 no tile is resized; the whole view halves it, so that the box is mixed into one patch there."""
    model = both("next")[1]
    model = HookedMLLM.from_hf(both("next")[0], processor("next", resample=Image.Resampling.BOX))
    black = np.zeros((48, 48, 3), np.uint8)
    before = model.prepare(TEXT, Image.fromarray(black), template=False)
    for image, row, col in [(1, 0, 0), (2, 1, 2), (4, 2, 1)]:
        left, top, right, bottom = map(int, before.roles_of().box_of_patch(row, col, image))
        painted = black.copy()
        painted[top:bottom, left:right] = 200
        after = model.prepare(TEXT, Image.fromarray(painted), template=False)
        changed = (after.pixels != before.pixels).any(1)
        found = set()
        for number, picture in enumerate(before.roles_of().pictures):
            for r, c in itertools.product(*map(range, picture.grid)):
                part = changed[number, *picture.box(r, c, PATCH)]
                if bool(part.any()):
                    found.add((number, r, c))
                    assert number == 0 or bool(part.all())
        down, across = divmod(image - 1, 2)
        assert found == {(image, row, col), (0, (3 * down + row) // 2, (3 * across + col) // 2)}


def test_words_and_patches_of_tiles_are_found() -> None:
    model = both("next")[1]
    inputs = model.prepare(TEXT, photo(30, 61), template=False)
    roles = inputs.roles_of()
    tokenizer = model.processor.tokenizer
    assert [tokenizer.decode(inputs.tokens[0, int(at)]) for at in inputs.positions_of("w7")] == ["w7"]
    assert [roles.grid(i) for i in range(3)] == [(3, 3), (3, 2), (3, 3)] and roles.n_sources == 1
    ends = [at for at in roles.positions("image").tolist() if roles.patch_of(at) is None]
    newline = model.run_with_cache(inputs)[1]["hook_embed"][0, ends]
    assert torch.equal(newline, model.image_newline.expand_as(newline)) and len(ends) == 3


# ---- odd configurations

ODD: dict[str, dict[str, Any]] = {
    "wide heads": {"text": {"head_dim": 24}},
    "one key-value head": {"text": {"num_key_value_heads": 1}},
    "tied": {"tie_word_embeddings": True},
    "tied in the decoder's config alone": {"text": {"tie_word_embeddings": True}},
    "biases": {"text": {"attention_bias": True, "mlp_bias": True}},
    "several layers": {"vision_feature_layer": [-2, 1]},
    "one layer in a list": {"vision_feature_layer": [-2]},
    "bare projector": {"multimodal_projector_bias": False, "projector_hidden_act": "relu"},
    "long texts": {"text": {"rope_parameters": ROPES["dynamic"], "max_position_embeddings": 64}},
}


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD)
def test_logits_are_bit_equal_over_configurations(odd: str) -> None:
    for attention, dtype in itertools.product(("sdpa", "eager"), (torch.float32, torch.bfloat16)):
        hf = random_model(LlavaNextForConditionalGeneration, next_cases.config(**ODD[odd]), attention, dtype)
        model = HookedMLLM.from_hf(hf)
        for pad in ("left", "right"):
            given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in next_cases.inputs(hf, pad=pad).items()}
            seen = given["attention_mask"].bool()
            with torch.no_grad():
                assert torch.equal(model(**given)[seen], hf(**given).logits[seen]), (attention, dtype, pad)


def test_vip_llava_writes_its_own_prompt() -> None:
    model = both("vip")[1]
    text = model.processor.render("w5 w6", 1).text
    assert text.startswith("A chat between") and text.endswith("###Human: <image>\nw5 w6###Assistant:")


# ---- weights and refusals

SPELLINGS = {
    "of 2024": (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
                ("model.vision_tower.", "vision_tower.vision_model."), ("model.", "")),
    "in memory": (),
    "saved by transformers 5": (("model.language_model.", "language_model.model."),
                                ("lm_head.", "language_model.lm_head."), ("model.", "")),
}  # fmt: skip


def respelled(hf: Any, spelling: str) -> dict[str, Tensor]:
    def name(key: str) -> str:
        for ours, theirs in SPELLINGS[spelling]:
            if key.startswith(ours):
                return theirs + key.removeprefix(ours)
        return key

    return {name(key): value.contiguous().clone() for key, value in hf.state_dict().items()}


def loaded(folder: Path, kind: Any, hf: Any, weights: dict[str, Tensor]) -> Any:
    hf.config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder, families=kind.Config.families)
    with torch.device("meta"):
        model = kind(kind.Config.from_hf(checkpoint.config))
    load_weights(model, checkpoint, table=kind.weight_table, progress=False)
    return model.ready()


@pytest.mark.parametrize("spelling", ["of 2024", *(pytest.param(name, marks=SLOW) for name in list(SPELLINGS)[1:])])
def test_weights_load_in_every_spelling(spelling: str, tmp_path: Path) -> None:
    kinds = {"next": HookedLlavaNext, "one": HookedLlavaOnevision, "vip": HookedVipLlava}
    for family, kind in kinds.items():
        hf, ours = both(family)
        folder = tmp_path / family
        folder.mkdir()
        model = loaded(folder, kind, hf, respelled(hf, spelling))
        for (name, got), (other, true) in zip(model.named_parameters(), ours.named_parameters(), strict=True):
            assert name == other and torch.equal(got, true), name


def test_weights_that_are_missing_unknown_or_of_another_shape_are_named(tmp_path: Path) -> None:
    hf, _ = both("next")
    weights = respelled(hf, "of 2024")
    newline = weights.pop("image_newline")
    for bad, said in (
        ({}, "image_newline"),
        ({"image_newlines": newline}, "image_newlines"),
        ({"image_newline": newline[:5]}, "image_newline"),
    ):
        with pytest.raises(LensError, match=said):
            loaded(tmp_path, HookedLlavaNext, hf, {**weights, **bad})


@pytest.mark.parametrize("family", ["next", *(pytest.param(family, marks=SLOW) for family in ("one", "vip"))])
def test_a_folder_finds_its_class_and_its_processor(family: str, tmp_path: Path) -> None:
    hf, ours = both(family)
    hf.save_pretrained(tmp_path)
    if family == "one":  # no video processor to save
        parts = processor(family)
        parts.image_processor.save_pretrained(tmp_path)
        parts.tokenizer.save_pretrained(tmp_path)
    else:
        processor(family).save_pretrained(tmp_path)
    model = HookedMLLM.from_pretrained(tmp_path)
    assert type(model) is type(ours)
    got, true = (each.prepare(TEXT, photo(70, 71), template=False) for each in (model, ours))
    assert torch.equal(got.tokens, true.tokens) and torch.equal(got.pixels, true.pixels)
    assert torch.equal(model(got), ours(true))


def test_what_is_not_computed_is_refused() -> None:
    options: list[tuple[dict[str, Any], str]] = [
        ({"vision_feature_select_strategy": "full"}, "class token"),
        ({"image_grid_pinpoints": [[24, 40]]}, "multiples of 24"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints"),
    ]
    for changes, said in options:
        with pytest.raises(ValueError, match=said):
            LlavaNextConfig.from_hf(next_cases.config(**changes))
    with pytest.raises(ValueError, match="anyres_max_9"):
        LlavaOnevisionConfig.from_hf(one_cases.config(vision_aspect_ratio="pad"))
    _, model = both("next")
    given = next_cases.inputs(both("next")[0])
    for changes, said in (
        ({"image_sizes": None}, "image_sizes"),
        ({"image_sizes": given["image_sizes"][:2]}, "are cut into"),
        ({"image_sizes": given["image_sizes"].flip(0)}, "by row|are cut into"),
        ({"pixel_values": None}, "0 pictures"),
    ):
        with pytest.raises(LensError, match=said):
            model(**{**given, **changes})
    _, one = both("one")
    with pytest.raises(LensError, match="videos are not read"):
        one(torch.tensor([[1, 5]]), pixel_values_videos=torch.zeros(1))
    with pytest.raises(LensError, match="videos are not read"):
        one.prepare("w5 <video>", template=False)
    wrong = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    with pytest.raises(LensError, match="image_grid_pinpoints"):
        HookedMLLM.from_hf(both("next")[0], LlavaNextProcessor(wrong, word_tokenizer(), PATCH)).prepare(
            TEXT, photo(30, 61), template=False
        )


def test_cache_bytes_are_what_a_run_keeps() -> None:
    for family in ("next", "one", "vip"):
        model = both(family)[1]
        inputs = model.prepare(TEXT, photo(70, 71), template=False)
        _, cache = model.run_with_cache(inputs)
        assert model.cache_bytes(inputs) == cache.nbytes
        assert IMAGE in inputs.tokens
        assert len(standing(inputs, 0, model.cfg)) == inputs.n_images
