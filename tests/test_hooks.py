"""Every hook fires, has its declared axes, and an edit changes exactly what lies downstream; looking changes nothing.

"Downstream" comes from a table of the flow inside a block and between the rooms, not from the code under test.
"""

from __future__ import annotations

import re

import pytest
import torch
from random_models import example, hf_llava

from llava_lens import HookedLlava, hook_table, reader
from llava_lens.errors import LensError, UnknownHook

# What a change at a hook reaches inside its own block; every later block and room is reached as well.
STREAM_TO_ATTN = ["hook_attn_in", "ln1.hook_scale", "ln1.hook_normalized"]
QKV = ["attn.hook_q", "attn.hook_k", "attn.hook_v"]
ROTATED = ["attn.hook_rot_q", "attn.hook_rot_k"]
MIXED = ["attn.hook_z", "attn.hook_result", "hook_attn_out"]
SCORED = ["attn.hook_attn_scores", "attn.hook_pattern", *MIXED]
TO_MLP = ["hook_resid_mid", "hook_mlp_in", "ln2.hook_scale", "ln2.hook_normalized"]
HIDDEN = ["mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"]
OUT = ["hook_mlp_out", "hook_resid_post"]
AFTER_ATTN = [*TO_MLP, *HIDDEN, *OUT]
AFTER_NORM1 = [*QKV, *ROTATED, *SCORED, *AFTER_ATTN]
BLOCK = {
    "hook_resid_pre": [*STREAM_TO_ATTN, *AFTER_NORM1],
    "hook_attn_in": ["ln1.hook_scale", "ln1.hook_normalized", *AFTER_NORM1],
    "ln1.hook_scale": ["ln1.hook_normalized", *AFTER_NORM1],
    "ln1.hook_normalized": AFTER_NORM1,
    "attn.hook_q": ["attn.hook_rot_q", *SCORED, *AFTER_ATTN],
    "attn.hook_k": ["attn.hook_rot_k", *SCORED, *AFTER_ATTN],
    "attn.hook_v": [*MIXED, *AFTER_ATTN],
    "attn.hook_rot_q": [*SCORED, *AFTER_ATTN],
    "attn.hook_rot_k": [*SCORED, *AFTER_ATTN],
    "attn.hook_attn_scores": [*SCORED[1:], *AFTER_ATTN],
    "attn.hook_pattern": [*MIXED, *AFTER_ATTN],
    "attn.hook_z": [*MIXED[1:], *AFTER_ATTN],
    "attn.hook_result": ["hook_attn_out", *AFTER_ATTN],
    "hook_attn_out": AFTER_ATTN,
    "hook_resid_mid": [*TO_MLP[1:], *HIDDEN, *OUT],
    "hook_mlp_in": ["ln2.hook_scale", "ln2.hook_normalized", *HIDDEN, "hook_mlp_out", "hook_resid_post"],
    "ln2.hook_scale": ["ln2.hook_normalized", *HIDDEN, *OUT],
    "ln2.hook_normalized": [*HIDDEN, *OUT],
    "mlp.hook_pre": ["mlp.hook_post", *OUT],
    "mlp.hook_pre_linear": ["mlp.hook_post", *OUT],
    "mlp.hook_post": OUT,
    "hook_mlp_out": ["hook_resid_post"],
    "hook_resid_post": [],
}
ROOMS = ["vision.start", "vision.blocks", "vision.end", "projector", "text", "merged", "blocks", "end"]
START = ["vision.hook_pixels", "vision.hook_patch_embed", "vision.hook_class_embed", "vision.hook_pos_embed"]
CHAINS = {  # hooks outside the blocks: each reaches those after it in its own chain
    "vision.start": ["vision.hook_pixels", "vision.hook_patch_embed", "vision.ln_pre.hook_scale",
                     "vision.ln_pre.hook_normalized", "vision.hook_embed"],
    "vision.end": ["vision.hook_features"],
    "projector": ["projector.hook_in", "projector.hook_pre", "projector.hook_post", "projector.hook_out"],
    "text": ["hook_text_embed"],
    "merged": ["hook_embed"],
    "end": ["ln_final.hook_scale", "ln_final.hook_normalized", "hook_logits"],
}  # fmt: skip


def split(name: str) -> tuple[str, int, str]:
    """Tower prefix, layer and the name inside the block."""
    match = re.fullmatch(r"(vision\.)?blocks\.(\d+)\.(.+)", name)
    assert match is not None
    return match.group(1) or "", int(match.group(2)), match.group(3)


