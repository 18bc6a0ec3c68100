"""What every supported model must pass, whatever its family: one function per promise, against an independent truth.

A family joins with a file `tests/cases_<family>.py` that holds `CASES`, a list of `Case`s: a small random model of
transformers (cached, weights shaken by `random_models.shake`), and random inputs for it as its processor lays them out.
`tests/test_models.py` finds those files and runs every promise on every case; the first case of a file is run in the
fast suite, the others as slow tests. `docs/models.md` is generated from the same list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from random_models import shake
from torch import Tensor

from llava_lens import HookedMLLM, Inputs
from llava_lens.hooks import reader

NOT_ADDITIVE = ("attn_scores", "pattern", "hook_scale")


@dataclass
class Case:
    """One configuration of one family. `hf(attention, dtype)` makes the random model, `inputs(hf)` what it is given.

    `inputs` are several rows with pictures, padded on the left where the family can be padded; keys as Hugging Face's.
    `model` is the family's name as users know it, `parts` what it is made of: both go into the table of models.
    `loose` is the largest difference allowed where bit-equality cannot be, with its reason in `why`. `silent` names
    hooks that never fire in this configuration. `skip` names promises that do not hold, each with the reason.
    """

    name: str
    model: str
    parts: str
    hf: Callable[[str, torch.dtype], Any]
    inputs: Callable[[Any], dict[str, Tensor]]
    loose: float = 0.0
    why: str = ""
    silent: tuple[str, ...] = ()
    skip: dict[str, str] = field(default_factory=dict)

    @cached_property
    def plain(self) -> Any:
        """The model of transformers, sdpa and float32."""
        return self.hf("sdpa", torch.float32)

    @cached_property
    def ours(self) -> Any:
        """Our model on the same weights."""
        return HookedMLLM.from_hf(self.plain)

    @cached_property
    def given(self) -> dict[str, Tensor]:
        """The inputs, as a processor of transformers gives them."""
        return self.inputs(self.plain)

    @cached_property
    def read(self) -> Inputs:
        """The same as ours, with roles."""
        return self.ours.read_inputs(**self.given).with_roles(self.ours.cfg)

    @cached_property
    def alone(self) -> Inputs:
        """The first row alone."""
        return self.read.row(0)


def random_model(kind: type, config: Any, attention: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A random model of a class of transformers, its weights all large enough to matter."""
    config._attn_implementation = attention
    model: Any = kind._from_config(config, dtype=dtype, attn_implementation=attention)  # type: ignore[attr-defined]
    shake(model, seed)
    model.tie_weights()
    return model.eval()


def assert_near(got: Tensor, true: Tensor, case: Case) -> None:
    """Equal to the bit, or as near as the case says it can be."""
    assert got.shape == true.shape and got.dtype == true.dtype
    if not case.loose:
        assert torch.equal(got, true), f"{case.name}: off by {float((got - true).abs().max()):.3g}"
    else:
        assert float((got - true).abs().max()) <= case.loose, case.why


def seen(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The logits where there is no padding, whose own rows nobody reads."""
    return logits if mask is None else logits[mask.bool()]


@torch.no_grad()
def logits_are_hugging_faces(case: Case) -> None:
    """Logits of a padded batch with several pictures are Hugging Face's: sdpa and eager, float32 and bfloat16."""
    for attention in ("sdpa", "eager"):
        for dtype in (torch.float32, torch.bfloat16):
            hf = case.hf(attention, dtype)
            given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in case.inputs(hf).items()}
            got, true = HookedMLLM.from_hf(hf)(**given), hf(**given).logits
            assert_near(seen(got, given.get("attention_mask")), seen(true, given.get("attention_mask")), case)


@torch.no_grad()
def a_text_alone_is_hugging_faces(case: Case) -> None:
    """So are those of a text without a picture."""
    tokens = torch.tensor([[5, 9, 14, 3, 8]])
    assert_near(case.ours(tokens), case.plain(input_ids=tokens).logits, case)


@torch.no_grad()
def greedy_tokens_are_hugging_faces(case: Case) -> None:
    """Greedy generation writes the same tokens, padded rows included."""
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    image = case.ours.cfg.image_token_id
    true = case.plain.generate(**case.given, **how, suppress_tokens=[image], eos_token_id=None, pad_token_id=0)
    ours = case.ours.generate(case.read, 6, stop_tokens=())
    assert torch.equal(ours[:, -6:], true[:, -6:])


@torch.no_grad()
def steps_through_a_cache_are_whole_runs(case: Case) -> None:
    """Steps through the KV cache write what whole runs write."""
    whole = case.ours.generate(case.read, 4, stop_tokens=(), use_kv_cache=False)
    assert torch.equal(case.ours.generate(case.read, 4, stop_tokens=()), whole)


