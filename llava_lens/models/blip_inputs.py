"""What BLIP takes: a picture, a question and the answer so far, and what every position of the three stacks is.

Unusual: picture and text stand in streams of their own, so each stack has roles of its own (`roles_in`); texts are
padded on the right, because BERT counts positions from the front.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llava_lens.errors import LensError, nearest
from llava_lens.facts import mask_facts, token_facts
from llava_lens.images import ImageProcessor, load_image
from llava_lens.inputs import Inputs
from llava_lens.models.blip_config import STACKS, BlipConfig
from llava_lens.pictures import Picture, PixelMap
from llava_lens.prompt import Processor
from llava_lens.roles import Roles
from llava_lens.shards import read_json

NAMES = {
    "input_ids": "tokens",
    "pixel_values": "pixels",
    "attention_mask": "attention_mask",
    "decoder_input_ids": "decoder_tokens",
    "decoder_attention_mask": "decoder_mask",
}
"""Hugging Face's names of the tensors, and ours."""
SETTINGS = ("processor_config.json", "preprocessor_config.json")
"""Where a checkpoint describes its image processor."""


class BlipImages(ImageProcessor):
    """BLIP's image processor, which resizes to a square."""

    classes = ("BlipImageProcessorPil",)


@dataclass(frozen=True, eq=False, repr=False)
class BlipInputs(Inputs):
    """One batch for BLIP: a question and a picture per row. Without `decoder_tokens` the answer is at its start.

    As a mapping it has Hugging Face's names, for those that are not None. `roles` are the question's positions,
    `pictures` the tower's and `answers` the decoder's, one entry per row each.
    """

    decoder_tokens: Int[Tensor, "_batch decoder_pos"] | None = None
    decoder_mask: Int[Tensor, "_batch decoder_pos"] | None = None
    pictures: tuple[Roles, ...] | None = None
    answers: tuple[Roles, ...] | None = None

    def __getitem__(self, key: str) -> Any:
        value = getattr(self, NAMES[key]) if key in NAMES else None
        if value is None:
            raise KeyError(f"{key!r}; there are {', '.join(self)}")
        return value

    def __iter__(self) -> Iterator[str]:
        return (key for key, name in NAMES.items() if getattr(self, name) is not None)

    def __repr__(self) -> str:
        said = f", {self.roles[0].text!r}" if self.roles and self.roles[0].text else ""
        return f"BlipInputs({self.batch_size} × {self.n_pos} tokens{said})"

    @property
    def n_images(self) -> int:
        return 0 if self.pixels is None else len(self.pixels)

    def for_hf(self) -> dict[str, Tensor]:
        """The tensors alone, for a model of transformers."""
        return {key: self[key] for key in self}

    def roles_in(self, stack: str, row: int | None = None) -> Roles:
        """The roles of one row's positions in a stack: "vision", "encoder" (the question) or "decoder" (the answer).

        The tower's know the picture's patches and pixels: `inputs.roles_in("vision").box_of_patch(2, 3)`.
        """
        held = dict(zip(STACKS, (self.pictures, self.roles, self.answers), strict=True))
        if stack not in held:
            raise LensError(f"no stack {stack!r}{nearest(stack, STACKS)}; the stacks are {', '.join(STACKS)}")
        rows = held[stack]
        if row is None and self.batch_size > 1:
            raise LensError(f"a batch of {self.batch_size}: say which row=0 … {self.batch_size - 1}")
        if rows is None:
            raise LensError(f"these inputs carry no roles in {stack!r}; make them with model.prepare")
        return rows[row or 0]

    def with_roles(self, cfg: Any, tokenizer: Any = None) -> BlipInputs:
        """Itself, with the roles that the tensors alone tell where none were given."""
        if self.roles is not None:
            return self
        ones = torch.ones_like(self.tokens) if self.attention_mask is None else self.attention_mask
        length = 1 if self.decoder_tokens is None else self.decoder_tokens.shape[1]
        seen = torch.ones(self.batch_size, length, dtype=torch.long) if self.decoder_mask is None else self.decoder_mask
        return replace(
            self,
            roles=tuple(Roles(tuple("text" if one else "padding" for one in row)) for row in ones.tolist()),
            pictures=(_tower_roles(cfg),) * self.n_images,
            answers=tuple(_answer_labels(row) for row in seen.tolist()),
        )

    def to(self, target: torch.device | torch.dtype | str) -> BlipInputs:
        """All tensors on another device, or the pixel values in another dtype."""
        if isinstance(target, torch.dtype):
            return self if self.pixels is None else replace(self, pixels=self.pixels.to(target))
        held = {name: getattr(self, name) for name in NAMES.values()}
        return replace(self, **{name: tensor.to(target) for name, tensor in held.items() if tensor is not None})

    def row(self, i: int) -> BlipInputs:
        """One sample alone, without its padding."""
        if not -self.batch_size <= i < self.batch_size:
            raise LensError(f"row {i} of {self.batch_size}")
        one = self.rows([i % self.batch_size])
        tokens, roles, _ = _unpadded(one.tokens, one.attention_mask, one.roles)
        changes = {"tokens": tokens, "roles": roles, "attention_mask": None}
        if one.decoder_tokens is not None:
            answer, answers, _ = _unpadded(one.decoder_tokens, one.decoder_mask, one.answers)
            changes |= {"decoder_tokens": answer, "answers": answers, "decoder_mask": None}
        return replace(one, **changes)

    def rows(self, rows: list[int]) -> BlipInputs:
        """Some rows of the batch, padding kept."""
        held = {name: getattr(self, name) for name in NAMES.values()}
        parts = {name: tensor[rows] for name, tensor in held.items() if tensor is not None}
        told = {name: getattr(self, name) for name in ("roles", "pictures", "answers")}
        return replace(
            self, **parts, **{name: tuple(each[i] for i in rows) for name, each in told.items() if each is not None}
        )

    def check(self, cfg: Any) -> BlipInputs:
        """Itself, if a model of this config can take it. Raises `LensError` with what was given and expected."""
        _check_text("question", self.tokens, self.attention_mask, self.batch_size, cfg)
        if self.decoder_tokens is not None:
            _check_text("answer", self.decoder_tokens, self.decoder_mask, self.batch_size, cfg)
        elif self.decoder_mask is not None:
            raise LensError("decoder_attention_mask without decoder_input_ids; expected both or neither")
        vision = cfg.vision
        shape = (self.batch_size, vision.n_channels, vision.image_size, vision.image_size)
        if self.pixels is None or tuple(self.pixels.shape) != shape:
            given = "no pixel values" if self.pixels is None else f"pixel values of shape {tuple(self.pixels.shape)}"
            raise LensError(f"{given}; expected {shape}, a picture per question")
        return self


