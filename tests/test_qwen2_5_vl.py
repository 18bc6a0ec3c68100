"""What is special to Qwen2.5-VL: pictures of any size, windows in the tower, three rotary axes, its processor."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases_qwen2_5_vl import CASES, config, inputs
from model_battery import random_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from llava_lens import HookedMLLM
from llava_lens.analysis import patch, tower_attribution, tower_lens
from llava_lens.analysis.interventions.where import Ground, Patches
from llava_lens.errors import LensError
from llava_lens.kv_cache import KVCache
from llava_lens.maps import importance_map
from llava_lens.models.qwen2_5_vl import QwenConfig
from llava_lens.sweep import logit
from llava_lens.sweep.rows import Row
from llava_lens.weights import CheckpointError

SPECIAL = {0: "<pad>", 1: "<|im_end|>", 2: "<|im_start|>", 3: "<unk>"}
SPECIAL |= {90: "<|image_pad|>", 91: "<|vision_start|>", 92: "<|vision_end|>", 93: "<|video_pad|>"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|> w5 {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> w6\n{% endif %}"
)
SIDE = 8
"""Pixels along one side of a token."""


class ImagesOnly(Qwen2_5_VLProcessor):
    """Hugging Face's processor without the video part, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


@cache
def processor() -> Any:
    words = {SPECIAL.get(i, f"w{i}"): i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=[SPECIAL[i] for i in (1, 2, 90, 91, 92, 93)],
    )
    size = {"shortest_edge": 200, "longest_edge": 2000}
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    return ImagesOnly(image_processor=images, tokenizer=fast, chat_template=TEMPLATE)


def hf_model() -> Any:
    return CASES[0].plain


@cache
def model() -> Any:
    return HookedMLLM.from_hf(hf_model(), processor())


def picture(seed: int, width: int = 61, height: int = 37) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def asked(n: int = 2) -> Any:
    """One question on `n` pictures of 61 × 37 pixels, 4 × 7 tokens each."""
    return model().prepare("w7 w8 w9", [picture(i) for i in range(n)])


# ---- the processor


