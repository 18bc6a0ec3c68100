"""What does the model say on the way? The stream at every word before each layer, and what each patch says by itself.

    python examples/read_the_lens.py [PICTURE.png]

The lens reads each stream as if it were the last one. The patches are read in the middle of the decoder, where they
have looked at each other.
"""

import sys

from llava_lens import HookedLlava
from llava_lens.analysis import logit_lens, value_neurons
from llava_lens.plots import lens_grid, new_figure, png, words_over_image
from llava_lens.tiny import render_scene


def main(out: str | None = None) -> None:
    model, scene = HookedLlava.tiny(), render_scene(1_000_003)
    inputs = model.prepare("What is the color of the circle?", scene.image)
    _, cache = model.run_with_cache(inputs)
    words = logit_lens(cache, "text")
    print(words, value_neurons(cache, k=3), sep="\n\n")
    if out is not None:
        figure = new_figure(15, 5)
        left, right = figure.subplots(1, 2, width_ratios=(2.4, 1))
        lens_grid(words, ax=left, title="the text, before each layer and at the end")
        patches = logit_lens(cache)[{"stream": 2}].over_image()
        words_over_image(patches, scene.image, ax=right, title="the patches, before layer 2")
        with open(out, "wb") as file:
            file.write(png(figure))


if __name__ == "__main__":
    main(*sys.argv[1:2])