def room(name: str) -> str:
    if "blocks." in name:
        return "vision.blocks" if name.startswith("vision.") else "blocks"
    if name in ("vision.hook_class_embed", "vision.hook_pos_embed"):
        return "vision.start"
    return next(room for room, names in CHAINS.items() if name in names)


def downstream(name: str, names: list[str]) -> set[str]:
    """The hooks that a change at `name` may reach."""
    here = room(name)
    later = ROOMS[ROOMS.index(here) + 1 :]
    if here in ("vision.start", "vision.blocks", "vision.end", "projector"):
        later = [r for r in later if r != "text"]
    reached = {other for other in names if room(other) in later}
    if "blocks." in name:
        _, layer, inside = split(name)
        for other in names:
            if room(other) == here:
                _, other_layer, other_inside = split(other)
                if other_layer > layer or (other_layer == layer and other_inside in BLOCK[inside]):
                    reached.add(other)
    elif name in START[2:]:
        reached |= set(CHAINS["vision.start"][2:])
    else:
        chain = CHAINS[here]
        reached |= set(chain[chain.index(name) + 1 :])
    return reached


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def setting(request):
    """A model whose features come from its last tower layer, its inputs, and everything cached."""
    hf = hf_llava("shallow", request.param)
    model = HookedLlava.from_hf(hf)
    inputs = example(hf, images=(1, 1, 1), pad="left")
    with torch.no_grad():
        logits, cache = model.run_with_cache(**inputs)
    return model, inputs, logits, dict(cache.cache_dict)


NAMES = list(HookedLlava.from_hf(hf_llava("shallow")).hook_dict)


