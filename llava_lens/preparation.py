"""From questions and images to `Inputs`: rendered, tokenized, prepared and padded.

Unusual: how many tokens an image takes is asked before its pixel values are made, so that a prompt that is too long is
refused at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.config import LlavaConfig
from llava_lens.errors import LensError
from llava_lens.images import load_image
from llava_lens.inputs import Inputs, cut_from
from llava_lens.pictures import Layout, in_a_row
from llava_lens.prompt import Encoded, Processor, Prompt, encode
from llava_lens.roles import Roles


def prepare(
    processor: Any,
    cfg: LlavaConfig,
    question: Any,
    image: Any = None,
    answer: Any = "",
    template: bool = True,
    padding_side: str = "left",
) -> Inputs:
    """Questions and images as a model's inputs, with a role for every position.

    `question` is a string or a list of them; `answer`, the same, is a start of the answer that the model goes on from.
    `image` is a path, a PIL image or an array; a list of them for several images in one question; for a list of
    questions, a list with an entry (None, one image or a list) per question, or one image for all. With
    `template=False` the question is the whole prompt. Raises `LensError` for what a model of this config cannot take.
    """
    processor = Processor.from_hf(processor, cfg)
    questions, images, answers = _as_batch(question, image, answer)
    if padding_side not in ("left", "right"):
        raise LensError(f"padding_side {padding_side!r}; expected 'left' or 'right'")
    n = sum(map(len, images))
    if n and (cfg.vision is None or processor.image is None):
        raise LensError(f"{n} image{'s' * (n != 1)} for a model without a vision tower; expected none")
    prompts = [
        processor.render(q, len(pictures), a, template)
        for q, pictures, a in zip(questions, images, answers, strict=True)
    ]
    loaded = [[load_image(picture) for picture in pictures] for pictures in images]
    layouts = [processor.layouts(pictures, cfg) for pictures in loaded]
    encoded = [encode(processor, prompt, cfg, row) for prompt, row in zip(prompts, layouts, strict=True)]
    _refuse_long(encoded, layouts, cfg)
    rows = [_roles(*each, processor, cfg) for each in zip(prompts, encoded, layouts, strict=True)]
    every = [picture for pictures in loaded for picture in pictures]
    pixels = torch.from_numpy(processor.pixels(loaded)) if every and processor.image else None
    made = _padded(encoded, rows, pixels, processor, padding_side)
    return replace(made, extras=processor.extras(every, made, cfg)).check(cfg)


def _as_batch(question: Any, image: Any, answer: Any) -> tuple[list[str], list[list[Any]], list[str]]:
    """Questions, the images of each, and the answers, as lists of one length."""
    alone = isinstance(question, str)
    questions = [question] if alone else list(question)
    shared = not alone and not isinstance(image, list | tuple)
    images = [image] if alone else [image] * len(questions) if shared else list(image)
    answers = [answer] * len(questions) if isinstance(answer, str) else list(answer)
    for what, values in (("question", questions), ("answer", answers)):
        wrong = next((type(value).__name__ for value in values if not isinstance(value, str)), None)
        if wrong:
            raise LensError(f"{what} of type {wrong}; expected a string or a list of strings")
    if not questions:
        raise LensError("no question; expected a string or a list of strings")
    for what, values in (("images", images), ("answers", answers)):
        if len(values) != len(questions):
            raise LensError(f"{len(values)} {what} for {len(questions)} questions; expected one entry per question")
    return questions, [_list_of_images(entry) for entry in images], answers


def _list_of_images(entry: Any) -> list[Any]:
    if entry is None:
        return []
    return list(entry) if isinstance(entry, list | tuple) else [entry]


def _refuse_long(encoded: list[Encoded], layouts: list[list[Layout]], cfg: LlavaConfig) -> None:
    for i, (code, row) in enumerate(zip(encoded, layouts, strict=True)):
        if cfg.max_positions is not None and len(code.ids) > cfg.max_positions:
            slots = sum(layout.n_tokens for layout in row)
            raise LensError(
                f"question {i} takes {len(code.ids)} tokens, {len(code.ids) - slots} of text and {slots} of images; "
                f"the context holds {cfg.max_positions}"
            )


def _roles(prompt: Prompt, code: Encoded, layouts: list[Layout], processor: Processor, cfg: LlavaConfig) -> Roles:
    def label(token_id: int, span: tuple[int, int]) -> str:
        if layouts and token_id == cfg.image_token_id:
            return "image"
        around = layouts and prompt.text[slice(*span)] == processor.image_token  # marks that come with an image
        return "template" if around else prompt.label(*span)

    labels = tuple(label(*each) for each in zip(code.ids, code.spans, strict=True))
    vocabulary = len(processor.tokenizer)
    tokens = tuple(
        processor.tokenizer.convert_ids_to_tokens(i) if 0 <= i < vocabulary else processor.image_token for i in code.ids
    )
    return Roles(labels, tokens, in_a_row(layouts), prompt.text, tuple(code.spans), cut_from(layouts))


def _padded(
    encoded: list[Encoded],
    rows: list[Roles],
    pixels: Float[Tensor, "image channel height width"] | None,
    processor: Processor,
    side: str,
) -> Inputs:
    tokenizer = processor.tokenizer
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    longest = max(len(code.ids) for code in encoded)
    tokens = torch.full((len(encoded), longest), pad_id)
    mask = torch.zeros_like(tokens)
    for i, code in enumerate(encoded):
        gap = longest - len(code.ids)
        place = slice(gap, None) if side == "left" else slice(0, len(code.ids))
        tokens[i, place], mask[i, place] = torch.tensor(code.ids), 1
        rows[i] = rows[i].padded(before=gap) if side == "left" else rows[i].padded(after=gap)
    return Inputs(tokens, pixels, None if bool(mask.all()) else mask, tuple(rows))