@torch.no_grad()
def looking_changes_nothing(case: Case) -> None:
    """Caching everything leaves the logits as they are to the bit, and every hook fires."""
    plain = case.ours(case.read)
    logits, cache = case.ours.run_with_cache(case.read)
    assert torch.equal(logits, plain)
    missing = set(case.ours.hook_dict) - set(cache) - set(case.silent)
    assert not missing, f"hooks that never fired: {sorted(missing)}"
    for name, hook in case.ours.hook_dict.items():
        if name in cache:
            assert cache[name].ndim == len(hook.axes.split()), f"{name}: {tuple(cache[name].shape)}, {hook.axes}"


def every_edit_takes_effect(case: Case) -> None:
    """An edit at any hook of tower, projector or decoder changes the logits."""
    plain = case.ours(case.alone)
    generator = torch.Generator().manual_seed(0)
    for name in case.ours.hook_dict:
        if name in case.silent:
            continue

        def edit(act: Tensor, hook: Any) -> Tensor:
            noise = torch.rand(act.shape, generator=generator).to(act)
            return act * (1 + noise) if hook.name.endswith(NOT_ADDITIVE) else act + noise

        with torch.no_grad():
            edited = case.ours.run_with_hooks(case.alone, fwd_hooks=[(name, edit)])
        assert not torch.equal(edited, plain), name


@torch.no_grad()
def a_reader_of_everything_is_shown_all(case: Case) -> None:
    """A reader at every hook at once changes no bit."""
    found: set[str] = set()

    @reader
    def look(act: Tensor, hook: Any) -> None:
        found.add(hook.name)

    logits = case.ours.run_with_hooks(case.read, fwd_hooks=[(lambda name: True, look)])
    assert torch.equal(logits, case.ours(case.read)) and found == set(case.ours.hook_dict) - set(case.silent)


@torch.no_grad()
def sums_close(case: Case) -> None:
    """Embeddings and what every layer adds sum to the final stream, in decoder and tower."""
    _, cache = case.ours.run_with_cache(case.read)
    keep = slice(None) if case.read.attention_mask is None else case.read.attention_mask.bool()
    for held, layers in ((cache, case.ours.cfg.n_layers), (cache.vision, case.ours.cfg.vision.n_layers)):
        end = held["resid_post", layers - 1]
        parts = held.decompose_resid(layers, return_labels=False).sum(0)
        if held is cache:
            end, parts = end[keep], parts[keep]
        assert float((parts - end).abs().max()) <= 1e-4 * float(end.abs().max())


@torch.no_grad()
def the_fused_path_is_near(case: Case) -> None:
    """The fused path gives the same logits up to rounding."""
    model = HookedMLLM.from_hf(case.hf("sdpa", torch.float32))
    plain = seen(model(case.read), case.read.attention_mask)
    with model.use("fused"):
        fused = seen(model(case.read), case.read.attention_mask)
    assert float((plain - fused).abs().max()) <= 1e-4 * float(plain.abs().max())


def roles_name_every_image_token(case: Case) -> None:
    """Every image token belongs to at most one picture, with its row and column."""
    cfg = case.ours.cfg
    for row, roles in enumerate(case.read.roles or ()):
        slots = (case.read.tokens[row] == cfg.image_token_id).nonzero()[:, 0].tolist()
        assert roles.positions("image").tolist() == slots
        mine = [p for image in range(roles.n_images) for p in roles.positions("image", image).tolist()]
        assert len(set(mine)) == len(mine) and set(mine) <= set(slots)
        for image in range(roles.n_images):
            rows, cols = roles.grid(image)
            for r, c in [(0, 0), (rows - 1, cols - 1)] if rows * cols else []:
                assert roles.patch_of(roles.token_of(r, c, image)) == (image, r, c)


@torch.no_grad()
def features_stand_where_the_roles_say(case: Case) -> None:
    """Changing one feature of one picture changes the embeddings of its own patch's position and of no other."""
    from llava_lens.inputs import shown

    plain = case.ours.run_with_cache(case.alone, names_filter="hook_embed")[1]["hook_embed"]
    for image, (positions, features) in enumerate(shown(case.alone, 0, case.ours.cfg)):
        for nth in {0, len(positions) - 1} if positions else ():

            def edit(act: Tensor, hook: Any, image: int = image, feature: int = features[nth]) -> None:
                act[image, feature] += 1

            hooks = [("projector.hook_out", edit)]
            with case.ours.hooks(fwd_hooks=hooks):
                moved = case.ours.run_with_cache(case.alone, names_filter="hook_embed")[1]["hook_embed"]
            assert (moved != plain).any(-1)[0].nonzero()[:, 0].tolist() == [positions[nth]]


