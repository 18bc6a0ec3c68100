"""Trains the small LLaVA in LLaVA's stages: decoder on text, tower on its patches, projector, visual tuning.

    python -m llava_lens.tiny.train --out DIR [--stage text tower projector tuning] [--resume] [--device cuda] [--quick]

Every batch is drawn from its step's number, so a run that was interrupted and resumed equals one that was not. The
decoder as it is after the text stage is kept (`DIR/before_tuning`), next to the finished model (`DIR/checkpoint`).
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration

from llava_lens.tiny import corpus
from llava_lens.tiny.layout import (
    FEATURE_LAYER,
    IMAGE,
    Published,
    build_processor,
    build_tokenizer,
    generation_config,
    llava_config,
    text_config,
    vision_config,
)
from llava_lens.tiny.pictures import Pictures, normalised, training_pictures
from llava_lens.tiny.tower import PatchHeads

STAGES = ("text", "tower", "projector", "tuning")
SAVE_EVERY = 250  # steps


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage trains; `batch` counts sequences or pictures."""

    steps: int
    batch: int
    lr: float


@dataclass(frozen=True)
class Plan:
    """The sizes of the model, of the training set and of every stage."""

    text: Stage = Stage(2600, 32, 1e-3)
    tower: Stage = Stage(2400, 48, 1e-3)
    projector: Stage = Stage(500, 24, 2e-3)
    tuning: Stage = Stage(1900, 24, 5e-4)
    pictures: int = 20_000
    n_layers: int = 4
    width: int = 128
    seed: int = 0


QUICK = Plan(Stage(6, 4, 1e-3), Stage(6, 4, 1e-3), Stage(6, 4, 1e-3), Stage(6, 4, 1e-3), 16, 4, 32)


def fit(
    stage: Stage,
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], Float[Tensor, ""]],
    folder: Path,
    resume: bool,
    stop_after: int | None = None,
) -> None:
    """Minimises `loss_at(step)` over the parameters of `module` that require gradients.

    AdamW, a linear warm-up and a cosine decay to a twentieth. The state is written to `folder/state` every
    `SAVE_EVERY` steps and at the end; `stop_after` ends the run early, as an interruption would.
    """
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01)
    state = folder / "state" / f"{name}.pt"
    start = _load(state, module, optimizer) if resume and state.exists() else 0
    end = min(stage.steps, stop_after or stage.steps)
    bar = tqdm(range(start, end), desc=name, initial=start, total=stage.steps, unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * _schedule(step, stage.steps)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == end:
            _save(state, {"step": step + 1, "module": module.state_dict(), "optimizer": optimizer.state_dict()})


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / min(100, steps))
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _save(state: Path, content: dict[str, Any]) -> None:
    """Written aside and moved, so that an interruption leaves the older state whole."""
    state.parent.mkdir(parents=True, exist_ok=True)
    aside = state.with_suffix(".part")
    torch.save(content, aside)
    aside.replace(state)


