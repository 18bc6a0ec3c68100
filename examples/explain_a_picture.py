"""Ask the embedded model about two objects of one picture: the patches that carry the answer move with the question.

    python examples/explain_a_picture.py [DIR]

Prints both explanations and, given a folder, writes each as a page and as JSON.
"""

import sys
from pathlib import Path

from llava_lens import HookedLlava, explain
from llava_lens.plots import explanation_png
from llava_lens.tiny import questions, render_scene


def main(out: str | None = None) -> None:
    model = HookedLlava.tiny()
    scene = render_scene(2_000_007)  # a scene that the model was not trained on
    asked = [question for question in questions(scene) if question.text.startswith("What is the color")]
    for question in asked[:2]:
        explanation = explain(model, model.prepare(question.text, scene.image))
        print(explanation.summary(), end="\n\n")

        strongest = explanation.patches().top(1)[0]
        assert question.about is not None
        on = explanation.roles.patches_of_mask(scene.objects[question.about[0]].mask)
        print(f"Right: {explanation.answer == question.answer}; on the object: {bool(on[strongest.place])}\n")
        if out is not None:
            explanation.save(Path(out) / question.answer, explanation_png(explanation, scene.image))


if __name__ == "__main__":
    main(*sys.argv[1:2])
