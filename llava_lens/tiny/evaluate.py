"""How often the small LLaVA answers right, about pictures and about sentences, on scenes it was not trained on.

    python -m llava_lens.tiny.evaluate [--scenes 2000] [--mode image|text|both] [--stem] [--model DIR] [--json FILE]

For each scene and each kind of question one question is drawn, asked alone, and answered greedily up to `</s>`; right
means that the whole answer is the right word. Yes/no and numbers are drawn evenly over the answers a scene allows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_lens.tiny import CHECKPOINT
from llava_lens.tiny.corpus import pick
from llava_lens.tiny.layout import Published
from llava_lens.tiny.questions import KINDS, Question, questions
from llava_lens.tiny.scenes import Scene, render_scene

HELD_OUT = 1_000_000  # the first held-out seed; training takes seeds from 0
MODES = ("image", "text")


@dataclass(frozen=True)
class Accuracy:
    """`right` of `asked` questions of one kind in one mode, with Wilson's 95 % interval for the share."""

    mode: str
    kind: str
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.asked)

    def __str__(self) -> str:
        low, high = self.interval
        row = f"{self.mode:<6} {self.kind:<7} {self.right:>6} / {self.asked:<6}"
        return f"{row} {self.share:8.2%}   {low:.2%} – {high:.2%}"


def wilson(right: int, asked: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927, JASA 22).

    >>> [round(end, 4) for end in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    if not 0 <= right <= asked or asked == 0:
        raise ValueError(f"{right} right of {asked} asked is no share")
    share, spread = right / asked, z * z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / asked + spread / (4 * asked))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def drawn(scene: Scene, seed: int) -> list[Question]:
    """One question of each kind that the scene allows, the same for the same seed."""
    rng, asked = random.Random(f"ask-{seed}"), questions(scene)
    there = {question.kind for question in asked}
    return [pick(asked, rng, {kind: 1.0}) for kind in KINDS if kind in there]


def prompt(scene: Scene, question: Question, mode: str, *, stem: bool = False) -> str:
    """LLaVA's conversation up to the answer, or up to the last word of a full-sentence answer."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known are {', '.join(MODES)}")
    seen = "<image>\n" if mode == "image" else scene.text + " "
    return f"USER: {seen}{question.text} ASSISTANT:" + (f" {question.stem}" if stem else "")


@torch.inference_mode()
def answers(
    model: Published, processor: Published, prompts: Sequence[str], scenes: Sequence[Scene], mode: str
) -> list[str]:
    """The greedy answers to a batch of prompts; `scenes` gives their pictures."""
    images = [scene.image for scene in scenes] if mode == "image" else None
    batch = processor(images=images, text=list(prompts), padding=True, return_tensors="pt").to(model.device)
    given = model.generate(**batch, max_new_tokens=4, do_sample=False)
    return processor.batch_decode(given[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(
    folder: Path = CHECKPOINT,
    *,
    n_scenes: int = 2000,
    modes: Sequence[str] = MODES,
    stem: bool = False,
    batch_size: int = 100,
    device: str = "cpu",
    first_seed: int = HELD_OUT,
) -> list[Accuracy]:
    """The accuracy of every kind of question in every mode."""
    model: Published = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    model.to(device)
    processor = LlavaProcessor.from_pretrained(folder, backend="pil")
    right, asked = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    bar = tqdm(total=n_scenes, desc="asking", unit="scene")
    for seeds in _chunks(range(first_seed, first_seed + n_scenes), max(batch_size // len(KINDS), 1)):
        pairs = [(scene, q) for seed in seeds for scene in [render_scene(seed)] for q in drawn(scene, seed)]
        scenes, turns = zip(*pairs, strict=True)
        for mode in modes:
            prompts = [prompt(scene, question, mode, stem=stem) for scene, question in pairs]
            for question, answer in zip(turns, answers(model, processor, prompts, scenes, mode), strict=True):
                asked[mode, question.kind] += 1
                right[mode, question.kind] += answer.strip() == question.answer
        bar.update(len(seeds))
    bar.close()
    return [Accuracy(mode, kind, right[mode, kind], asked[mode, kind]) for mode in modes for kind in KINDS]


def _chunks(seeds: range, size: int) -> Iterator[range]:
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the small LLaVA on held-out scenes.")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    parser.add_argument("--stem", action="store_true", help="ask for the end of a full-sentence answer")
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the counts there")
    given = parser.parse_args(arguments)
    modes = MODES if given.mode == "both" else (given.mode,)
    found = evaluate(given.model, n_scenes=given.scenes, modes=modes, stem=given.stem, device=given.device)
    print(f"{'mode':<6} {'kind':<7} {'right / asked':>15} {'accuracy':>8}   95 % interval (Wilson)")
    print(*found, sep="\n")
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