def edited(act: torch.Tensor, name: str) -> torch.Tensor:
    """A change at one position of the first sample, in every later axis but the last one at its middle entry.

    Text embeddings change at the last position: at the middle one the picture takes their place.
    """
    out = act.clone()
    at = [n - 1 if name == "hook_text_embed" else n // 2 for n in act.shape]
    where = (0, *(slice(i, i + 1) for i in at[1:-1]))
    out[where] = out[where].nan_to_num(neginf=0.0) * 1.5 + 0.3
    return out


def test_the_tables_above_cover_every_hook():
    names = {row.name for row in hook_table(HookedLlava.from_hf(hf_llava("shallow")))}
    listed = {f"{prefix}blocks.{{layer}}.{inside}" for prefix in ("", "vision.") for inside in BLOCK}
    listed -= {f"vision.blocks.{{layer}}.{x}" for x in (*ROTATED, "mlp.hook_pre_linear")}
    listed |= {name for chain in CHAINS.values() for name in chain} | set(START)
    assert names == listed


def test_every_hook_fires_with_its_declared_axes(setting):
    model, _, _, cache = setting
    assert set(cache) == set(model.hook_dict)
    sizes: dict[tuple[bool, str], int] = {}
    for name, act in cache.items():
        hook = model.hook(name)
        assert isinstance(act, hook.annotation), (name, hook.axes, act.shape)
        for axis, size in zip(hook.axes.split(), act.shape, strict=True):
            key = (name.startswith(("vision.", "projector.")), axis)
            if axis not in ("d_model", "d_features"):
                assert sizes.setdefault(key, size) == size, (name, axis)


def test_caching_everything_leaves_the_logits_bit_identical(setting):
    model, inputs, logits, _ = setting
    with torch.no_grad():
        assert torch.equal(model(**inputs), logits)


@pytest.mark.parametrize("how", ["returned", "in place"])
@pytest.mark.parametrize("name", NAMES)
def test_an_edit_changes_exactly_what_lies_downstream(setting, name, how):
    model, inputs, logits, before = setting

    def edit(act, hook):
        change = edited(act, name)
        if how == "returned":
            return change
        act.copy_(change)

    with torch.inference_mode(), model.hooks([(name, edit)]):
        out, cache = model.run_with_cache(**inputs)
    changed = {other for other, act in cache.items() if not torch.equal(act, before[other])}
    allowed = downstream(name, NAMES)
    assert changed <= allowed | {name}, f"changed upstream of {name}: {sorted(changed - allowed - {name})}"
    assert changed == allowed | {name}, f"not reached from {name}: {sorted(allowed | {name} - changed)}"
    if name != "hook_logits":  # the other samples are not touched, to the bit
        assert torch.equal(out[1:], logits[1:])
    assert torch.equal(model(**inputs), logits), "the hook outlived its call"


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_reading_function_changes_nothing(setting, name):
    model, inputs, logits, before = setting
    seen = {}

    def look(act, hook):
        seen[hook.name] = act.clone()

    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(model.run_with_hooks(fwd_hooks=[(name, look)], **inputs), logits)
    assert torch.equal(seen[name], before[name])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_arrive_at_every_hook(setting, name):
    model, inputs, _, _ = setting
    grads = []
    pixels = inputs["pixel_values"].clone().requires_grad_()
    with model.hooks(bwd_hooks=[(name, lambda grad, hook: grads.append(grad))]):
        model(**{**inputs, "pixel_values": pixels})[:, -1, 3].sum().backward()
    assert len(grads) == 1 and grads[0].isfinite().all() and grads[0].abs().max() > 0


def test_an_edited_pattern_of_one_head_leaves_the_other_heads_bits(setting):
    model, inputs, _, before = setting

    def blind(act, hook):
        act[:, 1] = 0.0

    with torch.no_grad(), model.hooks([("blocks.1.attn.hook_pattern", blind)]):
        _, cache = model.run_with_cache(**inputs)
    z, was = cache["z", 1], before["blocks.1.attn.hook_z"]
    assert (z[:, :, 1] == 0).all() and torch.equal(z[:, :, [0, 2, 3]], was[:, :, [0, 2, 3]])


def test_an_in_place_edit_does_not_reach_what_was_cached_upstream(setting):
    model, inputs, _, before = setting

    def wipe(act, hook):
        act.zero_()

    with torch.no_grad(), model.hooks([("blocks.1.hook_resid_pre", wipe)]):
        _, cache = model.run_with_cache(**inputs)
    assert torch.equal(cache["resid_post", 0], before["blocks.0.hook_resid_post"])
    assert (cache["resid_pre", 1] == 0).all()


def test_an_unknown_name_raises_with_the_nearest(setting):
    model, inputs, _, _ = setting
    with pytest.raises(UnknownHook, match=r"no hook is called 'blocks.1.attn.hook_patern'.*hook_pattern"):
        model.run_with_hooks(fwd_hooks=[("blocks.1.attn.hook_patern", lambda act, hook: None)], **inputs)
    with pytest.raises(UnknownHook, match="selects none"):
        model.run_with_cache(**inputs, names_filter=lambda name: "nowhere" in name)
    with pytest.raises(UnknownHook, match=r"blocks\.7\.hook_z"):
        model.add_hook("blocks.7.hook_z", lambda act, hook: None)
    with pytest.raises(UnknownHook, match="hook_resid_post"):
        model.run_with_cache(**inputs, names_filter=["blocks.0.hook_resid_pos"])


def test_a_hook_that_cannot_fire_raises(setting):
    model, inputs, _, _ = setting
    text = {"input_ids": torch.tensor([[4, 5, 6]])}
    with pytest.raises(UnknownHook, match=r"vision.*never fired: no picture"):
        model.run_with_hooks(fwd_hooks=[("vision.blocks.0.hook_resid_pre", lambda act, hook: None)], **text)
    with pytest.raises(UnknownHook, match="never fired: the run did not reach it"):
        model.run_with_hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda act, hook: None)], stop_at_layer=1, **inputs)
    with pytest.raises(UnknownHook, match="never fired"):
        model.run_with_cache(**text, names_filter=["hook_embed", "projector.hook_out"])


def test_hooks_never_outlive_a_call_that_raises(setting):
    model, inputs, logits, _ = setting

    def fail(act, hook):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        model.run_with_hooks(fwd_hooks=[("blocks.0.hook_resid_pre", fail)], **inputs)
    with pytest.raises(RuntimeError, match="mine"), model.hooks([("blocks.1.hook_resid_pre", fail)]):
        model.run_with_cache(**inputs)
    assert not any(hook.live for hook in model.hook_dict.values()) and model.context_level == 0
    assert torch.equal(model(**inputs), logits)


def test_a_wrong_shape_is_refused_by_name(setting):
    model, inputs, _, _ = setting
    with pytest.raises((ValueError, LensError), match=r"'blocks.0.attn.hook_z' returned \(1,\); expected"):
        model.run_with_hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda act, hook: torch.zeros(1))], **inputs)


