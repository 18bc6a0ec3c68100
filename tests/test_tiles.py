"""What is asked of one tile of an image, of interpolated tokens and of a normed projector, beside full runs by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tiles import PATCH, TEXT, TOKEN, alone, both, photo
from torch import Tensor

from llava_lens import Inputs
from llava_lens.analysis import knock_out, patch, tower_attribution, visual_words
from llava_lens.analysis.attribution.account import Asked
from llava_lens.analysis.attribution.features import Picture, by_all_paths
from llava_lens.analysis.attribution.tower import into_projector
from llava_lens.errors import LensError
from llava_lens.explanation import explain
from llava_lens.maps import importance_map
from llava_lens.plots import explanation_png
from llava_lens.sweep import logit

# ---- what is asked of a tile


def test_a_tile_whose_padding_is_cut_off_is_accounted_for() -> None:
    """Directions are the frozen run's gradient; a feature without a token gets none."""
    model, inputs, cache = alone()
    grids = [inputs.roles_of().grid(i) for i in range(inputs.n_images)]
    assert grids == [(3, 3), (3, 2), (3, 3), (3, 2)]

    def constant(name: str) -> tuple[str, Any]:
        return name, lambda act, hook: cache[name].clone()

    held: list[Any] = [constant("ln_final.hook_scale")]
    for layer in range(model.cfg.n_layers):
        kinds = ("ln1.hook_scale", "ln2.hook_scale", "attn.hook_pattern", "mlp.hook_pre")
        held += [constant(f"blocks.{layer}.{kind}") for kind in kinds]
    out = cache["projector.hook_out"].clone().requires_grad_()
    logits = model.run_with_hooks(inputs, fwd_hooks=[*held, ("projector.hook_out", lambda act, hook: out + 0)])
    logits[0, -1, TOKEN].backward()
    assert out.grad is not None
    for image in range(inputs.n_images):
        picture = Picture.of(cache, 0, image)
        directions, _ = by_all_paths(picture, Asked.of(cache, 0, -1, TOKEN, None, None))
        full = torch.zeros_like(out[0])
        full[list(picture.shown)] = directions[0]
        assert torch.allclose(full, out.grad[image], rtol=1e-9, atol=1e-12)
        if grids[image] == (3, 3) and image != 0:
            continue
        for by, through in itertools.product(("component", "head", "source", "neuron"), ("direct", "all")):
            scores = tower_attribution(cache, TOKEN, by=by, through=through, image=image)
            rest = scores.method["rest"]
            whole = scores.method["through_image" if through == "direct" else "logit"]
            assert abs(float(scores.values.sum()) + sum(rest.values()) - whole) < 1e-9
            assert by == "neuron" or tuple(scores.values.shape[-2:]) == grids[image]


def test_tower_patches_of_a_tile_are_full_runs() -> None:
    model, clean, cache = alone()
    image = next(i for i, p in enumerate(clean.roles_of().pictures) if i and p.grid != (3, 3))
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(clean.pixels.shape, generator=generator, dtype=torch.float64)
    other = Inputs(clean.tokens, pixels, None, clean.roles, clean.extras)
    scores = patch(model, clean, other, "vision.resid_pre", ("layer", "patch"), metric=logit(TOKEN), image=image,
                   progress=False)  # fmt: skip
    assert scores.values.shape[1:] == (3, 3)
    mask = np.zeros(clean.roles_of().grid(image), bool)
    mask[0, 1] = True
    own = clean.roles_of().picture(image).offset
    some = patch(model, clean, other, "vision.resid_pre", ("layer", "patch"), metric=logit(TOKEN), image=image,
                 at=mask, progress=False)  # fmt: skip
    for layer, row, col in [(0, 0, 0), (2, 1, 2), (1, own[0], own[1] + 1)]:

        def restore(act: Tensor, hook: Any, at: int = 1 + 3 * row + col) -> None:
            act[image, at] = cache[hook.name][image, at]

        hooks = [(f"vision.blocks.{layer}.hook_resid_pre", restore)]
        with torch.no_grad():
            full = model.run_with_hooks(other, fwd_hooks=hooks)[0, -1, TOKEN]
        assert abs(float(scores.values[layer, row, col] - full)) < 1e-9
        expected = float(full) if (row, col) == (own[0], own[1] + 1) else torch.nan
        assert np.isclose(float(some.values[layer, row, col]), expected, rtol=0, atol=1e-9, equal_nan=True)