def _check_text(what: str, tokens: Tensor, mask: Tensor | None, rows: int, cfg: BlipConfig) -> None:
    if tokens.ndim != 2 or len(tokens) != rows or not tokens.numel():
        raise LensError(f"{what} tokens of shape {tuple(tokens.shape)}; expected [{rows}, pos]")
    if tokens.shape[1] > cfg.text.n_ctx:
        raise LensError(f"the {what} takes {tokens.shape[1]} tokens; the context holds {cfg.text.n_ctx}")
    low, high, _ = token_facts(tokens, None)
    if not 0 <= low <= high < cfg.d_vocab:
        raise LensError(f"token ids {low} … {high} in the {what}; expected 0 … {cfg.d_vocab - 1}")
    if mask is None:
        return
    if mask.shape != tokens.shape or not mask_facts(mask).binary:
        raise LensError(f"the {what}'s mask {tuple(mask.shape)}; expected zeros and ones, {tuple(tokens.shape)}")
    if not bool(mask.any(-1).all()):
        raise LensError(f"a row of the {what} that is nothing but padding")


def _unpadded(tokens: Tensor, mask: Tensor | None, roles: tuple[Roles, ...] | None) -> tuple[Tensor, Any, list[int]]:
    """One row's tokens and roles where its mask is on."""
    keep = list(range(tokens.shape[1])) if mask is None else mask[0].nonzero()[:, 0].tolist()
    return tokens[:, keep], None if roles is None else (roles[0].kept(keep),), keep


def _tower_roles(cfg: BlipConfig, pixel_map: PixelMap | None = None) -> Roles:
    return Roles(("image",) * cfg.vision.n_ctx, pictures=(Picture(cfg.vision.grid, True, pixel_map),))


def _answer_labels(seen: list[int]) -> Roles:
    return Roles(tuple("padding" if not one else "answer" if i else "system" for i, one in enumerate(seen)))


# ---- from a question and a picture


