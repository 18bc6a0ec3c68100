"""`check_parity`: a model beside its Hugging Face model, from the weights to the words that both write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from llava_lens.errors import LensError
from llava_lens.hooks import reader
from llava_lens.inputs import Inputs
from llava_lens.parity.report import Generation, ParityReport
from llava_lens.parity.stages import compare
from llava_lens.parity.twin import Twin
from llava_lens.record import BY_IMAGE


def check_parity(
    model: Any, hf_model: nn.Module, inputs: Inputs | Mapping[str, Any] | Tensor | str, new_tokens: int = 8
) -> ParityReport:
    """Compare a `HookedLlava`, or a subclass, with its Hugging Face model, and say where they first differ.

    First every weight is compared with the published one that the model's rename table gives. Then both run on
    `inputs` (what the model itself takes): text embeddings, the tower's start and blocks, what the projector is given
    and gives, the embeddings with pictures in place, every decoder block, the final norm, the logits. Each stage is
    compared in a run of its own and, by overwriting every stage with Hugging Face's values, fed what Hugging Face's
    was fed (`alone`), so that a stage at fault is told from those that pass a difference on. Last come `new_tokens`
    tokens of greedy generation, none for 0. Padded positions, the places of pictures among the text embeddings, and
    tower layers that are not built do not count; what could not be compared is listed with the reason.

    A wrong row of the rename table puts the same wrong weight on both sides of the first comparison: it shows in the
    stages. Both models run as they are, dtype, device and path included, in eval mode without gradients, and are left
    as they were. Differences are relative to the largest value of Hugging Face's tensor.

    Raises `LensError` for models that do not belong together: another vocabulary or width, other layers or parts.

    >>> from transformers import LlavaForConditionalGeneration
    >>> from llava_lens import HookedLlava, check_parity
    >>> from llava_lens.tiny import CHECKPOINT, render_scene
    >>> model = HookedLlava.tiny()
    >>> inputs = model.prepare("What is the color of the circle?", render_scene(5).image)
    >>> report = check_parity(model, LlavaForConditionalGeneration.from_pretrained(CHECKPOINT), inputs, new_tokens=2)
    >>> print(report.summary)
    All 14 stages compared are bit-equal.
    >>> report.is_equal
    True
    """
    if new_tokens < 0:
        raise LensError(f"new_tokens={new_tokens}: expected how many tokens to generate, or 0")
    given = model.read_inputs(inputs).check(model.cfg)
    with _at_rest(model, hf_model):
        twin = Twin(model, hf_model)
        weights = twin.weights()
        stages = compare(twin, given)
        silent = _silent(model, given)
        generation = _generate(model, hf_model, given, new_tokens)
    rounding = max(torch.finfo(each.dtype).eps for each in (model.embed.weight, next(hf_model.parameters())))
    return ParityReport(_title(model, hf_model, given), rounding, stages, weights, generation, silent)


def _silent(model: Any, inputs: Inputs) -> tuple[str, ...]:
    """Hooks that a run does not reach; those of tower and projector do not count without a picture."""
    before = {name: hook.fired for name, hook in model.hook_dict.items()}
    with model.hooks(fwd_hooks=[(lambda name: True, reader(lambda act, hook: None))]):
        model(inputs)
    pictured = inputs.pixels is not None
    names = [name for name, hook in model.hook_dict.items() if hook.fired == before[name]]
    return tuple(name for name in names if pictured or not name.startswith(BY_IMAGE))


@contextmanager
def _at_rest(*models: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; each module's own mode comes back."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _generate(model: Any, hf_model: Any, inputs: Inputs, new: int) -> Generation:
    if not new:
        return Generation(skipped="new_tokens=0")
    if getattr(hf_model, "generation_config", None) is None:
        return Generation(skipped=f"{type(hf_model).__name__} does not generate")
    try:
        ours = model.generate(inputs, max_new_tokens=new)
    except LensError as error:
        return Generation(skipped=str(error))
    config = deepcopy(hf_model.generation_config)
    settings = dict(do_sample=False, num_beams=1, temperature=None, top_k=None, top_p=None, repetition_penalty=None)
    never = None if model.cfg.image_token_id is None else [model.cfg.image_token_id]
    for name, value in {**settings, "suppress_tokens": never, "max_length": None, "max_new_tokens": new}.items():
        setattr(config, name, value)
    device = next(hf_model.parameters()).device
    given = {key: tensor.to(device) for key, tensor in model.for_hf(inputs).items()}
    theirs = hf_model.generate(**given, generation_config=config)
    written = [tuple(tuple(row[inputs.n_pos :].tolist()) for row in side) for side in (ours, theirs)]
    return Generation(written[0], written[1])


def _title(model: Any, hf_model: nn.Module, inputs: Inputs) -> str:
    """Which models ran and how: a difference of rounding comes from another dtype, device, attention or path."""
    padded = 0 if inputs.attention_mask is None else int((inputs.attention_mask == 0).sum())
    left_out = f", {padded} padded positions left out" if padded else ""
    lines = [f"{type(model).__name__} beside {type(hf_model).__name__}"]
    lines.append(f"inputs: {inputs.batch_size} × {inputs.n_pos} tokens{left_out}")
    weight, config = next(hf_model.parameters()), hf_model.config
    theirs: Any = getattr(config, "text_config", None) or config
    attention = model.blocks[0].attn.implementation if len(model.blocks) else "none"
    lines.append(f"ours: {_kind(model.embed.weight)}, {attention} attention, {model.path} path")
    lines.append(f"Hugging Face's: {_kind(weight)}, {theirs._attn_implementation} attention")
    return "\n".join(lines)


def _kind(weight: Tensor) -> str:
    return f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