def attribution_closes(case: Case) -> None:
    """Direct logit attribution sums to the logit; log-probability increase is finite."""
    from llava_lens.analysis import direct_logit_attribution, log_prob_increase

    with torch.no_grad():
        logits, cache = case.ours.run_with_cache(case.alone)
        found = direct_logit_attribution(cache, 5, by="component")
        assert abs(float(found.values.sum()) - float(logits[0, -1, 5])) <= 1e-3 * float(logits.abs().max())
        increase = log_prob_increase(cache, 5, by="head")
        assert bool(torch.isfinite(increase.values).all())


@torch.no_grad()
def patching_is_full_runs(case: Case) -> None:
    """Patching the stream equals full runs with hooks by hand."""
    from llava_lens.analysis import patch
    from llava_lens.sweep import logit

    clean, seed = case.alone, torch.Generator().manual_seed(3)
    assert clean.pixels is not None
    other = Inputs(clean.tokens, torch.rand(clean.pixels.shape, generator=seed), None, clean.roles, clean.extras)
    source = case.ours.run_with_cache(clean)[1]
    scores = patch(case.ours, clean, other, "resid_pre", ("layer", "position"), metric=logit(5), progress=False)
    for layer, position in [(0, int(clean.positions("image")[0])), (1, int(clean.positions("image")[-1])), (1, -1)]:

        def restore(act: Tensor, hook: Any, at: int = position) -> None:
            act[0, at] = source[hook.name][0, at]

        full = case.ours.run_with_hooks(other, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", restore)])[0, -1, 5]
        assert abs(float(scores.values[layer, position]) - float(full)) <= 1e-4 * (1 + abs(float(full)))


def maps_score_every_patch(case: Case) -> None:
    """Maps by six methods score every patch of a picture."""
    from llava_lens.maps import importance_map

    for method in ("flow", "occlusion", "gradient", "relevancy", "attention", "rollout"):
        found = importance_map(case.ours, case.alone, method, answer=5, progress=False)
        assert tuple(found.values.shape) == case.alone.roles_of().grid(0), method
        assert bool(torch.isfinite(found.values).all()), method


def a_cache_comes_back_from_disk(case: Case, folder: Any) -> None:
    """A saved cache comes back with its inputs."""
    from llava_lens import LlavaCache

    with torch.no_grad():
        _, cache = case.ours.run_with_cache(case.read)
    cache.save(folder / "cache.safetensors")
    back = LlavaCache.load(folder / "cache.safetensors", case.ours)
    assert torch.equal(back["resid_post", -1], cache["resid_post", -1]) and set(back) == set(cache)
    assert back.inputs is not None and torch.equal(back.inputs.tokens, case.read.tokens)
    assert set(back.inputs.extras) == set(case.read.extras)


@torch.no_grad()
def a_saved_folder_loads(case: Case, folder: Any) -> None:
    """A folder that transformers saved loads, its class picked by its config, and gives the same logits."""
    case.plain.save_pretrained(folder)
    config = folder / "config.json"
    assert config.is_file()
    from llava_lens.checkpoint import model_type_of, open_checkpoint
    from llava_lens.models import class_of
    from llava_lens.weights import load_weights

    kind = class_of(model_type_of(folder))
    checkpoint = open_checkpoint(folder, families=kind.Config.families)
    with torch.device("meta"):
        model = kind(kind.Config.from_hf(checkpoint.config))
    load_weights(model, checkpoint, table=kind.weight_table, progress=False)
    assert torch.equal(model.ready()(case.read), case.ours(case.read))


@torch.no_grad()
def a_wrong_number_of_image_tokens_is_refused(case: Case) -> None:
    """Image tokens that do not fit the pictures, and missing pictures, raise."""
    import pytest

    from llava_lens.errors import LensError

    tokens = case.alone.tokens.clone()
    tokens[0, int(case.alone.positions("image")[0])] = 5
    for bad in ({**case.alone, "input_ids": tokens, "roles": None}, {**case.alone, "pixel_values": None}):
        with pytest.raises(LensError):
            case.ours(**bad)


PROMISES: dict[str, Callable[..., None]] = {
    "logits": logits_are_hugging_faces,
    "text alone": a_text_alone_is_hugging_faces,
    "greedy text": greedy_tokens_are_hugging_faces,
    "KV cache": steps_through_a_cache_are_whole_runs,
    "looking": looking_changes_nothing,
    "edits": every_edit_takes_effect,
    "readers": a_reader_of_everything_is_shown_all,
    "sums": sums_close,
    "fused path": the_fused_path_is_near,
    "roles": roles_name_every_image_token,
    "features": features_stand_where_the_roles_say,
    "attribution": attribution_closes,
    "patching": patching_is_full_runs,
    "maps": maps_score_every_patch,
    "saved caches": a_cache_comes_back_from_disk,
    "checkpoints": a_saved_folder_loads,
    "refusals": a_wrong_number_of_image_tokens_is_refused,
}
"""What is promised of every model, by the name it has in the table of models."""
