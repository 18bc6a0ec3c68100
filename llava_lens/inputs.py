"""What a model takes: tokens, pixel values and the role of every position; and `prepare`, which makes them.

Unusual: `Inputs` is a mapping with Hugging Face's names, so `model(inputs)`, `model(**inputs)` and, through `for_hf`,
Hugging Face's own model all take the same object. What a check finds is remembered until a tensor is edited in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llava_lens.config import LlavaConfig
from llava_lens.errors import LensError
from llava_lens.facts import MaskFacts, carry, fact, is_whole, known, mask_facts, tell, token_facts
from llava_lens.images import PixelMap, load_image
from llava_lens.prompt import Encoded, Processor, Prompt, encode, render, spell
from llava_lens.roles import Picture, Roles

__all__ = ["Inputs", "Picture", "Processor", "Roles", "load_image", "prepare"]

HF_NAMES = {"input_ids": "tokens", "pixel_values": "pixels", "attention_mask": "attention_mask", "roles": "roles"}


@dataclass(frozen=True, eq=False, repr=False)
class Inputs(Mapping[str, Any]):
    """One batch for a model. `attention_mask` is None where nothing is padded; `roles` has one entry per row.

    As a mapping it has the keys `input_ids`, `pixel_values`, `attention_mask` and `roles`, those that are not None.
    Raises `LensError` when the parts do not belong together.
    """

    tokens: Int[Tensor, "batch pos"]
    pixels: Float[Tensor, "image channel height width"] | None = None
    attention_mask: Int[Tensor, "_batch _pos"] | None = None
    roles: tuple[Roles, ...] | None = None

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.is_floating_point() or not self.tokens.numel():
            given = f"{self.tokens.dtype} of shape {tuple(self.tokens.shape)}"
            raise LensError(f"tokens are {given}; expected whole numbers [batch, pos]")
        shape = tuple(self.tokens.shape)
        if self.attention_mask is not None and tuple(self.attention_mask.shape) != shape:
            raise LensError(
                f"attention_mask has shape {tuple(self.attention_mask.shape)}; expected the tokens' {shape}"
            )
        if self.roles is not None and [len(roles) for roles in self.roles] != [shape[1]] * shape[0]:
            lengths = ", ".join(str(len(roles)) for roles in self.roles)
            raise LensError(f"roles of lengths {lengths}; expected {shape[0]} × {shape[1]}, as the tokens")
        if self.roles is not None and self.pixels is not None and len(self.pixels) != self.n_images:
            raise LensError(f"pixels of {len(self.pixels)} images; the roles speak of {self.n_images}")

    def __getitem__(self, key: str) -> Any:
        value = getattr(self, HF_NAMES[key]) if key in HF_NAMES else None
        if value is None:
            raise KeyError(f"{key!r}; there are {', '.join(self)}")
        return value

    def __iter__(self) -> Iterator[str]:
        return (key for key, name in HF_NAMES.items() if getattr(self, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        parts = [f"{self.batch_size} × {self.n_pos} tokens"]
        if self.pixels is not None:
            n, _, height, width = self.pixels.shape
            parts.append(f"{n} image{'s' * (n != 1)} {width}×{height}")
        if self.attention_mask is not None:
            parts.append(f"{int((self.attention_mask == 0).sum())} padding")
        if self.roles and self.roles[0].text:
            text = self.roles[0].text
            parts.append(repr(text if len(text) <= 60 else text[:59] + "…"))
        return f"Inputs({', '.join(parts)})"

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_pos(self) -> int:
        return self.tokens.shape[1]

    @property
    def n_images(self) -> int:
        """Images in all rows together."""
        if self.roles is not None:
            return sum(roles.n_images for roles in self.roles)
        return 0 if self.pixels is None else len(self.pixels)

    def for_hf(self) -> dict[str, Tensor]:
        """The tensors alone, for a model of transformers."""
        return {key: self[key] for key in self if key != "roles"}

    def with_roles(self, cfg: LlavaConfig, tokenizer: Any = None) -> Inputs:
        """Itself, with the roles that the tokens alone tell where none were given (`Inputs.from_tokens`)."""
        if self.roles is not None:
            return self
        mask = torch.ones_like(self.tokens) if self.attention_mask is None else self.attention_mask
        rows = zip(self.tokens.tolist(), mask.tolist(), strict=True)
        return replace(self, roles=tuple(_roles_of_tokens(ids, seen, cfg, tokenizer) for ids, seen in rows))

    def to(self, target: torch.device | torch.dtype | str) -> Inputs:
        """All tensors on another device, or the pixel values in another dtype; itself where that changes nothing."""
        if isinstance(target, torch.dtype):
            return self if self.pixels is None else replace(self, pixels=self.pixels.to(target))
        names = ("tokens", "pixels", "attention_mask")
        held = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        moved = {name: carry(tensor, tensor.to(target)) for name, tensor in held.items()}
        return self if all(moved[name] is held[name] for name in held) else replace(self, **moved)

    def row(self, i: int) -> Inputs:
        """One sample alone, without its padding."""
        if not -self.batch_size <= i < self.batch_size:
            raise LensError(f"row {i} of {self.batch_size}")
        i %= self.batch_size
        keep = torch.arange(self.n_pos) if self.attention_mask is None else self.attention_mask[i].nonzero()[:, 0].cpu()
        roles = None if self.roles is None else (self.roles[i].kept(keep.tolist()),)
        pixels = self.pixels
        if pixels is not None and self.batch_size > 1:
            first = sum(r.n_images for r in self._known_roles[:i])
            mine = pixels[first : first + self._known_roles[i].n_images]
            if known(pixels, "finite"):
                tell(mine, "finite", True)
            pixels = mine if len(mine) else None
        return Inputs(self.tokens[i : i + 1, keep.to(self.tokens.device)], pixels, None, roles)

    @property
    def _known_roles(self) -> tuple[Roles, ...]:
        if self.roles is None:
            raise LensError("these inputs carry no roles; make them with model.prepare or Inputs.from_tokens")
        return self.roles

    def roles_of(self, row: int | None = None) -> Roles:
        """The roles of one row, which must be named in a batch of several."""
        if row is None and self.batch_size > 1:
            raise LensError(f"a batch of {self.batch_size}: say which row=0 … {self.batch_size - 1}")
        return self._known_roles[row or 0]

    def positions(self, role: str, image: int | None = None, row: int | None = None) -> Int[Tensor, "selected"]:
        """Positions of a role in one row, as `Roles.positions`."""
        return self.roles_of(row).positions(role, image)

    def positions_of(self, word: str, row: int | None = None) -> Int[Tensor, "selected"]:
        """Positions of a word of the question or the given answer in one row, as `Roles.positions_of`."""
        return self.roles_of(row).positions_of(word)

    def check(self, cfg: LlavaConfig) -> Inputs:
        """Itself, if a model of this config can take it. Raises `LensError` with what was given and expected.

        Tensors that were found in order and have not been edited since are not looked at again.
        """
        self._check_tokens(cfg)
        self._check_slots(cfg)
        if self.pixels is not None and cfg.vision is not None:
            side = cfg.vision.image_size
            if tuple(self.pixels.shape[1:]) != (cfg.vision.n_channels, side, side):
                expected = f"[image, {cfg.vision.n_channels}, {side}, {side}]"
                raise LensError(f"pixel values of shape {tuple(self.pixels.shape)}; expected {expected}")
            if not fact(self.pixels, "finite", lambda pixels: bool(torch.isfinite(pixels).all())):
                raise LensError("pixel values that are not finite; expected numbers")
        return self

    def slots(self, cfg: LlavaConfig) -> Bool[Tensor, "batch pos"]:
        """Where pictures take the place of tokens."""
        if cfg.vision is None or cfg.image_token_id is None:
            return torch.zeros_like(self.tokens, dtype=torch.bool)
        return self.tokens == cfg.image_token_id

    def _check_slots(self, cfg: LlavaConfig) -> None:
        n = 0 if self.pixels is None else len(self.pixels)
        if n and cfg.vision is None:
            raise LensError(f"{n} image{'s' * (n != 1)} for a model without a vision tower; expected none")
        each, found = cfg.tokens_per_image, token_facts(self.tokens, cfg.image_token_id).slots if cfg.vision else [0]
        if sum(found) != n * each or any(each and row % each for row in found):
            rows = f"; by row {', '.join(map(str, found))}" if len(found) > 1 else ""
            hint = "; pixels are missing: pass pixel_values, or run under looking_at(inputs)" if not n else ""
            filled = f"{n} picture(s) fill {n * each} ({each} each)"
            raise LensError(f"{sum(found)} image tokens in the prompt, but {filled}{rows}{hint}")

    def _check_tokens(self, cfg: LlavaConfig) -> None:
        mask = self.attention_mask
        longest, binary, _ = MaskFacts(self.n_pos, True, True) if mask is None else mask_facts(mask)
        if cfg.max_positions is not None and longest > cfg.max_positions:
            images = max((r.labels.count("image") for r in self.roles or ()), default=0)
            raise LensError(
                f"a prompt of {longest} tokens (up to {images} of them image tokens); the context holds {cfg.n_ctx}"
            )
        low, high, _ = token_facts(self.tokens, cfg.image_token_id)
        if low <= high and not (low >= 0 and high < cfg.d_vocab):
            raise LensError(f"token ids {low} … {high}; expected 0 … {cfg.d_vocab - 1}")
        if not binary:
            raise LensError("an attention_mask with other values than 0 and 1")

    @classmethod
    def from_tokens(
        cls,
        tokens: Int[Tensor, "*batch pos"],
        cfg: LlavaConfig,
        pixels: Float[Tensor, "image channel height width"] | None = None,
        attention_mask: Int[Tensor, "..."] | None = None,
        tokenizer: Any = None,
    ) -> Inputs:
        """Wrap ready-made tokens; roles are then `image`, `padding` and `text`. Raises `LensError` as `check` does.

        With a `tokenizer` the roles know the tokens' strings, and words can be selected.
        """
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        mask = attention_mask[None] if attention_mask is not None and attention_mask.ndim == 1 else attention_mask
        inputs = cls(tokens, pixels, mask).check(cfg).with_roles(cfg, tokenizer)
        return replace(inputs, attention_mask=None) if mask is not None and is_whole(mask) else inputs


def _roles_of_tokens(ids: list[int], mask: list[int], cfg: LlavaConfig, tokenizer: Any) -> Roles:
    labels = tuple(
        "padding" if not seen else "image" if cfg.vision and i == cfg.image_token_id else "text"
        for i, seen in zip(ids, mask, strict=True)
    )
    strings, text, spans = spell(tokenizer, ids) if tokenizer is not None else ((), "", ())
    slots, each = labels.count("image"), cfg.tokens_per_image
    return Roles(labels, strings, (_picture(cfg),) * (slots // each) if slots else (), text, spans)


def _picture(cfg: LlavaConfig, pixel_map: PixelMap | None = None) -> Picture:
    assert cfg.vision is not None
    return Picture(cfg.vision.grid, cfg.vision.keep_class_token, pixel_map)


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
        render(processor, q, len(pictures), a, template)
        for q, pictures, a in zip(questions, images, answers, strict=True)
    ]
    encoded = [encode(processor, prompt, cfg) for prompt in prompts]
    _refuse_long(encoded, images, cfg)
    loaded = [load_image(picture) for pictures in images for picture in pictures]
    pixels, maps = processor.image(loaded) if loaded and processor.image else (None, ())
    rest = iter(maps)
    rows = [
        _roles(prompt, code, [_picture(cfg, next(rest)) for _ in pictures], processor, cfg)
        for prompt, code, pictures in zip(prompts, encoded, images, strict=True)
    ]
    made = _padded(encoded, rows, None if pixels is None else torch.from_numpy(pixels), processor, padding_side)
    return made.check(cfg)


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


def _refuse_long(encoded: list[Encoded], images: list[list[Any]], cfg: LlavaConfig) -> None:
    for i, (code, pictures) in enumerate(zip(encoded, images, strict=True)):
        if cfg.max_positions is not None and len(code.ids) > cfg.max_positions:
            slots = len(pictures) * cfg.tokens_per_image
            raise LensError(
                f"question {i} takes {len(code.ids)} tokens, {len(code.ids) - slots} of text and {slots} of images; "
                f"the context holds {cfg.n_ctx}"
            )


def _roles(prompt: Prompt, code: Encoded, pictures: list[Picture], processor: Processor, cfg: LlavaConfig) -> Roles:
    labels = tuple(
        "image" if pictures and i == cfg.image_token_id else prompt.label(*span)
        for i, span in zip(code.ids, code.spans, strict=True)
    )
    vocabulary = len(processor.tokenizer)
    tokens = tuple(
        processor.tokenizer.convert_ids_to_tokens(i) if 0 <= i < vocabulary else processor.image_token for i in code.ids
    )
    return Roles(labels, tokens, tuple(pictures), prompt.text, tuple(code.spans))


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
