"""InternVL beside what every model promises: its tower's account, tiles and their pixels, its processor, its files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases_internvl import config, inputs, random_internvl
from model_battery import random_model
from PIL import Image
from random_models import IMAGE
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from llava_lens import HookedMLLM
from llava_lens.analysis import Patches, knock_out, patch, tower_attribution, tower_lens, visual_words
from llava_lens.errors import LensError
from llava_lens.maps import importance_map
from llava_lens.models.internvl import HookedInternVL, InternVLConfig
from llava_lens.sweep import logit

SIDE = 32
WORDS = {0: "<pad>", 2: "</s>", 3: "<unk>", 88: "<img>", 89: "</img>", IMAGE: "<IMG_CONTEXT>", 91: "<video>"}
MARKS = {"start": "<img>", "end": "</img>", "context": "<IMG_CONTEXT>"}
TEMPLATE = (
    "{% for m in messages %}w10 w11 {% for c in m['content'] %}{% if c['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} w13\n{% endfor %}"
    "{% if add_generation_prompt %}w10 w12 {% endif %}"
)
SIZES = ((64, 32), (40, 90), (33, 31), (97, 61))
ODD: dict[str, dict[str, Any]] = {
    "inner layer": {"vision_feature_layer": -2, "use_mean_pooling": False},
    "positive layer": {"vision_feature_layer": 2},
    "query and key norms": {"use_qk_norm": True},
    "RMS norms": {"norm_type": "rms_norm", "layer_norm_eps": 1e-3},
    "attention bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True, "text": {"tie_word_embeddings": True}},
    "tied at the top alone": {"tie_word_embeddings": True},
    "tied below alone": {"text": {"tie_word_embeddings": True}},
    "mask token": {"use_mask_token": True},
    "four by four": {"downsample_ratio": 0.25},
    "other activations": {"projector_hidden_act": "relu", "hidden_act": "gelu_pytorch_tanh"},
    "Llama": {"decoder": "llama"},
}


class WithoutVideos(InternVLProcessor):
    """The processor of transformers; its check of the video processor asks for torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


@cache
def tokenizer() -> Any:
    words = {WORDS.get(i, f"w{i}"): i for i in range(97)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra = {f"{name}_image_token": word for name, word in MARKS.items()} | {"video_token": "<video>"}
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=extra)
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=["input_ids", "attention_mask"], **special)


@cache
def processor(max_patches: int = 6) -> Any:
    images = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_patches=max_patches)
    return WithoutVideos(images, tokenizer(), image_seq_length=4, chat_template=TEMPLATE)


@cache
def model(max_patches: int = 6) -> Any:
    return HookedMLLM.from_hf(random_internvl(), processor(max_patches))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


# ---- logits


@torch.no_grad()
@pytest.mark.parametrize("odd", ODD)
def test_odd_configurations_are_hugging_faces_to_the_bit(odd: str) -> None:
    hf = random_model(InternVLForConditionalGeneration, config(**ODD[odd]), "sdpa", torch.float32)
    ours = HookedMLLM.from_hf(hf)
    for images, pad in (((1, 2), "left"), ((2, 0, 1), "right")):
        given = inputs(hf, images, pad)
        seen = given["attention_mask"].bool()
        assert torch.equal(ours(**given)[seen], hf(**given).logits[seen])


@torch.no_grad()
@pytest.mark.parametrize("odd", ["inner layer", "query and key norms", "RMS norms", "four by four"])
def test_bytes_are_told_before_a_run(odd: str) -> None:
    hf = random_model(InternVLForConditionalGeneration, config(**ODD[odd]), "sdpa", torch.float32)
    ours, given = HookedMLLM.from_hf(hf), inputs(hf)
    for path in ("reference", "fused"):
        with ours.use(path):
            for how in ({}, {"dtype": torch.bfloat16}, {"pos_slice": -1, "vision_pos_slice": slice(1, 3)}):
                assert ours.cache_bytes(**given, **how) == ours.run_with_cache(**given, **how)[1].nbytes


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_feature_layer": [-1, -2]},
        {"use_mean_pooling": False},
        {"use_absolute_position_embeddings": False},
        {"vision_feature_select_strategy": "full"},
        {"downsample_ratio": 1.0},
        {"downsample_ratio": 0.3},
    ],
    ids=lambda changes: "".join(map(str, changes)),
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}.*expected"):
        InternVLConfig.from_hf(config(**changes))