def said_by_hf(questions: list[str], images: list[list[Image.Image]], side: str) -> Any:
    processor().tokenizer.padding_side = side
    chats = [
        [{"role": "user", "content": [*[{"type": "image"}] * len(row), {"type": "text", "text": question}]}]
        for question, row in zip(questions, images, strict=True)
    ]
    texts = [processor().apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    every = [each for row in images for each in row]
    return processor()(text=texts, images=every or None, return_tensors="pt", padding=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counts", [(1,), (1, 2), (1, 0), (0, 0)])
@torch.no_grad()
def test_prepared_inputs_are_hugging_faces(side: str, counts: tuple[int, ...]) -> None:
    questions = ["w7 w8 w9", "w10 w11 w12 w13 w14"][: len(counts)]
    images = [[picture(10 * i + j) for j in range(count)] for i, count in enumerate(counts)]
    theirs = said_by_hf(questions, images, side)
    ours = model().prepare(questions, images, padding_side=side)
    back = model().for_hf(ours)
    for name in {"input_ids", "pixel_values", "image_grid_thw"} & set(theirs):
        assert torch.equal(back[name], theirs[name]), name
    keep = theirs["attention_mask"].bool()
    true = hf_model()(**theirs).logits[keep]
    assert torch.equal(model()(ours)[keep], true) and torch.equal(model()(**theirs)[keep], true)
    if sum(counts):
        assert torch.equal(back["mm_token_type_ids"], theirs["mm_token_type_ids"])
    if side == "left":
        how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [90]}
        written = hf_model().generate(**theirs, **how, eos_token_id=None, pad_token_id=0)[:, -5:]
        assert torch.equal(model().generate(ours, 5, stop_tokens=())[:, -5:], written)


def test_a_patch_that_is_painted_changes_its_token_alone() -> None:
    plain = np.full((32, 56, 3), 100, np.uint8)
    before = model().prepare("w7", Image.fromarray(plain))
    roles = before.roles_of()
    vision = model().cfg.seeing(before.pixels).vision
    assert roles.grid() == (4, 7) and roles.image_size() == (56, 32) and vision.grid == (8, 14)
    for row, col in [(0, 0), (2, 3), (3, 6)]:
        x0, y0, x1, y1 = map(int, roles.box_of_patch(row, col))
        painted = plain.copy()
        painted[y0:y1, x0:x1] = 250
        after = model().prepare("w7", Image.fromarray(painted))
        moved = torch.zeros(32, 56, dtype=torch.bool)
        moved[roles.pictures[0].box(row, col, SIDE)] = True
        assert torch.equal((after.pixels != before.pixels).any(1)[0], moved)
        token = 7 * row + col
        rows = [model().for_hf(each)["pixel_values"] for each in (before, after)]
        assert (rows[0] != rows[1]).any(1).nonzero()[:, 0].tolist() == list(range(4 * token, 4 * token + 4))
        with torch.no_grad():
            streams = [model().vision.start(each.pixels) for each in (before, after)]
        assert (streams[0] != streams[1]).any(-1)[0].nonzero()[:, 0].tolist() == vision.patches_of(token)


@pytest.mark.parametrize("size", [(61, 37), (9, 100), (300, 200), (16, 16)])
def test_the_map_covers_what_hugging_face_resizes_to(size: tuple[int, int]) -> None:
    made = model().prepare("w7", picture(0, *size))
    _, rows, cols = processor().image_processor(picture(0, *size), return_tensors="pt")["image_grid_thw"][0].tolist()
    roles = made.roles_of()
    assert roles.grid() == (rows // 2, cols // 2) and tuple(made.pixels.shape[2:]) == (4 * rows, 4 * cols)
    assert roles.region() == (0, 0, *size) and roles.patch_of_pixel(size[0] - 1, 0) == (0, cols // 2 - 1)


def test_words_and_answers_have_their_roles() -> None:
    made = model().prepare("w7 w30 w9", picture(0), answer="w20")
    roles = made.roles_of()
    assert roles.positions_of("w30").tolist() == [int(roles.positions("question")[1])]
    assert [roles.tokens[i] for i in roles.positions("answer").tolist()] == ["w20"]
    assert roles.labels[roles.positions("image")[0] - 1] == "system"
    with pytest.raises(LensError, match="no chat template"):
        HookedMLLM.from_hf(hf_model(), processor().tokenizer).prepare("w7", picture(0))


# ---- what is refused


def test_videos_and_pictures_of_several_sizes_are_refused() -> None:
    given = inputs(hf_model())
    other = given["pixel_values"].clone()
    other[0, 20] += 1
    for changes, said in (
        ({"image_grid_thw": torch.tensor([[2, 3, 6], [1, 6, 6], [1, 6, 6]])}, "several frames; a video"),
        ({"pixel_values": other}, "frames that differ; a video"),
        ({"mm_token_type_ids": 2 * given["mm_token_type_ids"]}, "a video"),
        ({"image_grid_thw": torch.tensor([[1, 4, 9], [1, 6, 6], [1, 6, 6]])}, "36×16, 24×24 pixels.*expected one size"),
        ({"image_grid_thw": torch.tensor([[1, 6, 8]])}, "expected a row of 96 values for each patch"),
        ({"image_grid_thw": None}, "expected image_grid_thw"),
        ({"pixel_values": torch.rand(3, 3, 24, 32)}, r"beside pictures of \[\[1, 6, 8\]"),
        ({"pixel_values": torch.rand(3, 3, 24, 42), "image_grid_thw": None}, "multiples of 8"),
        ({"pixel_values": torch.rand(3, 1, 24, 24), "image_grid_thw": None}, r"\[picture, 3, height, width\]"),
    ):
        with pytest.raises(LensError, match=said):
            model()(**{**given, **changes})
    with pytest.raises(LensError, match="expected one size"):
        model().prepare("w7", [picture(0), picture(1, 90, 30)])
    with pytest.raises(LensError, match="depends on its size"):
        model().to_tokens("w7 <|image_pad|>")


@pytest.mark.parametrize(
    ("text", "vision", "said"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {}, "sum to 8"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "mrope_section": [2, 3, 3]}}, {}, "'dynamic'"),
        ({}, {"out_hidden_size": 32}, "out_hidden_size 32; expected 64"),
        ({}, {"window_size": 4}, "window_size 4; expected 8"),
        ({}, {"num_heads": 8}, "a multiple of 4"),
        ({}, {"patch_size": [4, 4]}, "one integer each"),
    ],
)
def test_options_that_are_not_computed_are_refused(text: Any, vision: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        QwenConfig.from_hf(config(text, vision))


# ---- positions


@torch.no_grad()
def test_positions_are_hugging_faces() -> None:
    for pad in ("left", "right"):
        given = inputs(hf_model(), images=(1, 2, 0), grid=(4, 10), pad=pad)
        true, deltas = hf_model().model.get_rope_index(
            **{n: given[n] for n in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
        )
        mine = model().read_inputs(**given)
        assert torch.equal(model().positions(mine), true)
        if pad == "left":
            longer = model().positions(mine, beyond=2)
            assert torch.equal(longer[..., :-2], true)
            following = given["attention_mask"].sum(1) + deltas[:, 0]
            assert torch.equal(longer[0, :, -2:], following[:, None] + torch.arange(2))


@torch.no_grad()
def test_steps_by_hand_go_on_where_the_picture_ended() -> None:
    made = asked()
    written = model().generate(made, 3, stop_tokens=())[0, -3:].tolist()
    past = KVCache(model().cfg.n_layers)
    logits = model()(made, past_kv_cache=past)
    for token in written:
        logits[..., 90] = -torch.inf
        assert int(logits[0, -1].argmax()) == token
        logits = model()(torch.tensor([[token]]), past_kv_cache=past)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "sliding"])
