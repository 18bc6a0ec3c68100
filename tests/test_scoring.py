"""Each measure of a map on maps whose score is known by hand, and randomised copies that leave the original alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from random_models import hf_llava

from llava_lens import HookedLlava
from llava_lens.errors import LensError
from llava_lens.maps.case import Runs
from llava_lens.maps.randomise import parts_of, randomised
from llava_lens.maps.scoring import (
    FLOOR,
    against,
    area,
    better,
    contrasted,
    counts_of,
    curves,
    energy,
    faithfulness,
    likeness,
    ordered,
    pointing,
    ranks,
    spearman,
)

WORTH = torch.tensor([0.1, 0.4, 0.0, 0.2], dtype=torch.float64)
"""What each of four patches adds to the answer's probability, which is 0.1 without any."""
FLAT, SQUARE = torch.ones(4), torch.tensor([[True, True], [False, False]]).flatten()


def additive(kept: torch.Tensor) -> Runs:
    """A model whose answer is the sum of what the patches are worth; below a half it says something else."""
    prob = 0.1 + kept.double() @ WORTH
    return Runs(prob.log(), prob, (prob < 0.5).long())


def scored(
    *maps: torch.Tensor, counts=(0, 1, 2, 3, 4), k=(0.25, 0.5), run=additive, ties=None
) -> dict[str, list[float]]:
    stacked = torch.stack(maps).double()
    ties = torch.arange(stacked.shape[1]) if ties is None else ties
    found = curves(run, torch.stack([ordered(one, ties) for one in stacked]), counts)
    return {name: values.tolist() for name, values in faithfulness(found, stacked, k).items()}


def test_the_true_map_of_an_additive_model_by_hand():
    found = scored(WORTH, -WORTH)
    # the true map takes out 0.4, 0.2, 0.1, 0: 0.8, 0.4, 0.2, 0.1, 0.1; backwards 0.8, 0.8, 0.7, 0.5, 0.1
    assert found["deletion"] == pytest.approx([(0.45 + 0.4 + 0.2 + 0.1) / 4, (0.45 + 0.8 + 0.7 + 0.5) / 4])
    # and puts back 0.1, 0.5, 0.7, 0.8, 0.8; backwards 0.1, 0.1, 0.2, 0.4, 0.8
    assert found["insertion"] == pytest.approx([(0.45 + 0.5 + 0.7 + 0.8) / 4, (0.45 + 0.1 + 0.2 + 0.4) / 4])
    assert found["deletion_share"] == pytest.approx([(area_ - 0.1) / 0.7 for area_ in found["deletion"]])
    assert found["insertion_share"] == pytest.approx([(area_ - 0.1) / 0.7 for area_ in found["insertion"]])
    assert found["comprehensiveness@0.25"] == pytest.approx([0.4, 0.0])
    assert found["comprehensiveness@0.5"] == pytest.approx([0.6, 0.1])
    assert found["sufficiency@0.25"] == pytest.approx([0.3, 0.7])
    assert found["sufficiency@0.5"] == pytest.approx([0.1, 0.6])
    assert found["flips@0.25"] == [1.0, 0.0] and found["flips@0.5"] == [1.0, 0.0]
    assert found["occlusion"] == pytest.approx([1.0, -1.0])


def test_no_order_beats_the_true_one():
    every = torch.tensor(list(itertools.permutations(range(4)))).double()
    found = scored(WORTH, *every)
    assert min(found["deletion"]) == found["deletion"][0] and max(found["insertion"]) == found["insertion"][0]
    assert len({round(each, 9) for each in found["deletion"]}) > 10


def test_over_all_orders_deletion_and_insertion_are_the_middle_and_so_is_a_flat_map_over_random_ties():
    every = torch.tensor(list(itertools.permutations(range(4))))
    found = scored(*every.double())
    middle = 0.1 + 0.7 / 2  # an additive model loses as much on average with each patch
    assert sum(found["deletion"]) / 24 == pytest.approx(middle) == sum(found["insertion"]) / 24
    flat = [scored(FLAT, ties=ties)["deletion"][0] for ties in every]
    assert sum(flat) / 24 == pytest.approx(middle)
    assert scored(FLAT)["occlusion"] == [0.0]


def test_a_set_of_patches_runs_once_however_many_maps_ask_for_it():
    asked = []

    def run(kept: torch.Tensor) -> Runs:
        asked.append(kept)
        return additive(kept)

    one = scored(WORTH, run=run)
    assert scored(WORTH, WORTH, WORTH, run=run)["deletion"] == one["deletion"] * 3
    assert len(asked) == 2 and torch.equal(asked[0], asked[1])
    # full, empty, three on the way out and three on the way in, among them two of the four that lack one patch
    assert len(asked[0]) == len({tuple(row.tolist()) for row in asked[0]}) == 2 + 3 + 3 + 2


def test_an_area_is_not_divided_by_a_small_difference():
    def barely(kept: torch.Tensor) -> Runs:
        prob = 0.5 + (kept.double() @ WORTH) * (FLOOR / 0.7 - 0.001)
        return Runs(prob.log(), prob, torch.zeros(len(kept), dtype=torch.long))

    found = scored(WORTH, run=barely)
    assert found["deletion"][0] > 0.5 and str(found["deletion_share"][0]) == "nan"


def test_a_coarse_curve_follows_the_trapezium_rule():
    values = torch.tensor([[1.0, 0.5, 0.0]])
    assert area(values, (0, 1, 4)).tolist() == pytest.approx([0.25 * 0.75 + 0.75 * 0.25])
    assert area(torch.ones(7), range(7)).item() == pytest.approx(1.0, abs=1e-12)