def test_another_decoder_is_refused() -> None:
    hf = config()
    hf.text_config = Qwen3Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    with pytest.raises(ValueError, match=r"qwen3.*expected"):
        InternVLConfig.from_hf(hf)


# ---- the tower's account


@torch.no_grad()
def test_heads_neurons_and_biases_of_the_scaled_tower_sum_to_its_stream() -> None:
    ours, given = model(), inputs(random_internvl())
    _, cache = ours.run_with_cache(**given)
    for layer, block in enumerate(ours.vision.blocks):
        added, written = cache.vision["attn_out", layer], cache.vision["mlp_out", layer]
        heads = cache.vision["result", layer].sum(2) + block.attn.b_O
        again = torch.einsum("bphd,hde->bpe", cache.vision["z", layer], block.attn.W_O) + block.attn.b_O
        neurons = cache.vision["post", layer] @ block.mlp.W_out + block.mlp.b_out
        for got, true in ((heads, added), (again, added), (neurons, written)):
            torch.testing.assert_close(got, true, atol=1e-5, rtol=1e-5)
        before, between, after = (cache.vision[f"resid_{name}", layer] for name in ("pre", "mid", "post"))
        assert torch.equal(before + added, between) and torch.equal(between + written, after)
    published = random_internvl().model.vision_tower.encoder.layer
    biases = sum(b.lambda_1 * b.attention.projection_layer.bias + b.lambda_2 * b.mlp.fc2.bias for b in published)
    torch.testing.assert_close(ours.vision.accumulated_bias(3), biases)


@torch.no_grad()
def test_an_edit_of_a_towers_head_moves_the_stream_by_what_it_says() -> None:
    ours, given = model(), inputs(random_internvl())
    name = "vision.blocks.1.attn.hook_result"
    plain = ours.run_with_cache(**given)[1]

    def double(act: torch.Tensor, hook: Any) -> None:
        act[:, :, 2] *= 2

    with ours.hooks(fwd_hooks=[(name, double)]):
        moved = ours.run_with_cache(**given)[1]
    change = moved.vision["attn_out", 1] - plain.vision["attn_out", 1]
    torch.testing.assert_close(change, plain.vision["result", 1][:, :, 2], atol=1e-5, rtol=1e-5)


def test_an_account_through_merged_patches_is_refused() -> None:
    given = model().prepare("w20 w21", picture(64, 32))
    with torch.no_grad():
        _, cache = model().run_with_cache(given)
    with pytest.raises(LensError, match="InternVLProjector behind"):
        tower_attribution(cache, 5)


# ---- the processor, tiles and their pixels


@torch.no_grad()
def test_prepare_is_hugging_faces_processor() -> None:
    images = [picture(*size) for size in SIZES]
    rows = [("w20 w21", images[:1]), ("w30", images[1:3]), ("w31 w20 w22", [images[3]])]
    said = [
        processor().apply_chat_template(
            [{"role": "user", "content": [*[{"type": "image"}] * len(shown), {"type": "text", "text": words}]}],
            add_generation_prompt=True,
        )
        for words, shown in rows
    ]
    true = processor()(images=[shown for _, shown in rows], text=said, return_tensors="pt", padding=True)
    ours = model().prepare([words for words, _ in rows], [shown for _, shown in rows])
    assert torch.equal(ours.tokens, true["input_ids"]) and torch.equal(ours.pixels, true["pixel_values"])
    assert torch.equal(ours.attention_mask, true["attention_mask"])
    seen, hf = true["attention_mask"].bool(), random_internvl()
    assert torch.equal(model()(**true)[seen], hf(**true).logits[seen])
    assert torch.equal(model()(ours)[seen], hf(**model().for_hf(ours)).logits[seen])