def _load(state: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    saved = torch.load(state, weights_only=True, map_location="cpu")
    module.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def next_token_loss(logits: Float[Tensor, "batch pos vocab"], labels: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """The mean over labelled tokens of minus the log probability that the position before gives them."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=corpus.IGNORE)


class Trainer:
    """The four stages on one output folder; each reads what the earlier ones left there."""

    def __init__(self, out: Path, plan: Plan, *, device: str = "cpu", resume: bool = False):
        self.out, self.plan, self.device, self.resume = out, plan, torch.device(device), resume
        self.stop_after: int | None = None

    def run(self, stage: str) -> None:
        torch.manual_seed(self.plan.seed)  # per stage, so that one run alone equals the same in a row
        getattr(self, stage)()

    def _fit(self, name: str, module: nn.Module, loss_at: Callable[[int], Tensor]) -> None:
        fit(getattr(self.plan, name), name, module.train(), loss_at, self.out, self.resume, self.stop_after)

    def _rng(self, name: str, step: int) -> random.Random:
        return random.Random(f"{self.plan.seed}-{name}-{step}")

    def text(self) -> None:
        """The decoder on text alone: copying, then binding, then questions about sentences."""
        model: Published = LlamaForCausalLM(text_config(self.plan.n_layers, self.plan.width))
        model.to(self.device)
        stage = self.plan.text

        def loss_at(step: int) -> Tensor:
            batch = corpus.text_batch(self._rng("text", step), stage.batch, step / stage.steps)
            ids, labels = (t.to(self.device) for t in corpus.pad(batch))
            return next_token_loss(model(ids, use_cache=False).logits, labels)

        self._fit("text", model, loss_at)
        model.generation_config = generation_config()
        model.save_pretrained(self.out / "before_tuning")
        build_tokenizer().save_pretrained(self.out / "before_tuning")

    def tower(self) -> None:
        """The tower on what each of its patches shows, read off by linear heads that are then dropped."""
        model: Published = CLIPVisionModel(vision_config(self.plan.n_layers, self.plan.width))
        model.to(self.device)
        heads = PatchHeads(self.plan.width).to(self.device)
        pictures, stage = self.pictures(), self.plan.tower

        def loss_at(step: int) -> Tensor:
            rng = self._rng("tower", step)
            rows = [rng.randrange(len(pictures.facts)) for _ in range(stage.batch)]
            hidden = model(pixel_values=normalised(pictures, rows).to(self.device), output_hidden_states=True)
            return heads(hidden.hidden_states, pictures, rows)

        self._fit("tower", nn.ModuleList([model, heads]), loss_at)
        model.save_pretrained(self.out / "tower")

    def projector(self) -> None:
        """The projector alone: patches become what the decoder, frozen, already reads in sentences."""
        decoder = LlamaForCausalLM.from_pretrained(self.out / "before_tuning")
        tower = CLIPVisionModel.from_pretrained(self.out / "tower")
        model = LlavaForConditionalGeneration(llava_config(decoder.config, tower.config))
        model.model.language_model.load_state_dict(decoder.model.state_dict())
        model.lm_head.load_state_dict(decoder.lm_head.state_dict())
        model.model.vision_tower.load_state_dict(tower.state_dict())
        self._visual("projector", model, text_share=0.0, kinds=corpus.KIND_WEIGHTS)

    def tuning(self) -> None:
        """Projector and decoder on pictures and sentences mixed, the tower frozen."""
        model = LlavaForConditionalGeneration.from_pretrained(self.out / "aligned")
        self._visual("tuning", model, text_share=0.3, kinds=corpus.TUNING_WEIGHTS)

    def _visual(self, name: str, model: Published, *, text_share: float, kinds: dict[str, float]) -> None:
        model.to(self.device).requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        if name == "tuning":
            model.model.language_model.requires_grad_(True)
            model.lm_head.requires_grad_(True)
        stage, pictures = getattr(self.plan, name), self.pictures()

        def loss_at(step: int) -> Tensor:
            rng = self._rng(name, step)
            rows = [rng.randrange(len(pictures.facts)) for _ in range(stage.batch)]
            shown = [rng.random() >= text_share for _ in rows]
            batch = [
                corpus.conversation(pictures.facts[row], rng, 4, picture=seen, kinds=kinds)
                for row, seen in zip(rows, shown, strict=True)
            ]
            ids, labels = (t.to(self.device) for t in corpus.pad(batch))
            looked_at = [row for row, seen in zip(rows, shown, strict=True) if seen]
            features = look(model, normalised(pictures, looked_at).to(self.device))
            return next_token_loss(see(model, ids, features), labels)

        self._fit(name, model, loss_at)
        folder = self.out / ("checkpoint" if name == "tuning" else "aligned")
        model.generation_config = generation_config()
        model.save_pretrained(folder)
        build_processor().save_pretrained(folder)

    def pictures(self) -> Pictures:
        """The training scenes, drawn once."""
        return training_pictures(self.plan.pictures, self.out / "pictures.safetensors")


@torch.no_grad()
def look(model: Published, pixels: Float[Tensor, "picture rgb y x"]) -> Float[Tensor, "picture patch width"]:
    """What the frozen tower gives the projector."""
    hidden = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    return hidden[FEATURE_LAYER][:, 1:]


def see(
    model: Published, ids: Int[Tensor, "batch pos"], features: Float[Tensor, "picture patch width"]
) -> Float[Tensor, "batch pos vocab"]:
    """LLaVA's forward from the tower's features on: project, put in the places of `<image>`, decode."""
    embedded = model.get_input_embeddings()(ids)
    projected = model.model.multi_modal_projector(features)
    embedded = embedded.masked_scatter((ids == IMAGE)[:, :, None], projected.to(embedded.dtype))
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return model.lm_head(hidden)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the small LLaVA.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--resume", action="store_true", help="go on from the states in OUT/state")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps at small sizes, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of the processor, for this run")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    plan = replace(QUICK if given.quick else Plan(), seed=given.seed)
    trainer = Trainer(given.out, plan, device=given.device, resume=given.resume)
    for stage in given.stage:
        trainer.run(stage)


if __name__ == "__main__":
    main()