def test_maps_of_a_tile_are_those_of_its_own_pixels() -> None:
    model, inputs, _ = alone()
    image = next(i for i, p in enumerate(inputs.roles_of().pictures) if i and p.grid != (3, 3))
    picture = inputs.roles_of().picture(image)
    found = importance_map(model, inputs, "occlusion", answer=TOKEN, image=image, operator="pixel", progress=False)
    with torch.no_grad():
        before = model(inputs)[0, -1].log_softmax(-1)[TOKEN]
        for row, col in [(0, 0), (picture.grid[0] - 1, picture.grid[1] - 1)]:
            pixels = inputs.pixels.clone()
            mean = pixels[image].mean((-2, -1), keepdim=True)
            rows, cols = picture.box(row, col, PATCH)
            pixels[image, :, rows, cols] = mean
            after = model(Inputs(inputs.tokens, pixels, None, inputs.roles, inputs.extras))[0, -1].log_softmax(-1)
            assert abs(float(found.values[row, col] - (before - after[TOKEN]))) < 1e-9
    for method in ("flow", "gradient", "relevancy", "attention"):
        values = importance_map(model, inputs, method, answer=TOKEN, image=image, progress=False).values
        assert tuple(values.shape) == picture.grid and bool(torch.isfinite(values).all())
    words = visual_words(model, inputs, TOKEN, image=image)
    assert tuple(words.scores.values.shape) == picture.grid
    loss = knock_out(model, inputs, "last", "image", metric=logit(TOKEN), progress=False)
    assert bool(torch.isfinite(loss.values).all())


# ---- interpolated tokens


def test_interpolated_tokens_have_places_and_nothing_is_computed_from_single_patches() -> None:
    model, inputs, cache = alone("one", (70, 71))
    roles = inputs.roles_of()
    assert [p.mixed for p in roles.pictures] == [False, *[True] * (roles.n_images - 1)]
    layout = model.cfg.layout((71, 70))
    boxes, first = {}, int(roles.positions("image")[9])
    for image in range(1, roles.n_images):
        for row, col in itertools.product(*map(range, roles.grid(image))):
            place = divmod(roles.token_of(row, col, image) - first, layout.across.tokens + 1)
            boxes[place] = roles.box_of_patch(row, col, image)
    rows, cols = layout.down.tokens, layout.across.tokens
    assert sorted(boxes) == list(itertools.product(range(rows), range(cols)))
    for (row, col), (left, top, right, bottom) in boxes.items():
        assert (left, right) == pytest.approx((71 * col / cols, 71 * (col + 1) / cols), abs=1)
        assert (top, bottom) == pytest.approx((70 * row / rows, 70 * (row + 1) / rows), abs=1)
    for refused in (
        lambda: tower_attribution(cache, TOKEN, image=1),
        lambda: importance_map(model, inputs, "occlusion", answer=TOKEN, image=1, operator="pixel", progress=False),
        lambda: visual_words(cache, answer=TOKEN, image=1),
        lambda: importance_map(model, inputs, "relevancy", answer=TOKEN, image=1, through="both", progress=False),
    ):
        with pytest.raises(LensError, match="interpolated between its patches"):
            refused()
    for method in ("flow", "attention", "relevancy"):
        found = importance_map(model, inputs, method, answer=TOKEN, image=1, progress=False)
        assert tuple(found.values.shape) == roles.grid(1)


def test_tower_patches_under_interpolated_tokens_are_full_runs() -> None:
    model, clean, cache = alone("one", (70, 71))
    pixels = torch.rand(clean.pixels.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    other = Inputs(clean.tokens, pixels, None, clean.roles, clean.extras)
    scores = patch(model, clean, other, "vision.resid_pre", ("layer",), metric=logit(TOKEN), image=2, layers=[1],
                   progress=False)  # fmt: skip

    def restore(act: Tensor, hook: Any) -> None:
        act[2] = cache[hook.name][2]

    hooks = [("vision.blocks.1.hook_resid_pre", restore)]
    with torch.no_grad():
        full = model.run_with_hooks(other, fwd_hooks=hooks)[0, -1, TOKEN]
    assert abs(float(scores.values[0] - full)) < 1e-9


@pytest.mark.slow
def test_a_page_explains_what_a_tile_says() -> None:
    model = both("next")[1]
    image = photo(30, 61)
    told = explain(model, model.prepare(TEXT, image, template=False), image=1)
    assert tuple(told.map.values.shape) == (3, 2) and explanation_png(told, image)[:4] == b"\x89PNG"


# ---- ViP-LLaVA


def test_the_account_goes_back_through_the_projectors_norm() -> None:
    """The directions at the projector's input are the gradient with scale and gates held."""
    model, _, cache = alone("vip")
    picture = Picture.of(cache, 0, 0)
    directions = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at_in, biases = into_projector(picture, directions)
    x = cache["projector.hook_in"].clone().requires_grad_()
    projector, scale = model.projector, cache["projector.norm.hook_scale"]
    normed = (x - x.mean(-1, keepdim=True)) / scale * projector.norm.weight + projector.norm.bias
    factor = cache["projector.hook_post"] / cache["projector.hook_pre"]
    out = projector.linear_2(projector.linear_1(normed) * factor)
    assert torch.allclose(out, cache["projector.hook_out"])
    (out * directions).sum().backward()
    assert x.grad is not None and torch.allclose(at_in[0], x.grad[0], rtol=1e-9, atol=1e-12)
    said = (at_in[0] * cache["projector.hook_in"][0]).sum() + biases.sum()
    assert abs(float((said - (out * directions).sum()).detach())) < 1e-9
    for by in ("component", "head", "source", "neuron"):
        assert abs(tower_attribution(cache, TOKEN, by=by, through="all").closure or 0.0) < 1e-9
