"""What is special to Idefics3 and SmolVLM: tiles and their maps, their prompts, black pictures, options refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from cases_idefics3 import CASES, config, inputs
from PIL import Image
from random_models import IMAGE, TEXT
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SmolVLMImageProcessorPil,
)

from llava_lens import HookedMLLM, explain
from llava_lens.analysis import knock_out, patch, tower_attribution, tower_lens, visual_words
from llava_lens.analysis.interventions.where import Patches
from llava_lens.errors import LensError
from llava_lens.maps import importance_map
from llava_lens.models.idefics3 import HookedIdefics3, Idefics3Images
from llava_lens.plots import explanation_png
from llava_lens.sweep import logit
from llava_lens.weights import assign_state_dict

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


EXPANDED = {"<fake_token_around_image>", "<global-img>", *(f"<row_{n // 4 + 1}_col_{n % 4 + 1}>" for n in range(16))}


def processor(**changes: Any) -> Any:
    """Transformers' own, with small tiles and no download."""
    settings: dict[str, Any] = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}} | changes
    tokens = (SIDE // PATCH // SCALE) ** 2
    return Idefics3Processor(Idefics3ImageProcessorPil(**settings), tokenizer(), tokens, TEMPLATE)


@cache
def model(kind: str = "idefics3") -> Any:
    found = next(case for case in CASES if case.name.startswith(kind))
    return HookedMLLM.from_hf(found.plain, processor())


def images_of(hf: Any) -> Any:
    """Our image processor around transformers' own."""
    return Idefics3Images(getattr(hf, "image_processor", hf), SIDE, PATCH * SCALE)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_a_batch_is_prepared_as_hugging_face_does():
    questions = ["w10 w11", "w12", "w13 w14 w15"]
    images = [[picture(70, 40), picture(20, 50, 1)], [picture(33, 33, 2)], [picture(300, 90, 3)]]
    prompts = [
        tokenizer().apply_chat_template(
            [{"role": "user", "content": [*[{"type": "image"}] * len(row), {"type": "text", "text": question}]}],  # type: ignore[arg-type]
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
    assert roles.n_sources == 2 and roles.n_images == 14  # 2 × 3 tiles and the whole, 3 × 2 tiles and the whole
    marks = [label for label, token in zip(roles.labels, roles.tokens, strict=True) if token in EXPANDED]
    assert len(marks) > 17 and set(marks) == {"template"}
    assert [roles.tokens[i] for i in roles.positions_of("w11")] == ["w11"]


@pytest.mark.parametrize("size", [(70, 40), (32, 32), (20, 200)])
def test_smolvlms_marks_are_its_own_processors(size):
    """Its processor of transformers asks for a package for videos; the function that it writes images with does not."""
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    ours = model("smolvlm").processor
    settings = SmolVLMImageProcessorPil(size={"longest_edge": 3 * SIDE}, max_image_size={"longest_edge": SIDE})
    layout = images_of(settings).layout(size, model("smolvlm").cfg)
    rows, cols = layout.tiles
    true = get_image_prompt_string(rows, cols, 4, "<fake_token_around_image>", "<image>", "<global-img>")
    assert ours.expansion(layout) == true


def test_a_picture_knows_its_tokens_by_tile_row_and_column():
    roles = model().prepare("w10", picture(96, 64)).roles_of()
    for tile in range(7):
        name = "<global-img>" if tile == 6 else f"<row_{tile // 3 + 1}_col_{tile % 3 + 1}>"
        first = roles.token_of(0, 0, tile)
        assert roles.tokens[first - 1] == name and roles.grid(tile) == (2, 2)
        assert roles.positions("image", tile).tolist() == list(range(first, first + 4))
        assert roles.patch_of(first + 3) == (tile, 1, 1)


@pytest.mark.parametrize("size", [(96, 64), (48, 32), (192, 128), (64, 96), (32, 32)])
def test_painting_one_box_changes_one_tokens_pixels(size):
    """Without a filter that blends neighbours, and at whole-numbered scales, the map is exact."""
    edge = {"size": {"longest_edge": SIDE}} if size == (32, 32) else {}
    images = images_of(processor(resample=0, **edge))
    layout, plain = images.layout(size, model().cfg), Image.new("RGB", size, (9, 9, 9))
    before = images.pixels([plain])
    for number, shown in enumerate(layout.pictures):
        for row, col in np.ndindex(shown.grid):
            assert shown.map is not None
            left, top, right, bottom = (int(edge) for edge in shown.map.box_of_patch(row, col))
            painted = plain.copy()
            painted.paste((250, 0, 90), (left, top, right, bottom))
            changed = (images.pixels([painted])[number] != before[number]).any(0)
            true = np.zeros_like(changed)
            true[shown.box(row, col, PATCH * SCALE)] = True
            assert np.array_equal(changed, true)
            assert shown.map.patch_of_pixel((left + right) // 2, (top + bottom) // 2) == (row, col)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_resize": False},
        {"do_image_splitting": False},
        {"size": {"height": 70, "width": 50}},
        {"size": {"longest_edge": 40}},
    ],
)
def test_an_image_is_cut_into_as_many_tiles(changes):
    images, numbers = images_of(processor(**changes)), np.random.default_rng(0)
    for _ in range(12):
        size = tuple(int(n) for n in numbers.integers(5, 130, 2))
        made = images.hf([picture(*size)], return_tensors="np", return_row_col_info=True)
        layout = images.layout(size, model().cfg)
        assert layout.tiles == (made["rows"][0][0], made["cols"][0][0])
        assert len(layout.pictures) == len(made["pixel_values"][0]) == len(images.pixels([picture(*size)]))
        assert made["pixel_attention_mask"].all()  # what the model refuses never comes from this processor


def test_a_folder_brings_its_class_and_its_processor(tmp_path):
    for kind, files in (("idefics3", Idefics3ImageProcessorPil), ("smolvlm", SmolVLMImageProcessorPil)):
        folder = tmp_path / kind
        model(kind).processor.tokenizer.save_pretrained(folder)
        next(case for case in CASES if case.name.startswith(kind)).plain.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        files(size={"longest_edge": 3 * SIDE}, max_image_size={"longest_edge": SIDE}).save_pretrained(folder)
        loaded = HookedMLLM.from_pretrained(folder)
        assert type(loaded) is HookedIdefics3 and loaded.cfg.original_architecture.lower().startswith(kind)
        ours, true = (each.prepare("w10 w11", picture(70, 40)) for each in (loaded, model(kind)))
        assert torch.equal(ours.tokens, true.tokens) and torch.equal(loaded(ours), model(kind)(true))


@pytest.mark.parametrize("name", ["idefics3", "siglip_vision_model", "smolvlm_vision"])
def test_what_files_of_the_hub_call_the_tower_says_nothing(name):
    facts = config("idefics3").to_dict()
    facts["vision_config"] |= {"model_type": name, "use_base_siglip": True}
    facts["text_config"] |= {"pixel_shuffle_factor": 2, "qk_layer_norms": False}
    read = Idefics3Config.from_dict(facts)
    assert type(read.vision_config) is type(config("idefics3").vision_config)  # transformers builds the same tower
    assert model().Config.from_hf(read).vision == model().Config.from_hf(config("idefics3")).vision


@torch.no_grad()
def test_right_padding_and_rows_without_pictures():
    case = CASES[1]
    for tiles, side in ((((3, 1), (1,)), "right"), (((2, 1), (), (1,)), "left"), (((), ()), "left")):
        given = inputs(case.plain, tiles, side)
        if not any(tiles):
            given = {name: given[name] for name in ("input_ids", "attention_mask")}
        seen = given["attention_mask"].bool()
        assert torch.equal(case.ours(**given)[seen], case.plain(**given).logits[seen])


@pytest.mark.parametrize("name", ["hook_features", "hook_scale", "hook_in", ""])
@torch.no_grad()
def test_cache_bytes_are_the_size(name):
    case = CASES[0]
    asked = lambda n: name in n  # noqa: E731
    for how in ({}, {"dtype": torch.float16}):
        _, cache = case.ours.run_with_cache(case.read, names_filter=asked, **how)
        storages = {act.untyped_storage().data_ptr(): act.untyped_storage() for act in cache.cache_dict.tensors()}
        held = sum(storage.nbytes() for storage in storages.values())
        assert case.ours.cache_bytes(case.read, names_filter=asked, **how) == held == cache.nbytes


@torch.no_grad()
def test_patches_are_patched_in_tower_projector_and_decoder():
    """A cell of each sweep against a full run with a hook by hand; the tower counts patches, the rest merged ones."""
    ours = model()
    clean, other = (ours.prepare("w10 w11", picture(70, 40, seed)) for seed in (0, 1))
    _, source = ours.run_with_cache(clean)
    tile = 2
    first = int(clean.positions("image")[4 * tile])
    for short, full, index in (
        ("vision.resid_post", "vision.blocks.1.hook_resid_post", (tile, 4 * 1 + 3)),
        ("projector.hook_in", "projector.hook_in", (tile, 3)),
        ("resid_pre", "blocks.1.hook_resid_pre", (0, first + 3)),
    ):
        how: dict[str, Any] = {"layers": 1} if short != full else {}
        found = patch(ours, clean, other, short, "patch", image=tile, metric=logit(5), progress=False, **how).values
        cell = (1, 3) if short.startswith("vision") else (1, 1)
        assert tuple(found.shape[-2:]) == ((4, 4) if short.startswith("vision") else (2, 2))

        def restore(act: torch.Tensor, hook: Any, index: Any = index) -> None:
            act[index] = source[hook.name][index]

        true = float(ours.run_with_hooks(other, fwd_hooks=[(full, restore)])[0, -1, 5])
        assert float(found[cell]) == pytest.approx(true, abs=1e-4)


@torch.no_grad()
def test_an_object_in_the_tower_is_all_patches_of_its_tokens():
    ours = model()
    clean, other = (ours.prepare("w10 w11", picture(70, 40, seed)) for seed in (0, 1))
    _, source = ours.run_with_cache(clean)
    chosen = np.array([[False, False], [True, False]])
    at = Patches(chosen, image=1)
    found = patch(
        ours, clean, other, "vision.resid_post", (), at=at, layers=0, image=1, metric=logit(5), progress=False
    )

    def restore(act: torch.Tensor, hook: Any) -> None:
        act[1, [8, 9, 12, 13]] = source[hook.name][1, [8, 9, 12, 13]]

    true = ours.run_with_hooks(other, fwd_hooks=[("vision.blocks.0.hook_resid_post", restore)])[0, -1, 5]
    assert float(found.values) == pytest.approx(float(true), abs=1e-4)


@torch.no_grad()
def test_a_tile_is_knocked_out():
    ours = model()
    given = ours.prepare("w10 w11", picture(70, 40))
    tile = given.roles_of().positions("image", 2).tolist()
    found = knock_out(ours, given, "last", tile, sweep="layer", metric=logit(5), progress=False).values

    def cut(act: torch.Tensor, hook: Any) -> None:
        act[0, :, -1, tile] = -torch.inf

    for layer in range(ours.cfg.n_layers):
        true = ours.run_with_hooks(given, fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", cut)])[0, -1, 5]
        assert float(found[layer]) == pytest.approx(float(true), abs=1e-4)


def test_relevancy_goes_through_merged_patches():
    """Against the same rule written out: a token gives its four patches a quarter each, and gets back their sum."""
    ours, tile = model(), 1
    given = ours.prepare("w10 w11", picture(70, 40))
    found = importance_map(ours, given, "relevancy", answer=5, image=tile, through="both", progress=False).values
    patterns: dict[str, torch.Tensor] = {}

    def keep(act: torch.Tensor, hook: Any) -> torch.Tensor:
        patterns[hook.name] = act
        return act.view_as(act)

    with ours.hooks(fwd_hooks=[(lambda name: name.endswith("hook_pattern"), keep)]):
        score = ours(given)[0, -1, 5]
    grads = dict(zip(patterns, torch.autograd.grad(score, list(patterns.values())), strict=True))

    def weights(prefix: str, layer: int, row: int) -> torch.Tensor:
        name = f"{prefix}blocks.{layer}.attn.hook_pattern"
        return (grads[name] * patterns[name]).clamp(min=0).mean(1)[row].double()

    decoder = torch.eye(given.n_pos, dtype=torch.double)
    for layer in range(ours.cfg.n_layers):
        decoder = decoder + weights("", layer, 0) @ decoder
    tower = torch.eye(16, dtype=torch.double)
    for layer in range(ours.cfg.vision.n_layers):
        tower = tower + weights("vision.", layer, tile) @ tower
    groups = torch.tensor(
        [[4 * (2 * r + i) + 2 * c + j for i in (0, 1) for j in (0, 1)] for r in (0, 1) for c in (0, 1)]
    )
    patches = torch.zeros(16, dtype=torch.double)
    patches[groups] = decoder[-1, given.roles_of().positions("image", tile)][:, None] / 4
    true = (patches @ tower)[groups].sum(1).reshape(2, 2)
    assert torch.allclose(found.double(), true, rtol=1e-4)


@torch.no_grad()
def test_the_tower_is_read_as_words_and_its_account_refused():
    cache = model().run_with_cache(model().prepare("w10", picture(70, 40)))[1]
    assert torch.equal(tower_lens(cache, image=2).scores.values[-1], visual_words(cache, image=2).scores.values)
    with pytest.raises(LensError, match="PixelShuffle behind Idefics3Vision; expected a projector of two layers"):
        tower_attribution(cache, 5)


@pytest.mark.slow
@torch.no_grad()
def test_an_answer_is_explained_and_drawn():
    image = picture(70, 40)
    told = explain(model(), model().prepare("w10 w11", image), image=3, by="head", max_new_tokens=1, progress=False)
    assert tuple(told.map.values.shape) == (2, 2) and len(explanation_png(told, image)) > 10_000


def test_what_is_not_computed_is_refused():
    read = model().Config.from_hf
    with pytest.raises(ValueError, match="a grid of 4 × 4 patches and scale_factor 3"):
        read(config("idefics3", 3))
    wrong = config("idefics3")
    wrong.text_config = Qwen2Config(**TEXT)
    with pytest.raises(ValueError, match="a decoder of 'gemma'"):
        wrong.text_config.model_type = "gemma"  # type: ignore[misc]
        read(wrong)
    given = inputs(CASES[0].plain)
    given["pixel_attention_mask"][0, 0, 20:] = 0
    with pytest.raises(LensError, match="pixel_attention_mask leaves out parts of a picture"):
        CASES[0].ours(**given)
    with pytest.raises(LensError, match="the image processor makes tiles of 64×64; expected 32"):
        images_of(processor(max_image_size={"longest_edge": 64})).layout((50, 50), model().cfg)
    with pytest.raises(LensError, match="videos are not read"):
        model().prepare("<video> w10")
    with pytest.raises(LensError, match="expected Idefics3ImageProcessor or SmolVLMImageProcessor"):
        images_of({"image_processor_type": "CLIPImageProcessor"})


def test_weights_that_do_not_fit_are_named():
    state = CASES[1].plain.state_dict()
    key = "model.connector.modality_projection.proj.weight"
    for changed, told in (
        ({name: tensor for name, tensor in state.items() if name != key}, f"missing: .*published as {key}"),
        ({**state, "model.connector.norm.weight": state[key]}, "unknown: 'model.connector.norm.weight'"),
        ({**state, key: state[key][:, :-1]}, f"{key}' has shape"),
        ({n: t for n, t in state.items() if "post_layernorm.bias" not in n}, "missing: vision.ln_post.bias"),
    ):
        with torch.device("meta"):
            empty = HookedIdefics3(model().cfg)
        with pytest.raises(LensError, match=told):
            assign_state_dict(empty, changed, HookedIdefics3.weight_table)