def test_a_hook_knows_its_layer_in_both_towers(setting):
    model = setting[0]
    assert model.hook("vision.blocks.1.attn.hook_z").layer() == 1 and model.hook("blocks.1.hook_mlp_out").layer() == 1
    with pytest.raises(ValueError, match="not inside a block"):
        model.hook("hook_embed").layer()


def test_a_reader_is_shown_the_tensor_itself(setting):
    model, inputs, _, _ = setting
    seen = []
    note = reader(lambda act, hook: seen.append(act.data_ptr()))
    with torch.no_grad():
        model.run_with_hooks(
            fwd_hooks=[("blocks.0.hook_resid_post", note), ("blocks.1.hook_resid_pre", note)], **inputs
        )
    assert seen[0] == seen[1]


def test_cached_gradients_leave_the_hooks_clean(setting):
    model, inputs, _, _ = setting
    out, cache = model.run_with_cache(**inputs, incl_bwd=True, metric=lambda logits: logits[:, -1, 3].sum())
    for name in ("hook_embed", "blocks.1.attn.hook_pattern", "blocks.0.hook_attn_in", "projector.hook_out"):
        assert cache[name + "_grad"].shape == cache[name].shape
    assert out.requires_grad
    with pytest.raises(LensError, match="needs a scalar"):
        model.run_with_cache(**inputs, incl_bwd=True)


def test_a_returned_tensor_stays_the_users_own(setting):
    """A clean activation patched in and then edited in place by the next function keeps its values."""
    model, inputs, logits, _ = setting
    with torch.no_grad():
        _, clean = model.run_with_cache(**inputs)
    was = clean["resid_pre", 1].clone()

    def patch(act, hook):
        return clean[hook.name]

    def wipe(act, hook):
        act.zero_()

    hooks = [("blocks.1.hook_resid_pre", patch), ("blocks.1.hook_resid_pre", wipe)]
    with torch.no_grad():
        assert not torch.equal(model.run_with_hooks(fwd_hooks=hooks, **inputs), logits)
    assert torch.equal(clean["resid_pre", 1], was) and torch.equal(clean["resid_post", 0], was)


@pytest.mark.parametrize("name", [name for name in NAMES if "blocks.1" in name or "ln_" in name])
def test_edits_that_autograd_does_not_count_take_effect_too(setting, name):
    model, inputs, logits, _ = setting

    def through_data(act, hook):
        act.data.clamp_(-9, 9).mul_(1.5).add_(0.3)

    def through_numpy(act, hook):
        act.numpy()[...] = act.numpy().clip(-9, 9) * 1.5 + 0.3

    with torch.no_grad():
        outs = [model.run_with_hooks(fwd_hooks=[(name, fn)], **inputs) for fn in (through_data, through_numpy)]
    torch.testing.assert_close(*outs)
    assert not torch.equal(outs[0], logits)


def test_a_backward_hook_may_change_the_gradient(setting):
    model, inputs, _, _ = setting
    grads = []
    for factor in (1.0, 0.0, 2.0):
        pixels = inputs["pixel_values"].clone().requires_grad_()
        with model.hooks(bwd_hooks=[("projector.hook_out", lambda grad, hook, factor=factor: grad * factor)]):
            model(**{**inputs, "pixel_values": pixels})[:, -1, 3].sum().backward()
        grads.append(pixels.grad)
    assert not grads[1].any()
    torch.testing.assert_close(grads[2], 2 * grads[0])


def test_a_backward_hook_that_cannot_fire_raises(setting):
    model = setting[0]
    with (
        pytest.raises(UnknownHook, match="never fired: no picture"),
        model.hooks(bwd_hooks=[("vision.blocks.0.hook_resid_pre", lambda grad, hook: None)]),
    ):
        model(torch.tensor([[4, 5, 6]])).sum().backward()


def test_another_dtype_is_refused_by_name(setting):
    model, inputs, _, _ = setting
    with pytest.raises(LensError, match=r"'blocks.0.hook_mlp_out' returned torch.float64; expected torch.float32"):
        model.run_with_hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda act, hook: act.double())], **inputs)


def test_a_name_given_twice_is_kept_once(setting):
    model, inputs, _, _ = setting
    with torch.no_grad():
        _, cache = model.run_with_cache(**inputs, names_filter=["hook_embed", "hook_embed"])
    assert list(cache.cache_dict) == ["hook_embed"]
