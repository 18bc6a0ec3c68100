"""Does the small LLaVA take its answer from the object that is asked about? Counted on held-out scenes.

    python -m llava_lens.tiny.gaze [--scenes 500] [--model DIR] [--json FILE]

What one patch adds to the answer through the attention of the last position, summed over heads and layers: the
attention weight times value times output matrix, read along the answer's unembedding minus the other colours' mean,
through the last norm as it scales that position. Written against transformers alone, independent of the library.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_lens.tiny import CHECKPOINT
from llava_lens.tiny.evaluate import HELD_OUT, prompt, wilson
from llava_lens.tiny.layout import IMAGE, Published
from llava_lens.tiny.pictures import patches_of
from llava_lens.tiny.questions import Question, questions
from llava_lens.tiny.scenes import Scene, render_scene
from llava_lens.tiny.vocabulary import COLORS


class Gaze:
    """A model with what it takes to read off each patch's direct contribution."""

    def __init__(self, folder: Path = CHECKPOINT):
        load = LlavaForConditionalGeneration.from_pretrained
        self.model: Published = load(folder, attn_implementation="eager").eval()
        self.processor: Published = LlavaProcessor.from_pretrained(folder, backend="pil")
        self.kept: dict[str, Tensor] = {}
        decoder = self.model.model.language_model
        for layer, block in enumerate(decoder.layers):
            block.self_attn.v_proj.register_forward_hook(self._keep(f"v{layer}"))
        decoder.norm.register_forward_pre_hook(lambda _, args: self.kept.update(final=args[0]))

    def _keep(self, name: str):
        def hook(module, args, out):
            self.kept[name] = out

        return hook

    @torch.inference_mode()
    def contributions(
        self, scene: Scene, asked: Sequence[Question], *, stem: bool = False
    ) -> tuple[Float[Tensor, "question layer head patch"], list[str]]:
        """What each patch adds directly to the answer's logit over the other colours', and the words answered."""
        prompts = [prompt(scene, question, "image", stem=stem) for question in asked]
        batch = self.processor(images=[scene.image] * len(prompts), text=prompts, padding=True, return_tensors="pt")
        out = self.model(**batch, output_attentions=True)
        directions = self._directions([question.answer for question in asked])
        at_image = batch["input_ids"] == IMAGE
        found = []
        for layer, block in enumerate(self.model.model.language_model.layers):
            v = rearrange(self.kept[f"v{layer}"], "b pos (head d) -> b head pos d", d=block.self_attn.head_dim)
            w_o = rearrange(block.self_attn.o_proj.weight, "model (head d) -> head d model", d=block.self_attn.head_dim)
            read = einsum(w_o, directions, "head d model, b model -> b head d")
            through = out.attentions[layer][:, :, -1] * einsum(v, read, "b head pos d, b head d -> b head pos")
            found.append(torch.stack([row[:, where] for row, where in zip(through, at_image, strict=True)]))
        words = self.processor.tokenizer.convert_ids_to_tokens(out.logits[:, -1].argmax(-1))
        return torch.stack(found, 1), words

    def _directions(self, words: Sequence[str]) -> Float[Tensor, "question model"]:
        """For each question the direction of the last position's stream that favours its answer over other colours."""
        ids = self.processor.tokenizer.convert_tokens_to_ids
        unembedded = self.model.lm_head.weight
        aims = []
        for word in words:
            others = [ids(color) for color in COLORS if color != word]
            aims.append(unembedded[ids(word)] - unembedded[others].mean(0))
        norm, last = self.model.model.language_model.norm, self.kept["final"][:, -1]
        scale = torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        return torch.stack(aims) * norm.weight * scale


def measure(folder: Path = CHECKPOINT, *, n_scenes: int = 500, stem: bool = False) -> dict[str, float | int]:
    """Shares over colour questions: strongest patch on the asked object, the same by chance, and it moves on asking.

    Also the share of the positive contribution that comes from the asked object's patches.
    """
    gaze, hits, moved, chance, share, right = Gaze(folder), [], [], [], [], []
    for seed in range(HELD_OUT, HELD_OUT + n_scenes):
        scene = render_scene(seed)
        asked = [q for q in questions(scene) if q.kind == "color" and q.text.startswith("What is")]
        random.Random(seed).shuffle(asked)
        maps, words = gaze.contributions(scene, asked, stem=stem)
        total = maps.sum((1, 2)).numpy()
        best = total.argmax(-1)
        on = [patches_of(scene, i) > 0 for question in asked for i in question.about or ()]
        landed = [bool(own[patch]) for own, patch in zip(on, best, strict=True)]
        hits.append(landed[0])
        right.append(words[0] == asked[0].answer)
        chance.append(on[0].mean())
        positive = np.maximum(total[0], 0)
        share.append(positive[on[0]].sum() / max(positive.sum(), 1e-9))
        if len(asked) > 1:
            moved.append(landed[0] and landed[1])
    low, high = wilson(sum(hits), len(hits))
    return {
        "questions": len(hits), "right": float(np.mean(right)), "on_object": float(np.mean(hits)), "low": low,
        "high": high, "chance": float(np.mean(chance)), "moves": float(np.mean(moved)), "pairs": len(moved),
        "share_of_positive": float(np.mean(share)),
    }  # fmt: skip


def table(found: dict[str, dict[str, float | int]]) -> str:
    """Markdown: one row a number, one column a form of asking."""
    rows = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for name in next(iter(found.values())):
        rows.append(f"| {name} | {' | '.join(f'{numbers[name]:.4g}' for numbers in found.values())} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Where the small LLaVA takes its colour answers from.")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    given = parser.parse_args(arguments)
    found = {form: measure(given.model, n_scenes=given.scenes, stem=form == "stem") for form in ("question", "stem")}
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