def prepare(processor: Any, cfg: BlipConfig, question: Any, image: Any, answer: Any = "") -> BlipInputs:
    """Questions, a picture each (or one for all) and the starts of answers as inputs, with roles in every stack.

    Raises `LensError` for what is missing, does not fit together or is too long.
    """
    questions = [question] if isinstance(question, str) else list(question)
    images = list(image) if isinstance(image, list | tuple) else [image] * len(questions)
    answers = [answer] * len(questions) if isinstance(answer, str) else list(answer)
    if not questions or not len(questions) == len(images) == len(answers):
        raise LensError(f"{len(questions)} questions, {len(images)} images, {len(answers)} answers; expected as many")
    wrong = next((text for text in questions if not isinstance(text, str) or not text.strip()), None)
    if wrong is not None or any(each is None for each in images):
        raise LensError(f"question {wrong!r}; expected some text" if wrong is not None else "BLIP needs a picture")
    pixels, maps = processor.image([load_image(each) for each in images])
    asked = [_encode(processor.tokenizer, text, True) for text in questions]
    said = [_answer(processor.tokenizer, text, cfg) for text in answers]
    tokens, mask, roles = _padded(asked, cfg.pad_token_id)
    decoder_tokens, decoder_mask, answer_roles = _padded(said, cfg.pad_token_id)
    pictures = tuple(_tower_roles(cfg, each) for each in maps)
    return BlipInputs(
        tokens=tokens,
        pixels=torch.from_numpy(pixels),
        attention_mask=mask,
        roles=roles,
        decoder_tokens=decoder_tokens,
        decoder_mask=decoder_mask,
        pictures=pictures,
        answers=answer_roles,
    ).check(cfg)


def _encode(tokenizer: Any, text: str, special: bool) -> tuple[list[int], Roles]:
    """Token ids and roles of a text; marks put around it are `system` before it and `template` behind it."""
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids, spans = list(out["input_ids"]), [tuple(span) for span in out["offset_mapping"]]
    unknown = [text[start:end] for i, (start, end) in zip(ids, spans, strict=True) if i == tokenizer.unk_token_id]
    if unknown:
        words = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens]
        hints = [f"{word!r}{nearest(word.lower(), words)}" for word in dict.fromkeys(unknown)]
        raise LensError(f"words that the tokenizer does not know: {' | '.join(hints)} | in {text!r}")
    inside = [i for i, (start, end) in enumerate(spans) if start < end]
    label = "question" if special else "answer"
    labels = tuple(
        label if i in inside else "system" if not inside or i < inside[0] else "template" for i in range(len(ids))
    )
    return ids, Roles(labels, tuple(tokenizer.convert_ids_to_tokens(ids)), text=text, spans=tuple(spans))


def _answer(tokenizer: Any, text: str, cfg: BlipConfig) -> tuple[list[int], Roles]:
    """The start token and the answer so far."""
    ids, roles = _encode(tokenizer, text, False) if text else ([], Roles(()))
    start = "[start]"
    return [cfg.bos_token_id, *ids], replace(
        roles, labels=("system", *roles.labels), tokens=(start, *roles.tokens), spans=((0, 0), *roles.spans)
    )


def _padded(
    rows: list[tuple[list[int], Roles]], pad: int
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None, tuple[Roles, ...]]:
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    roles = tuple(roles.padded(after=longest - len(ids)) for ids, roles in rows)
    return tokens, None if bool(mask.all()) else mask, roles


def processor_of(hf: Any, cfg: BlipConfig) -> Processor:
    """A `BlipProcessor` of transformers, or a tokenizer alone: then pictures become squares as BLIP's do."""
    return _processor(getattr(hf, "tokenizer", None) or hf, getattr(hf, "image_processor", None), cfg)


def read_processor(folder: Path, cfg: BlipConfig) -> Processor:
    """The tokenizer and the image settings that a checkpoint's folder holds."""
    from transformers import AutoTokenizer

    found = [read_json(folder / name) for name in SETTINGS if (folder / name).is_file()]
    settings = [each.get("image_processor", each) for each in found]
    told = [each for each in settings if "size" in each]
    return _processor(AutoTokenizer.from_pretrained(folder), told[0] if told else None, cfg)


def _processor(tokenizer: Any, settings: Any, cfg: BlipConfig) -> Processor:
    side = {"height": cfg.vision.image_size, "width": cfg.vision.image_size}
    settings = settings or {"image_processor_type": "BlipImageProcessor", "size": side}
    return Processor(tokenizer, BlipImages(settings, cfg.vision.image_size, cfg.vision.patch_size))