@torch.no_grad()
def test_words_marks_and_tiles_have_their_roles() -> None:
    given = model().prepare("w20 w21", [picture(64, 32), picture(20, 20)])
    roles = given.roles_of()
    assert (roles.n_images, roles.n_sources) == (4, 2)  # two tiles and the whole, then an image too small to be cut
    assert [roles.tokens[i] for i in given.positions_of("w21")] == ["w21"]
    marks = [roles.labels[i] for i, token in enumerate(roles.tokens) if token in ("<img>", "</img>")]
    assert marks == ["template"] * 4
    every = [roles.patch_of(int(at)) for at in given.positions("image")]
    assert every == [(tile, row, col) for tile in range(4) for row in range(2) for col in range(2)]
    assert [roles.region(i) for i in range(4)] == [(0, 0, 32, 32), (32, 0, 64, 32), (0, 0, 64, 32), (0, 0, 20, 20)]


@pytest.mark.parametrize("size", [(64, 32), (32, 96), (96, 64)])
def test_painting_a_token_of_a_tile_changes_its_pixel_values_alone(size: tuple[int, int]) -> None:
    plain = model().prepare("w20", picture(*size))
    roles, tiles = plain.roles_of(), plain.roles_of().n_images - 1
    assert tiles == size[0] * size[1] // SIDE**2
    for tile, row, col in ((0, 0, 1), (tiles - 1, 1, 0), (tiles // 2, 1, 1)):
        painted = np.array(picture(*size))
        left, top, right, bottom = (int(edge) for edge in roles.box_of_patch(row, col, tile))
        painted[top:bottom, left:right] ^= 255
        moved = (model().prepare("w20", Image.fromarray(painted)).pixels != plain.pixels).any(1)
        expected = torch.zeros_like(moved[:-1])
        box = roles.picture(tile).box(row, col, 16)
        expected[tile, *box] = True
        assert torch.equal(moved[:-1], expected)
        whole = roles.patch_of_pixel((left + right) // 2, (top + bottom) // 2, tiles)
        assert whole is not None and bool(moved[-1, *roles.picture(tiles).box(*whole, 16)].any())


@pytest.mark.parametrize("size", SIZES)
def test_painting_what_a_token_shows_of_a_resized_image_stays_near_it(size: tuple[int, int]) -> None:
    plain = model().prepare("w20", Image.new("RGB", size, (90, 120, 60)))
    roles = plain.roles_of()
    for tile in range(roles.n_images):
        here = roles.to_original(np.eye(2)[:, [0, 1]] == 1, tile) == 1  # the tokens (0, 0) and (1, 1)
        painted = np.array(Image.new("RGB", size, (90, 120, 60)))
        painted[here] = (200, 10, 250)
        moved = (model().prepare("w20", Image.fromarray(painted)).pixels != plain.pixels).any(1)[tile]
        width = [axis.padded / axis.resized for axis in (roles.map(tile).y, roles.map(tile).x)]
        reach = [3 if each >= 1 else 2 + int(2 / each) for each in width]  # a cubic looks at four pixels of the larger
        own = [roles.picture(tile).box(at, at, 16) for at in (0, 1)]
        near, inner = torch.zeros_like(moved), torch.zeros_like(moved)
        for box in own:
            wide = [slice(max(at.start - r, 0), at.stop + r) for at, r in zip(box, reach, strict=True)]
            slim = [slice(at.start + r, at.stop - r) for at, r in zip(box, reach, strict=True)]
            near[*wide], inner[*slim] = True, True
        assert bool(moved[inner].all()) and not bool(moved[~near].any())


def test_one_tile_at_most_is_the_image_whole() -> None:
    given = model(1).prepare("w20", picture(64, 32))
    assert given.roles_of().n_images == 1 and given.roles_of().region() == (0, 0, 64, 32)
    true = processor(1)(images=[picture(64, 32)], text="<IMG_CONTEXT>", return_tensors="pt")
    assert torch.equal(given.pixels, true["pixel_values"])


def test_another_size_than_the_towers_is_refused() -> None:
    images = GotOcr2ImageProcessorPil(size={"height": 48, "width": 48})
    ours = HookedMLLM.from_hf(random_internvl(), WithoutVideos(images, tokenizer(), chat_template=TEMPLATE))
    with pytest.raises(LensError, match="48×48; expected 32×32"):
        ours.prepare("w20", picture(64, 32))


# ---- tools, against runs by hand


@torch.no_grad()
def test_patches_and_knock_outs_are_full_runs() -> None:
    ours = model()
    clean, other = (ours.prepare("w20 w21", picture(64, 32, seed)) for seed in (0, 1))
    source = ours.run_with_cache(clean)[1]

    def restored(name: str, at: Any, image: int | None = None) -> float:
        def restore(act: torch.Tensor, hook: Any) -> None:
            row = 0 if image is None else image
            act[row, at] = source[hook.name][row, at]

        return float(ours.run_with_hooks(other, fwd_hooks=[(name, restore)])[0, -1, 5])

    how: dict[str, Any] = {"metric": logit(5), "progress": False}
    whole = patch(ours, clean, other, "resid_pre", ("layer", "patch"), image=2, **how).values
    at = clean.roles_of().token_of(1, 0, 2)
    assert abs(float(whole[1, 1, 0]) - restored("blocks.1.hook_resid_pre", at)) < 1e-4
    tower = patch(ours, clean, other, "vision.resid_pre", ("layer", "position"), at=(7,), image=1, **how).values
    assert abs(float(tower[2, 7]) - restored("vision.blocks.2.hook_resid_pre", 7, 1)) < 1e-4
    joined = patch(ours, clean, other, "projector.hook_in", ("patch",), image=1, **how).values
    assert tuple(joined.shape) == (2, 2)
    assert abs(float(joined[1, 0]) - restored("projector.hook_in", 2, 1)) < 1e-4
    mask = np.array([[False, True], [False, False]])
    several = patch(ours, clean, other, "vision.resid_pre", ("layer",), at=Patches(mask, image=1), image=1, **how)
    four = [1 + row * 4 + col for row in (0, 1) for col in (2, 3)]  # of 4 × 4 patches, behind the class token
    assert abs(float(several.values[1]) - restored("vision.blocks.1.hook_resid_pre", four, 1)) < 1e-4
    block = clean.positions("image", 2)
    found = knock_out(ours, clean, "last", block.tolist(), **how).values

    def blind(act: torch.Tensor, hook: Any) -> None:
        act[:, :, -1, block] = -torch.inf

    hidden = [(f"blocks.{layer}.attn.hook_attn_scores", blind) for layer in range(3)]
    assert abs(float(found) - float(ours.run_with_hooks(clean, fwd_hooks=hidden)[0, -1, 5])) < 1e-4


def test_occlusion_of_a_tile_is_full_runs() -> None:
    ours = model()
    given = ours.prepare("w20 w21", picture(64, 32))
    found = importance_map(ours, given, "occlusion", answer=5, image=1, operator="pixel", progress=False).values
    assert tuple(found.shape) == (2, 2)
    pixels = given.pixels.clone()
    pixels[1, :, 16:, :16] = given.pixels[1].mean((-2, -1))[:, None, None]
    with torch.no_grad():
        said = [ours(given.tokens, pixel_values=each)[0, -1].log_softmax(-1)[5] for each in (given.pixels, pixels)]
    assert abs(float(found[1, 0]) - float(said[0] - said[1])) < 1e-4


@pytest.mark.parametrize("through", ["tower", "both"])
def test_relevancy_through_the_tower_goes_to_the_merged_patches(through: str) -> None:
    """By hand: patterns and their gradients from autograd, whole matrices instead of one row."""
    ours = model()
    given = ours.prepare("w20 w21", picture(64, 32))
    found = importance_map(ours, given, "relevancy", answer=5, image=1, through=through, progress=False).values
    names = [f"{stack}blocks.{i}.attn.hook_pattern" for stack in ("vision.", "") for i in range(3)]
    kept: dict[str, torch.Tensor] = {}

    def keep(act: torch.Tensor, hook: Any) -> torch.Tensor:
        kept[hook.name] = act.requires_grad_() if not act.requires_grad else act
        return kept[hook.name].view_as(act)

    with ours.hooks(fwd_hooks=[(name, keep) for name in names]), torch.enable_grad():
        aim = ours(given)[0, -1, 5]
        grads = dict(zip(names, torch.autograd.grad(aim, [kept[name] for name in names]), strict=True))

    def rollout(stack: str, sample: int) -> torch.Tensor:
        total = torch.eye(kept[f"{stack}blocks.0.attn.hook_pattern"].shape[-1])
        for name in names[:3] if stack else names[3:]:
            total = total + (kept[name] * grads[name])[sample].relu().mean(0) @ total
        return total

    squares = [[1 + 4 * (2 * r + y) + 2 * c + x for y in (0, 1) for x in (0, 1)] for r in (0, 1) for c in (0, 1)]
    tokens = rollout("", 0)[-1, given.positions("image", 1)] if through == "both" else torch.full((4,), 0.25)
    tower, merge = rollout("vision.", 1), torch.zeros(4, 17)
    for token, square in enumerate(squares):
        merge[token, square] = 1.0
    true = merge @ ((tokens / 4) @ merge @ tower)
    torch.testing.assert_close(found.flatten(), true.detach(), atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_the_towers_last_layer_read_as_words_is_what_the_decoder_gets() -> None:
    given = model().prepare("w20 w21", picture(64, 32))
    _, cache = model().run_with_cache(given)
    layers, last = (lens(cache, answer=5, image=2).values for lens in (tower_lens, visual_words))
    assert tuple(layers.shape) == (4, 2, 2, 5) and torch.equal(layers[-1], last)


# ---- files


@torch.no_grad()
@pytest.mark.parametrize("layout", ["saved by transformers 5", "the first hub files"])
def test_a_folder_gives_model_and_processor(layout: str, tmp_path: Path) -> None:
    hf = random_internvl()
    hf.save_pretrained(tmp_path)
    if layout != "saved by transformers 5":
        spelt = {
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.": "",
        }
        weights = {}
        for name, weight in hf.state_dict().items():
            old, new = next((old, new) for old, new in spelt.items() if name.startswith(old))
            weights[new + name.removeprefix(old)] = weight.clone()
        (tmp_path / "model.safetensors").unlink()
        save_file(weights, tmp_path / "model.safetensors")
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    settings = processor().image_processor.to_dict() | {"image_processor_type": "GotOcr2ImageProcessorFast"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    ours = HookedMLLM.from_pretrained(tmp_path)
    assert type(ours) is HookedInternVL
    got, true = (each.prepare("w20 w21", picture(40, 90)) for each in (ours, model()))
    assert all(torch.equal(got[name], true[name]) for name in ("input_ids", "pixel_values"))
    assert torch.equal(ours(got), hf(**model().for_hf(true)).logits)


@torch.no_grad()
def test_an_unembedding_of_its_own_is_kept_though_the_outer_config_says_tied(tmp_path: Path) -> None:
    random_internvl().save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    del facts["tie_word_embeddings"]  # as the first releases were saved; transformers reads it as true
    (tmp_path / "config.json").write_text(json.dumps(facts))
    from llava_lens.weights import load_weights, open_checkpoint

    checkpoint = open_checkpoint(tmp_path, families=("internvl",))
    assert checkpoint.config.tie_word_embeddings
    with torch.device("meta"):
        ours = HookedInternVL(InternVLConfig.from_hf(checkpoint.config))
    load_weights(ours, checkpoint, table=HookedInternVL.weight_table)
    hf = InternVLForConditionalGeneration.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([[5, 9, 14]])
    assert torch.equal(ours.ready()(tokens), hf(input_ids=tokens).logits)


def test_a_missing_and_an_unknown_weight_are_one_error_each() -> None:
    from llava_lens.weights import MissingWeights, UnknownWeights, assign_state_dict

    weights = dict(random_internvl().state_dict())
    name = "model.vision_tower.encoder.layer.1.lambda_2"
    lost = {each: weight for each, weight in weights.items() if each != name}
    with torch.device("meta"):
        bare = HookedInternVL(InternVLConfig.from_hf(config()))
    with pytest.raises(MissingWeights, match="lambda_2"):
        assign_state_dict(bare, lost, HookedInternVL.weight_table)
    with pytest.raises(UnknownWeights, match="lambda_3"):
        assign_state_dict(bare, weights | {name.replace("_2", "_3"): weights[name]}, HookedInternVL.weight_table)
