"""How does the answer get from the picture to the end? Block attention in a window of layers and see what is lost.

    python examples/knock_out_attention.py [SCENES] [PICTURE.png]

Each curve blocks one edge in one layer, or in two neighbouring ones: what probability does the right answer lose?
"""

import sys

from llava_lens import HookedLlava
from llava_lens.analysis import Scores, knock_out, prob, stacked
from llava_lens.plots import curves, new_figure, png
from llava_lens.tiny import color_pairs

EDGES = {
    "image → question": ("question", "image"),
    "image → last": ("last", "image"),
    "question → last": ("last", "question"),
}
"""What flows where: attention looks the other way, from the second to the first."""


def study(n: int, window: int = 1) -> dict[str, Scores]:
    """Mean loss of probability `[layer]` by edge, with its interval over the scenes."""
    model = HookedLlava.tiny()
    found: dict[str, list[Scores]] = {edge: [] for edge in EDGES}
    for pair in color_pairs(n):
        inputs = model.prepare(pair.question.text, pair.clean.image)
        for edge, (queries, keys) in EDGES.items():
            how = {"window": window, "metric": prob(pair.answer), "progress": False}
            found[edge].append(knock_out(model, inputs, queries, keys, **how).effect())
    return {edge: stacked(each).mean() for edge, each in found.items()}


def main(n: str = "3", out: str | None = None) -> None:
    single, windows = study(int(n)), study(int(n), window=2)
    for edge, scores in windows.items():
        print(f"{edge}, two layers at a time", scores, sep="\n", end="\n\n")
    if out is not None:
        figure = new_figure(11, 3.8)
        left, right = figure.subplots(1, 2, sharey=True)
        curves(single, ax=left, title="blocked in one layer", baseline=("nothing blocked", 0.0))
        curves(windows, ax=right, title="blocked in that layer and the next", baseline=("nothing blocked", 0.0))
        figure.suptitle(f"Probability of the right answer lost to a knockout ({n} scenes, 95 % intervals)")
        with open(out, "wb") as file:
            file.write(png(figure))


if __name__ == "__main__":
    main(*sys.argv[1:3])
