"""Where does the answer sit, by layer and role? Patch a scene into one where the object has another colour.

    python examples/where_the_answer_sits.py [PAIRS] [PICTURE.png]

Recovery is 0 where the patched run still gives the other colour, and 1 where the right one is all the way back.
"""

import sys

from llava_lens import HookedLlava
from llava_lens.analysis import Patches, Scores, logit_diff, patch, recovery, stacked
from llava_lens.plots import grid, new_figure, png
from llava_lens.tiny import color_pairs

HOOKS = {"resid_pre": "stream before the layer", "attn_out": "what attention adds", "mlp_out": "what the MLP adds"}


def study(n: int) -> dict[str, Scores]:
    """Mean recovery `[layer, group]` with its interval, for the stream and for what attention and MLP add."""
    model = HookedLlava.tiny()
    found: dict[str, list[Scores]] = {hook: [] for hook in HOOKS}
    for pair in color_pairs(n):
        clean, corrupt = (model.prepare(pair.question.text, scene.image) for scene in (pair.clean, pair.corrupt))
        thing = pair.clean.objects[pair.about]
        word = clean.positions_of(thing.shape).tolist()
        groups = {
            "its patches": Patches(thing.mask),
            "other patches": Patches(thing.mask, outside=True),
            "its word": word,
            "other words": [p for p in clean.positions("question").tolist() if p not in word],
            "last": "last",
        }
        metric = recovery(logit_diff(pair.answer, pair.other))
        for hook, each in found.items():
            each.append(
                patch(model, clean, corrupt, hook, ("layer", "group"), at=groups, metric=metric, progress=False)
            )
    return {hook: stacked(each).mean() for hook, each in found.items()}


def main(n: str = "3", out: str | None = None) -> None:
    found = study(int(n))
    for hook, scores in found.items():
        print(HOOKS[hook], scores, sep="\n", end="\n\n")
    if out is not None:
        figure = new_figure(14, 3.6)
        for ax, (hook, scores) in zip(figure.subplots(1, 3), found.items(), strict=True):
            grid(scores, ax=ax, title=HOOKS[hook])
        figure.suptitle(f"How much of the answer comes back when one part is patched ({n} pairs)")
        with open(out, "wb") as file:
            file.write(png(figure))


if __name__ == "__main__":
    main(*sys.argv[1:3])
