"""What a model takes: tokens, pixel values and the role of every position (`prepare` makes them).

Unusual: `Inputs` is a mapping with Hugging Face's names, so `model(inputs)`, `model(**inputs)` and, through `for_hf`,
Hugging Face's own model all take the same object. What a check finds is remembered until a tensor is edited in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llava_lens.config import LlavaConfig
from llava_lens.errors import LensError
from llava_lens.facts import MaskFacts, carry, fact, is_whole, known, mask_facts, tell, token_facts
from llava_lens.pictures import Layout, Picture, in_a_row
from llava_lens.prompt import spell
from llava_lens.roles import Roles

PER_TOKEN = {"token_type_ids": 1, "mm_token_type_ids": 0}
"""Extras that hold a value for every token, and which a written one gets; the others hold one row for every image."""
HF_NAMES = {"input_ids": "tokens", "pixel_values": "pixels", "attention_mask": "attention_mask", "roles": "roles"}


@dataclass(frozen=True, eq=False, repr=False)
class Inputs(Mapping[str, Any]):
    """One batch for a model. `attention_mask` is None where nothing is padded; `roles` has one entry per row.

    `pixels` holds a picture for each thing that the tower sees at once: an image, or each tile of one that is cut.
    `extras` is what some models need beside them, by Hugging Face's names (`image_sizes`), one row per image.
    As a mapping it has the keys `input_ids`, `pixel_values`, `attention_mask` and `roles`, those that are not None,
    and the extras. Raises `LensError` when the parts do not belong together.
    """

    tokens: Int[Tensor, "batch pos"]
    pixels: Float[Tensor, "image channel height width"] | None = None
    attention_mask: Int[Tensor, "_batch _pos"] | None = None
    roles: tuple[Roles, ...] | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

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
        value = getattr(self, HF_NAMES[key]) if key in HF_NAMES else self.extras.get(key)
        if value is None:
            raise KeyError(f"{key!r}; there are {', '.join(self)}")
        return value

    def __iter__(self) -> Iterator[str]:
        yield from (key for key, name in HF_NAMES.items() if getattr(self, name) is not None)
        yield from self.extras

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
        """Pictures in all rows together."""
        if self.roles is not None:
            return sum(roles.n_images for roles in self.roles)
        return 0 if self.pixels is None else len(self.pixels)

    def for_hf(self) -> dict[str, Tensor]:
        """The tensors alone, for a model of transformers (`model.for_hf(inputs)` for one that lays them out anew)."""
        return {key: self[key] for key in self if key != "roles"}

    def with_roles(self, cfg: LlavaConfig, tokenizer: Any = None) -> Inputs:
        """Itself, with the roles that the tokens alone tell where none were given (`Inputs.from_tokens`)."""
        if self.roles is not None:
            return self
        mask = torch.ones_like(self.tokens) if self.attention_mask is None else self.attention_mask
        rows = zip(self.tokens.tolist(), mask.tolist(), self.layouts(cfg), strict=True)
        return replace(self, roles=tuple(_roles_of_tokens(*row, cfg, tokenizer) for row in rows))

    def to(self, target: torch.device | torch.dtype | str) -> Inputs:
        """All tensors on another device, or the pixel values in another dtype; itself where that changes nothing."""
        if isinstance(target, torch.dtype):
            return self if self.pixels is None else replace(self, pixels=self.pixels.to(target))
        names = ("tokens", "pixels", "attention_mask")
        held = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        moved = {name: carry(tensor, tensor.to(target)) for name, tensor in held.items()}
        extras = {name: carry(tensor, tensor.to(target)) for name, tensor in self.extras.items()}
        same = all(moved[name] is held[name] for name in held)
        same = same and all(extras[name] is self.extras[name] for name in extras)
        return self if same else replace(self, **moved, extras=extras)

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
        keep = keep.to(self.tokens.device)
        return Inputs(self.tokens[i : i + 1, keep], pixels, None, roles, self.extras_of(i, keep))

    def extras_of(self, row: int, positions: Any = slice(None), cfg: LlavaConfig | None = None) -> dict[str, Tensor]:
        """The extras of one row, of its images and of some of its positions; `cfg` where there are no roles."""
        found: dict[str, Tensor] = {}
        for name, values in self.extras.items():
            if name in PER_TOKEN:
                found[name] = values[row : row + 1, positions]
            elif self.batch_size == 1:
                found[name] = values
            else:
                counts = self._images_by_row(cfg)
                first = sum(counts[:row])
                if counts[row]:
                    found[name] = values[first : first + counts[row]]
        return found

    def extras_over(self, length: int) -> dict[str, Tensor]:
        """The extras of the same prompt when its text is as long as this, cut or with written tokens behind it."""
        return {
            name: torch.nn.functional.pad(values[:, :length], (0, max(0, length - self.n_pos)), value=PER_TOKEN[name])
            if name in PER_TOKEN
            else values
            for name, values in self.extras.items()
        }

    def _images_by_row(self, cfg: LlavaConfig | None) -> list[int]:
        if cfg is not None:
            return [len(layouts) for layouts in self.layouts(cfg)]
        return [roles.n_sources for roles in self._known_roles]

    def layouts(self, cfg: LlavaConfig) -> list[list[Layout]]:
        """How the images of each row stand in it, in order. Raises `LensError` where the image tokens do not fit them.

        Where the size of an image matters, its extras say it (`cfg.layouts`).
        """
        if cfg.vision is None:
            return [[] for _ in range(self.batch_size)]
        cfg = cfg.seeing(self.pixels)
        found = token_facts(self.tokens, cfg.image_token_id).slots
        layouts = cfg.layouts(self.extras)
        if layouts is None:
            layout = cfg.layout() if any(found) else Layout(1, ())
            rows = [[layout] * (row // layout.n_tokens) for row in found]
        else:
            rows = [list(_filling(row, layouts)) for row in found]
        taken = [sum(layout.n_tokens for layout in row) for row in rows]
        if taken != found:
            pairs = zip(found, taken, strict=True)
            by_row = "; ".join(f"{have} image tokens, but its images take {take}" for have, take in pairs)
            raise LensError(f"by row: {by_row}")
        return rows

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
            cfg.check_pixels(tuple(self.pixels.shape))
            if not fact(self.pixels, "finite", lambda pixels: bool(torch.isfinite(pixels).all())):
                raise LensError("pixel values that are not finite; expected numbers")
        return self

    def slots(self, cfg: LlavaConfig) -> Bool[Tensor, "batch pos"]:
        """Where pictures take the place of tokens."""
        if cfg.vision is None or cfg.image_token_id is None:
            return torch.zeros_like(self.tokens, dtype=torch.bool)
        return self.tokens == cfg.image_token_id

    def _check_slots(self, cfg: LlavaConfig) -> None:
        cfg = cfg.seeing(self.pixels)
        n = 0 if self.pixels is None else len(self.pixels)
        if n and cfg.vision is None:
            raise LensError(f"{n} image{'s' * (n != 1)} for a model without a vision tower; expected none")
        found = token_facts(self.tokens, cfg.image_token_id).slots if cfg.vision else [0]
        if not n and not any(found):
            return
        if cfg.layouts(self.extras) is not None:
            pictures = sum(len(layout.pictures) for row in self.layouts(cfg) for layout in row)
            if pictures != n:
                raise LensError(f"pixel values of {n} pictures; the images of these sizes are cut into {pictures}")
            return
        each = cfg.tokens_per_image
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
                f"a prompt of {longest} tokens (up to {images} of them image tokens); "
                f"the context holds {cfg.max_positions}"
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
        extras: Mapping[str, Tensor] | None = None,
    ) -> Inputs:
        """Wrap ready-made tokens; roles are then `image`, `padding` and `text`. Raises `LensError` as `check` does.

        With a `tokenizer` the roles know the tokens' strings, and words can be selected.
        """
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        mask = attention_mask[None] if attention_mask is not None and attention_mask.ndim == 1 else attention_mask
        inputs = cls(tokens, pixels, mask, None, extras or {}).check(cfg).with_roles(cfg, tokenizer)
        return replace(inputs, attention_mask=None) if mask is not None and is_whole(mask) else inputs


def _filling(n: int, layouts: Iterator[Layout]) -> Iterator[Layout]:
    """The next layouts, until they take `n` tokens."""
    while n > 0 and (layout := next(layouts, None)) is not None:
        n -= layout.n_tokens
        yield layout


def cut_from(layouts: list[Layout]) -> int | None:
    """The number of images, where one of them is cut into several pictures."""
    return None if all(len(layout.pictures) == 1 for layout in layouts) else len(layouts)


def _roles_of_tokens(ids: list[int], mask: list[int], layouts: list[Layout], cfg: LlavaConfig, tokenizer: Any) -> Roles:
    labels = tuple(
        "padding" if not seen else "image" if cfg.vision and i == cfg.image_token_id else "text"
        for i, seen in zip(ids, mask, strict=True)
    )
    strings, text, spans = spell(tokenizer, ids) if tokenizer is not None else ((), "", ())
    return Roles(labels, strings, in_a_row(layouts), text, spans, cut_from(layouts))


def copied(extras: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """The extras of `n` copies of a batch."""
    return {name: extra.repeat(n, *[1] * (extra.ndim - 1)) for name, extra in extras.items()}


def standing(inputs: Inputs, row: int, cfg: LlavaConfig) -> list[tuple[list[int], Picture]]:
    """The pictures of a row, each with the positions of its tokens."""
    at = inputs.slots(cfg)[row].nonzero()[:, 0].tolist()
    found, start = [], 0
    for layout in inputs.layouts(cfg)[row]:
        found += [([at[start + rank] for rank in picture.ranks or ()], picture) for picture in layout.ranked()]
        start += layout.n_tokens
    return found


def shown(inputs: Inputs, row: int, cfg: LlavaConfig) -> list[tuple[list[int], list[int]]]:
    """For each picture of a row the positions of its tokens, and which of the picture's features each shows."""
    assert cfg.vision is not None
    columns = cfg.seeing(inputs.pixels).vision.token_grid[1]  # type: ignore[union-attr]
    return [(where, picture.features(columns)) for where, picture in standing(inputs, row, cfg)]
