"""Which patches matter, by several methods? A right answer, a wrong one, and one about something that is not there.

    python examples/compare_maps.py [FOLDER]

The scenes are the first held-out ones of each kind. Where the answer is wrong the maps say what it came from instead.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from llava_lens import HookedLlava
from llava_lens.maps import importance_map
from llava_lens.plots import maps_page, png
from llava_lens.tiny import questions, render_scene
from llava_lens.tiny.scenes import Scene
from llava_lens.tiny.vocabulary import COLORS, SHAPES

MAPS = {
    "mean attention": ("attention", {}),
    "relevancy": ("relevancy", {}),
    "log-probability increase": ("lpi", {}),
    "occlusion, 3 × 3 patches": ("occlusion", {"size": 3}),
    "integrated gradients": ("integrated_gradients", {"at": "embedding", "of": "prob", "steps": 32}),
    "RISE": ("rise", {"n": 500}),
    "flow": ("flow", {}),
}


def said(model: HookedLlava, question: str, scene: Scene) -> str:
    """The model's own first word."""
    logits = model(model.prepare(question, scene.image), logits_to_keep=1)
    return model.token_string(int(logits[0, -1].argmax())).strip()


def kinds(model: HookedLlava) -> Iterator[tuple[str, str, Scene, str]]:
    """A name, a question, its scene and what is true."""
    scenes = [render_scene(seed) for seed in range(9_000_000, 9_000_400)]
    colours = [(q, scene) for scene in scenes for q in questions(scene) if q.text.startswith("What is the color")]
    asked, scene = next((q, s) for q, s in colours if said(model, q.text, s) == q.answer)
    yield "right", asked.text, scene, asked.answer
    asked, scene = next((q, s) for q, s in colours if said(model, q.text, s) not in ("", q.answer))
    yield "wrong", asked.text, scene, asked.answer
    for scene in scenes:
        missing = next(shape for shape in SHAPES if not scene.find(shape=shape))
        if said(model, text := f"What is the color of the {missing}?", scene) in COLORS:
            yield "absent", text, scene, "not there"
            return


def main(folder: str | None = None) -> None:
    model = HookedLlava.tiny()
    for name, question, scene, truth in kinds(model):
        inputs = model.prepare(question, scene.image)
        title = f"{question}  → {said(model, question, scene)}  (true: {truth})"
        maps = {label: importance_map(model, inputs, method, **how) for label, (method, how) in MAPS.items()}
        print(title, *(f"  {label}: strongest {scores.top(1)[0].place}" for label, scores in maps.items()), sep="\n")
        if folder is not None:
            Path(folder, f"maps_{name}.png").write_bytes(png(maps_page(maps, scene.image, title=title)))


if __name__ == "__main__":
    main(*sys.argv[1:2])
