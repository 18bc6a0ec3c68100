"""Which heads move the answer from the picture to the end? Patch every head, in both directions.

    python examples/heads_that_move_it.py [PAIRS] [PICTURE.png]

Denoising puts a head's clean output into the run on the other colour: does it suffice? Noising does the reverse: is it
needed? Both are shares of the distance between the two runs, so a head that does all of it scores 1 and -1.
"""

import sys

import torch

from llava_lens import HookedLlava
from llava_lens.analysis import Scores, logit_diff, patch, recovery, stacked
from llava_lens.plots import heads_map, new_figure, png
from llava_lens.tiny import color_pairs


def study(n: int) -> dict[str, Scores]:
    """Effect `[layer, head]` of each head at all positions, by direction, with intervals over the pairs."""
    model = HookedLlava.tiny()
    found: dict[str, list[Scores]] = {"denoise": [], "noise": []}
    for pair in color_pairs(n):
        clean, corrupt = (model.prepare(pair.question.text, scene.image) for scene in (pair.clean, pair.corrupt))
        metric = recovery(logit_diff(pair.answer, pair.other))
        for direction, each in found.items():
            how = {"direction": direction, "metric": metric, "progress": False}
            each.append(patch(model, clean, corrupt, "z", ("layer", "head"), **how).effect())
    return {direction: stacked(each).mean() for direction, each in found.items()}


def main(n: str = "3", out: str | None = None) -> None:
    found = study(int(n))
    for direction, scores in found.items():
        print(direction, scores, sep="\n", end="\n\n")
    both = torch.stack([found["denoise"].values.flatten(), -found["noise"].values.flatten()])
    print(f"Both directions agree with r = {float(torch.corrcoef(both)[0, 1]):.2f} over {both.shape[1]} heads")
    if out is not None:
        figure = new_figure(10, 3.8)
        for ax, (direction, scores) in zip(figure.subplots(1, 2), found.items(), strict=True):
            marked = [entry.place for entry in scores.top(3, absolute=True)]
            heads_map(scores, ax=ax, title=direction, marked=marked)
        figure.suptitle(f"What one head's output changes, as a share of all ({n} pairs; dots: the largest)")
        with open(out, "wb") as file:
            file.write(png(figure))


if __name__ == "__main__":
    main(*sys.argv[1:3])