@torch.no_grad()
def test_rope_scalings_are_hugging_faces(kind: str) -> None:
    more: dict[str, Any] = {"factor": 2.0, "original_max_position_embeddings": 128}
    more |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    text: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    if kind != "sliding":
        more = {"factor": 2.0} if kind == "linear" else more
        text = {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "mrope_section": [2, 3, 3], **more}}
    hf = random_model(Qwen2_5_VLForConditionalGeneration, config(text), "sdpa", torch.float32)
    given, ours = inputs(hf), HookedMLLM.from_hf(hf)
    keep = given["attention_mask"].bool()
    assert torch.equal(ours(**given)[keep], hf(**given).logits[keep])
    if kind == "sliding":
        with pytest.raises(LensError, match="the context holds 64"):
            ours(torch.ones(1, 65, dtype=torch.long))


# ---- the tower


@torch.no_grad()
def test_patches_see_their_window_and_whole_layers_the_picture() -> None:
    made = asked(1)
    _, cache = model().run_with_cache(made)
    rows, cols = model().cfg.seeing(made.pixels).vision.grid
    window = torch.cartesian_prod(torch.arange(rows) // 4, torch.arange(cols) // 4)
    same = (window[:, None] == window).all(-1)
    some, whole = (cache.vision["pattern", layer][0] for layer in (0, 1))
    assert torch.equal((some > 0).all(0), same) and bool((whole > 0).all())
    for layer, pattern in ((0, some), (1, whole)):
        mixed = torch.einsum("hqk,khd->qhd", pattern, cache.vision["v", layer][0])
        assert torch.allclose(mixed, cache.vision["z", layer][0], atol=1e-5)  # two orders of a float32 sum


@torch.no_grad()
def test_a_pattern_can_be_edited_across_windows() -> None:
    made = asked(1)
    _, cache = model().run_with_cache(made)
    far = 8 * 14 - 1

    def look_far(act: torch.Tensor, hook: Any) -> None:
        act[0, 1, 0] = 0
        act[0, 1, 0, far] = 1

    with model().hooks(fwd_hooks=[("vision.blocks.0.attn.hook_pattern", look_far)]):
        _, edited = model().run_with_cache(made)
    z, plain = edited.vision["z", 0][0], cache.vision["z", 0][0]
    assert torch.allclose(z[0, 1], cache.vision["v", 0][0, far, 1], atol=1e-6)
    assert (z != plain).any(-1).nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
@torch.no_grad()
def test_the_bytes_of_a_cache_are_told(case: Any) -> None:
    seen = "vision.hook_pixels"  # the first entry, which a checker of types would form
    for names in (None, lambda name: "pattern" in name or name == seen, lambda name: name.startswith("vision.")):
        for cut in (None, [0, 3, 5]):
            _, cache = case.ours.run_with_cache(case.read, names_filter=names, vision_pos_slice=cut)
            said = case.ours.cache_bytes(case.read, names_filter=names, vision_pos_slice=cut)
            kept = {act.untyped_storage().data_ptr(): act.untyped_storage() for act in cache.cache_dict.tensors()}
            assert said == sum(storage.nbytes() for storage in kept.values())


# ---- tools


@torch.no_grad()
def test_sweeps_over_patches_count_the_pictures_own() -> None:
    made = asked()
    other = replace(made, pixels=torch.rand(made.pixels.shape, generator=torch.Generator().manual_seed(3)))
    source = model().run_with_cache(made)[1]
    for hook, name, shape, at in (
        ("projector.hook_out", "projector.hook_out", (4, 7), 2 * 7 + 5),
        ("vision.resid_pre", "vision.blocks.1.hook_resid_pre", (8, 14), 3 * 14 + 9),
    ):
        how: dict[str, Any] = {"layers": [1]} if hook == "vision.resid_pre" else {}
        some = torch.zeros(4, 7, dtype=torch.bool)
        some[divmod(at, 7) if shape == (4, 7) else (1, 4)] = True
        sweep = ("layer", "patch") if how else "patch"
        scores = patch(
            model(), made, other, hook, sweep, metric=logit(5), image=1, at=some, progress=False, **how
        ).values.reshape(shape)

        def restore(act: torch.Tensor, hook: Any, at: int = at) -> None:
            act[1, at] = source[hook.name][1, at]

        true = model().run_with_hooks(other, fwd_hooks=[(name, restore)])[0, -1, 5]
        assert abs(float(scores[divmod(at, shape[1])]) - float(true)) <= 1e-5
        assert int(torch.isfinite(scores).sum()) == (1 if shape == (4, 7) else 4)


def test_a_mask_of_the_picture_names_the_towers_patches() -> None:
    made, mask = asked(), np.zeros((37, 61), bool)
    mask[10:18, 30:34] = True
    row = Row.of(model(), made, 0)
    found = {
        h: Ground(model(), row, h, 1).select(Patches(mask, image=1))
        for h in ("projector.hook_out", "vision.hook_embed")
    }
    vision = model().cfg.seeing(made.pixels).vision
    assert found["projector.hook_out"] == (10,)
    assert found["vision.hook_embed"] == tuple(vision.patches_of(10))
    assert Ground(model(), row, "vision.hook_embed", 1).names()[-1] == "patch (7, 13)"


@torch.no_grad()
def test_occlusion_is_hugging_faces_difference() -> None:
    made = asked()
    found = importance_map(model(), made, "occlusion", answer=5, image=1, operator="pixel", progress=False).values

    def log_prob(pixels: torch.Tensor) -> float:
        logits = hf_model()(**model().for_hf(replace(made, pixels=pixels))).logits[0, -1]
        return float(logits.log_softmax(-1)[5])

    for row, col in [(0, 0), (3, 6)]:
        pixels = made.pixels.clone()
        cell = slice(SIDE * row, SIDE * row + SIDE), slice(SIDE * col, SIDE * col + SIDE)
        pixels[1][:, *cell] = made.pixels[1].mean((-2, -1))[:, None, None]
        assert abs(float(found[row, col]) - (log_prob(made.pixels) - log_prob(pixels))) <= 1e-5


@torch.no_grad()
def test_lenses_read_the_tower_and_its_account_is_refused() -> None:
    _, cache = model().run_with_cache(asked())
    lens = tower_lens(cache, image=1, top=2)
    assert tuple(lens.values.shape) == (3, 4, 7, 2)
    with pytest.raises(LensError, match="Merger"):
        tower_attribution(cache, 5)


# ---- checkpoints


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_hub_files_load_with_their_processor(tmp_path: Path, tied: bool) -> None:
    case = CASES[int(tied)]
    case.plain.save_pretrained(tmp_path)
    weights = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value.clone()
        for name, value in case.plain.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((tmp_path / "config.json").read_text())
    text = facts.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    facts = {**text, **facts, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    facts["vision_config"]["model_type"] = "qwen2_5_vl"
    (tmp_path / "config.json").write_text(json.dumps(facts))
    processor().tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 200, "max_pixels": 2000}
    settings |= {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = HookedMLLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(case.read), case.ours(case.read))
    made = loaded.prepare("w7 w8 w9", [picture(i) for i in range(2)])
    assert torch.equal(made.pixels, asked().pixels) and torch.equal(made.tokens, asked().tokens)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    hf_model().save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    key = "visual.blocks.1.attn.qkv.weight"
    for weights, said in (
        ({n: v for n, v in whole.items() if n != key}, f"missing.*{key}"),
        (
            whole | {"visual.blocks.1.attn.qk.weight": whole[key].clone()},
            "unknown.*nearest: 'visual.blocks.0.attn.qkv.weight",
        ),
        (whole | {key: whole[key][1:].clone()}, r"shape \(143, 48\); expected \(144, 48\)"),
    ):
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            HookedMLLM.from_pretrained(tmp_path)
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(LensError, match="patch_size 14; expected 4"):
        model().Processor.image_processor(settings, model().cfg)