def test_counts_hold_both_ends_and_every_top_share():
    counts = counts_of(576, 8, (0.05, 0.1))
    assert counts[0] == 0 and counts[-1] == 576 and {1, 29, 58, 72} <= set(counts) and counts == sorted(set(counts))
    assert counts_of(1, 10, (0.5,)) == [0, 1]
    for steps, k in ((0, ()), (4, (0.0,)), (4, (1.0,))):
        with pytest.raises(LensError, match="expected 1 step or more, and shares between 0 and 1"):
            counts_of(64, steps, k)


def test_ties_are_broken_as_told_and_nothing_else_is():
    scores = torch.tensor([2.0, 1.0, 2.0, 3.0, 1.0])
    assert ordered(scores, torch.tensor([4, 3, 2, 1, 0])).tolist() == [3, 2, 0, 4, 1]
    assert ordered(scores, torch.arange(5)).tolist() == [3, 0, 2, 1, 4]


@pytest.mark.parametrize("levels", [2, 3, 1000])
def test_rank_correlation_is_pearsons_of_ranks_counted_one_by_one(levels):
    draw = torch.Generator().manual_seed(levels)
    a, b = torch.randint(levels, (2, 40), generator=draw).double()
    by_hand = [[sum(y < x for y in one) + (sum(y == x for y in one) - 1) / 2 for x in one] for one in (a, b)]
    assert ranks(a).tolist() == by_hand[0]
    wanted = torch.corrcoef(torch.tensor(by_hand, dtype=torch.float64))[0, 1]
    assert spearman(a, b) == pytest.approx(float(wanted), abs=1e-12)


def test_flat_maps_are_alike_only_with_flat_ones():
    other = torch.arange(4.0)
    assert spearman(FLAT, other) is None
    assert likeness(FLAT, 3 * FLAT) == 1.0 and likeness(FLAT, other) == 0.0 and likeness(other, 2 * other) == 1.0


def test_pointing_and_energy_by_hand():
    one = torch.tensor([0.5, 2.0, -3.0, 1.5])
    assert against(one, SQUARE) == {"pointing": 1.0, "energy": pytest.approx(2.5 / 4)}
    assert pointing(-one, SQUARE) == 0.0 and energy(-one, SQUARE) == 0.0
    assert energy(-one.abs(), SQUARE) == 0.0  # nothing is positive


def test_by_chance_pointing_and_energy_are_the_masks_share():
    mask = torch.tensor([True, False, False, False])
    assert against(FLAT, mask) == {"pointing": 0.25, "energy": 0.25}
    draw = torch.Generator().manual_seed(0)
    hits = [pointing(torch.rand(4, generator=draw), mask) for _ in range(2000)]
    assert abs(sum(hits) / 2000 - 0.25) < 0.04  # four standard errors


def test_the_contrast_by_hand():
    first, second = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 3.0])
    left, right = torch.tensor([True, False, False, False]), torch.tensor([False, False, False, True])
    found = contrasted(first, second, left, right)
    assert found["contrast_pointing"] == 1.0
    assert found["contrast_moved"] == pytest.approx(((0.75 - 0.25) + (0.75 - 0.0)) / 2)
    assert found["contrast_correlation"] == spearman(first, second) != 1.0
    still = contrasted(first, first, left, right)
    assert still == {"contrast_pointing": 0.0, "contrast_moved": 0.0, "contrast_correlation": pytest.approx(1.0)}
    assert set(contrasted(first, second, left, None)) == {"contrast_correlation"}


def test_every_measure_knows_which_way_is_good():
    for name in scored(WORTH):
        assert better(f"{name}/pixel") in ("higher", "lower")
    with pytest.raises(LensError, match="no measure 'deletoin'"):
        better("deletoin")


# ---- randomised copies


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("odd", ["plain", "grouped", "tied", "attention_bias", "full"])
def test_a_randomised_copy_keeps_the_numbers_and_leaves_the_original_alone(odd):
    model = HookedLlava.from_hf(hf_llava(odd))
    before = weights(model)
    twin = randomised(model, seed=3)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    theirs = dict(twin.named_parameters(remove_duplicate=False))
    for name, weight in before.items():
        assert theirs[name].data_ptr() != dict(model.named_parameters(remove_duplicate=False))[name].data_ptr()
        assert torch.equal(theirs[name].flatten().sort().values, weight.flatten().sort().values)
        assert weight.unique().numel() < 3 or not torch.equal(theirs[name], weight), name
    if odd == "tied":
        assert twin.unembed.weight is twin.embed.weight
    again, other = randomised(model, seed=3), randomised(model, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), twin.parameters(), strict=True))
    assert not torch.equal(other.blocks[0].attn.q_proj.weight, twin.blocks[0].attn.q_proj.weight)


def test_the_cascade_goes_from_the_output_to_the_input():
    model = HookedLlava.tiny()
    parts = parts_of(model)
    assert sorted(name for names in parts.values() for name in names) == sorted(dict(model.named_parameters()))
    before, whole = weights(model), weights(randomised(model))
    for part in ("unembed", "blocks.2", "projector", "vision"):
        some = weights(randomised(model, part))
        stop = list(parts).index(part) + 1
        for i, names in enumerate(parts.values()):
            assert all(torch.equal(some[name], (whole if i < stop else before)[name]) for name in names)
    with pytest.raises(LensError, match=r"no part 'blocks.9'; nearest: 'blocks.*expected one of unembed"):
        randomised(model, "blocks.9")


def test_a_randomised_copy_runs_and_says_something_else():
    model = HookedLlava.tiny()
    twin = randomised(model)
    inputs = model.read_inputs({"input_ids": torch.tensor([[1, 5, 6, 7]])})
    assert twin.processor is model.processor and not torch.allclose(twin(inputs), model(inputs))
    assert replace(twin.cfg) == model.cfg
