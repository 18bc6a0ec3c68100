"""What every position of a prompt is: its role, its token, and for an image position the patch and the pixels it shows.

Unusual: each position has exactly one label, and selectors are unions of labels, so roles never overlap or leave gaps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llava_lens.errors import LensError, nearest
from llava_lens.pictures import Axis, Picture, PixelMap

LABELS = ("system", "image", "question", "answer", "template", "text", "padding")
"""`system` stands before the question, `template` after it; `text` is text whose role is unknown."""
SELECTORS = {**{label: (label,) for label in LABELS}, "text": tuple(x for x in LABELS if x not in ("image", "padding"))}
SELECTORS["all"] = (*SELECTORS["text"], "image")
"""Labels that a selector unites; as a selector, `text` is every position that is neither image nor padding."""


@dataclass(frozen=True)
class Roles:
    """The roles of one batch row; every position is counted with the row's padding.

    `labels` holds one of `LABELS` per position, `tokens` the tokenizer's strings, `spans` each token's place in `text`.
    `cut_from` is the number of images that the pictures are cut from; None: each picture is an image.
    """

    labels: tuple[str, ...]
    tokens: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    cut_from: int | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.labels) - set(LABELS))
        if unknown:
            raise LensError(f"roles {unknown}; expected {', '.join(LABELS)}")
        slots, tokens = self.labels.count("image"), sum(picture.n_tokens for picture in self.pictures)
        ranks = [rank for picture in self.pictures for rank in picture.ranks or ()]
        apart = bool(ranks) and len(ranks) == tokens == len(set(ranks)) and max(ranks) < slots
        if not apart and slots != tokens:
            raise LensError(f"{slots} image positions; the {len(self.pictures)} images take {tokens}")
        for name, values in (("tokens", self.tokens), ("spans", self.spans)):
            if values and len(values) != len(self.labels):
                raise LensError(f"{len(values)} {name} for {len(self.labels)} positions")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        counts = {label: self.labels.count(label) for label in LABELS if label in self.labels}
        return f"Roles({', '.join(f'{n} {label}' for label, n in counts.items())})"

    @property
    def n_images(self) -> int:
        return len(self.pictures)

    @property
    def n_sources(self) -> int:
        """Images that the pictures are cut from; as many as pictures where none is cut."""
        return len(self.pictures) if self.cut_from is None else self.cut_from

    @property
    def last(self) -> int:
        """The last position that is not padding: where the next token is predicted."""
        return max(i for i, label in enumerate(self.labels) if label != "padding")

    # Selecting positions

    def positions(self, role: str, image: int | None = None) -> Int[Tensor, "selected"]:
        """Positions of a role, ascending: a label, `last`, `text` (all but images) or `all` (all but padding).

        With `image`, those of that image alone, its class token included. A role that does not occur gives none.

        >>> Roles(("padding", "system", "question", "question")).positions("question")
        tensor([2, 3])
        """
        if role == "last":
            chosen = [self.last]
        elif role in SELECTORS:
            chosen = [i for i, label in enumerate(self.labels) if label in SELECTORS[role]]
        else:
            known = [*SELECTORS, "last"]
            raise LensError(f"unknown role {role!r}{nearest(role, known)}; known: {', '.join(known)}")
        if image is not None:
            if role != "image":
                raise LensError(f"role {role!r} of image {image}: only the role 'image' belongs to an image")
            chosen = [chosen[rank] for rank in self._ranks(image)]
        return torch.tensor(chosen, dtype=torch.long)

    def _ranks(self, image: int) -> Sequence[int]:
        """Which of the image positions belong to one picture."""
        picture = self.picture(image)
        if picture.ranks is not None:
            return picture.ranks
        start = sum(before.n_tokens for before in self.pictures[:image])
        return range(start, start + picture.n_tokens)

    def patch_positions(self, image: int = 0) -> Int[Tensor, "row col"]:
        """The position of every patch of one image, without its class token."""
        picture = self.picture(image)
        return self.positions("image", image)[int(picture.class_token) :].reshape(picture.grid)

    def token_of(self, row: int, col: int, image: int = 0) -> int:
        """The position of one patch."""
        rows, cols = self.grid(image)
        if not (0 <= row < rows and 0 <= col < cols):
            raise LensError(
                f"patch ({row}, {col}) of image {image}; expected rows 0 … {rows - 1}, columns 0 … {cols - 1}"
            )
        return int(self.patch_positions(image)[row, col])

    def patch_of(self, position: int) -> tuple[int, int, int] | None:
        """`(image, row, col)` of a position; None where none stands (text, padding, a class token, a line's end)."""
        if not 0 <= position < len(self):
            raise LensError(f"position {position}; expected 0 … {len(self) - 1}")
        if self.labels[position] != "image":
            return None
        nth = self.labels[:position].count("image")
        for image, picture in enumerate(self.pictures):
            ranks = self._ranks(image)
            if nth in ranks:
                patch = ranks.index(nth) - picture.class_token
                return None if patch < 0 else (image, *divmod(patch, picture.grid[1]))
        return None

    def positions_of(self, word: str) -> Int[Tensor, "selected"]:
        """Positions of every token of every occurrence of a word (or words) in the question and the given answer.

        Letter case does not matter. Raises `LensError` with the nearest words there are when it does not occur.
        """
        if not self.spans:
            raise LensError("these roles carry no text; make the inputs with model.prepare to select by word")
        found = self._said(rf"(?<!\w){re.escape(word.strip())}(?!\w)") if word.strip() else []
        if not found:
            words = [there for there, _ in self._said(r"[\w'-]+")]
            hint = nearest(word.lower(), [there.lower() for there in words]) or f": {' '.join(words)}"
            raise LensError(f"no word {word!r} in the question or the given answer{hint}")
        return torch.tensor(sorted({i for _, touched in found for i in touched}), dtype=torch.long)

    def _said(self, pattern: str) -> list[tuple[str, list[int]]]:
        """What a pattern matches in the question and the given answer, with the positions it touches."""
        found = []
        for match in re.finditer(pattern, self.text, re.IGNORECASE):
            first, stop = match.span()
            touched = [i for i, (start, end) in enumerate(self.spans) if start < min(end, stop) and first < end]
            if touched and all(self.labels[i] in ("question", "answer", "text") for i in touched):
                found.append((match.group(), touched))
        return found

    # Pictures: from patches to the original's pixels and back

    def _index(self, image: int) -> int:
        if not 0 <= image < self.n_images:
            there = f"0 … {self.n_images - 1}" if self.n_images else "none: the prompt has no image"
            raise LensError(f"image {image}; expected {there}")
        return image

    def picture(self, image: int = 0) -> Picture:
        """The facts about one image; raises `LensError` when there are fewer."""
        return self.pictures[self._index(image)]

    def grid(self, image: int = 0) -> tuple[int, int]:
        """Patches of an image as (rows, columns)."""
        return self.picture(image).grid

    def map(self, image: int = 0) -> PixelMap:
        """The way from an image's patches to its original pixels; raises `LensError` where it is unknown."""
        found = self.picture(image).map
        if found is None:
            raise LensError("how the picture became pixel values is unknown here; make the inputs with model.prepare")
        return found

    def image_size(self, image: int = 0) -> tuple[int, int]:
        """Width and height of the original picture."""
        return self.map(image).size

    def region(self, image: int = 0) -> tuple[float, float, float, float]:
        """The box `(x0, y0, x1, y1)` of the original that all patches cover; outside it where it was padded."""
        return self.map(image).region()

    def box_of_patch(self, row: int, col: int, image: int = 0) -> tuple[float, float, float, float]:
        """The box `(x0, y0, x1, y1)` of one patch in original pixels; outside the picture where that was padded."""
        self.token_of(row, col, image)
        return self.map(image).box_of_patch(row, col)

    def patch_of_pixel(self, x: int | float, y: int | float, image: int = 0) -> tuple[int, int] | None:
        """Row and column of the patch that shows the centre of an original pixel; None when it was cropped away."""
        return self.map(image).patch_of_pixel(x, y)

    def patches_of_mask(self, mask: Any, image: int = 0, buffer: int = 0) -> Bool[Tensor, "row col"]:
        """The patches that a boolean mask `[height, width]` of the original touches, grown by `buffer` patches."""
        return torch.from_numpy(self.map(image).patches_of_mask(np.asarray(mask), buffer))

    def to_original(self, scores: Any, image: int = 0) -> Float[np.ndarray, "height width"]:
        """Scores `[row, col]` of the patches laid over the original's pixels; NaN where it was cropped away."""
        values = scores.detach().cpu().numpy() if isinstance(scores, Tensor) else np.asarray(scores)
        return self.map(image).to_original(values)

    # Changing shape, and JSON

    def padded(self, before: int = 0, after: int = 0) -> Roles:
        """The same row with padding put around it."""
        return replace(
            self,
            labels=("padding",) * before + self.labels + ("padding",) * after,
            tokens=(("",) * before + self.tokens + ("",) * after) if self.tokens else (),
            spans=(((0, 0),) * before + self.spans + ((0, 0),) * after) if self.spans else (),
        )

    def kept(self, positions: Sequence[int]) -> Roles:
        """The same row with only these positions; images must be kept whole."""
        return replace(
            self,
            labels=tuple(self.labels[i] for i in positions),
            tokens=tuple(self.tokens[i] for i in positions) if self.tokens else (),
            spans=tuple(self.spans[i] for i in positions) if self.spans else (),
        )

    def to_json(self) -> str:
        """Everything as one JSON text, for a cache's manifest."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Roles:
        """The roles that `to_json` wrote.

        >>> roles = Roles(("system", "image"), ("<s>", "<image>"), (Picture((1, 1)),))
        >>> Roles.from_json(roles.to_json()) == roles
        True
        """
        facts = json.loads(text)
        facts["labels"], facts["tokens"] = tuple(facts["labels"]), tuple(facts["tokens"])
        facts["spans"] = tuple((start, end) for start, end in facts["spans"])
        facts["pictures"] = tuple(
            Picture(
                tuple(p["grid"]),
                p["class_token"],
                p["map"] and PixelMap(Axis(**p["map"]["x"]), Axis(**p["map"]["y"])),
                tuple(p.get("offset", (0, 0))),
                None if p.get("ranks") is None else tuple(p["ranks"]),
                p.get("mixed", False),
            )
            for p in facts["pictures"]
        )
        return cls(**facts)
