"""LLaVA-NeXT (1.6): an image is seen whole and in tiles; the tiles' features stand as one grid, line ends marked.

Unusual: an image's view as a whole and each of its tiles are pictures of their own; of a tile only the patches that are
no padding have tokens, and the line ends between them belong to no picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from llava_lens.config import LlavaConfig
from llava_lens.errors import LensError
from llava_lens.images import ImageProcessor, check_size
from llava_lens.inputs import Inputs
from llava_lens.model import HookedLlava
from llava_lens.pictures import Axis, Layout, Picture, PixelMap
from llava_lens.prompt import Processor
from llava_lens.rename import LLAVA_TABLE, Fold, Row

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Line:
    """One axis of the grid of all tiles: `tiles` of `n` patches, of which `cut` at both ends show padding alone.

    `tokens` stand for the patches between: one for each, or fewer where the grid is made smaller.
    """

    tiles: int
    n: int
    cut: int
    tokens: int

    @property
    def shown(self) -> int:
        """Patches that are not cut off."""
        return self.tiles * self.n - 2 * self.cut

    def of_tile(self, tile: int) -> range:
        """The tokens whose middle lies in a tile."""
        if not self.shown:
            return range(0)
        ends = [tile * self.n, (tile + 1) * self.n]
        first, stop = (-(-(2 * (end - self.cut) * self.tokens - self.shown) // (2 * self.shown)) for end in ends)
        return range(max(0, min(first, self.tokens)), max(0, min(stop, self.tokens)))


@dataclass(frozen=True)
class Tiled(Layout):
    """An image's own view in `n` × `n` tokens, then the grid of its tiles, a mark behind each of its lines."""

    down: Line
    across: Line

    @classmethod
    @lru_cache(maxsize=512)
    def of(cls, down: Line, across: Line) -> Tiled:
        """The layout of these lines; pictures in the order of the pixel values."""
        n = down.n
        pictures = [Picture((n, n), ranks=tuple(range(n * n)))]
        for tile in range(down.tiles * across.tiles):
            i, j = divmod(tile, across.tiles)
            rows, cols = down.of_tile(i), across.of_tile(j)
            ranks = tuple(n * n + row * (across.tokens + 1) + col for row in rows for col in cols)
            offset = (max(0, down.cut - i * n), max(0, across.cut - j * n))
            mixed = (down.tokens, across.tokens) != (down.shown, across.shown)
            pictures.append(Picture((len(rows), len(cols)), False, None, (0, 0) if mixed else offset, ranks, mixed))
        return cls(n * n + down.tokens * (across.tokens + 1), tuple(pictures), down, across)


@lru_cache(maxsize=512)
def order(layout: Layout, columns: int, n_features: int, device: torch.device) -> Int[Tensor, " token"]:
    """Which of an image's features, counted through all its pictures, each token is; a line's end is the one behind."""
    found = [len(layout.pictures) * n_features] * layout.n_tokens
    for number, picture in enumerate(layout.ranked()):
        for rank, feature in zip(picture.ranks or (), picture.features(columns), strict=True):
            found[rank] = number * n_features + feature
    return torch.tensor(found, device=device)


@dataclass(frozen=True, kw_only=True)
class LlavaNextConfig(LlavaConfig):
    """LLaVA-NeXT's facts; `resolutions` are the (height, width) that an image may be padded to and cut into tiles."""

    families = ("llava_next",)
    architecture = "LlavaNextForConditionalGeneration"

    resolutions: tuple[tuple[int, int], ...]

    @classmethod
    def facts_of(cls, hf: Any) -> dict[str, Any]:
        """Raises `ValueError` as the tower's config does, and for tiles that no feature of a class token fits into."""
        facts = super().facts_of(hf)
        resolutions, side = (
            tuple((height, width) for height, width in hf.image_grid_pinpoints),
            hf.vision_config.image_size,
        )
        if facts["vision"].keep_class_token:
            raise ValueError(
                "vision_feature_select_strategy 'full' with a class token; expected 'default': patches alone"
            )
        bad = [each for each in resolutions if min(each) < side or each[0] % side or each[1] % side]
        if bad or not resolutions:
            raise ValueError(f"image_grid_pinpoints {bad or resolutions}; expected pairs of multiples of {side}")
        vision = replace(facts["vision"], joined_whole=True)
        return facts | {"vision": vision, "resolutions": resolutions, "tie_word_embeddings": hf.tie_word_embeddings}

    def layout(self, size: Size | None = None) -> Layout:
        """The whole view and the tiles of an image. Raises `LensError` without a size."""
        if self.vision is None or size is None:
            raise LensError("an image of unknown size; expected image_sizes [image, (height, width)] beside the pixels")
        return Tiled.of(*self.lines(size))

    def lines(self, size: Size) -> tuple[Line, Line]:
        """The grid of an image's tiles, down and across, as transformers computes it."""
        assert self.vision is not None
        (width, height), n, side = size, self.vision.grid[0], self.vision.image_size
        down, across = (length // side for length in self.resolution(size))
        rows, cols = down * n, across * n
        if width / height > cols / rows:
            cut = (rows - int(round(height * (cols / width), 7))) // 2, 0
        else:
            cut = 0, (cols - int(round(width * (rows / height), 7))) // 2
        return Line(down, n, cut[0], rows - 2 * cut[0]), Line(across, n, cut[1], cols - 2 * cut[1])

    def resolution(self, size: Size) -> tuple[int, int]:
        """Height and width that an image is resized and padded to."""
        return _resolution(size, self.resolutions)


@lru_cache(maxsize=512)
def _resolution(size: Size, resolutions: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    from transformers.image_processing_utils import select_best_resolution

    return select_best_resolution(size[::-1], list(resolutions))


class LlavaNextImages(ImageProcessor):
    """Makes the whole image as small as a tile, and cuts it, padded to the resolution that fits best, into tiles."""

    classes = ("LlavaNextImageProcessorPil",)

    def pixels(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "picture 3 y x"]:
        made = self.hf(self.in_color(images), do_pad=False)["pixel_values"]
        return np.concatenate([np.asarray(each, np.float32) for each in made])

    def layout(self, size: Size, cfg: Any) -> Layout:
        """The whole view, then its tiles in reading order. Raises `LensError` for settings that are not the model's."""
        given = tuple(map(tuple, self.hf.image_grid_pinpoints))
        if given != cfg.resolutions:
            raise LensError(f"image_grid_pinpoints {given}; expected the config's {cfg.resolutions}")
        layout, whole = cfg.layout(size), self.map(*size)
        if not isinstance(layout, Tiled):
            return replace(layout, pictures=tuple(replace(picture, map=whole) for picture in layout.pictures))
        resized = self.resized(size, *cfg.resolution(size))
        maps = [
            PixelMap(self.tile(layout.across, size[0], resized[0], j), self.tile(layout.down, size[1], resized[1], i))
            for i in range(layout.down.tiles)
            for j in range(layout.across.tiles)
        ]
        pairs = zip(layout.pictures, [whole, *maps], strict=True)
        return replace(layout, pictures=tuple(replace(picture, map=each) for picture, each in pairs))

    def map(self, width: int, height: int) -> PixelMap:
        """The map of the whole view, which keeps no aspect ratio."""
        side, n = self.image_size, self.image_size // self.patch_size
        size, crop = self.hf.size, self.hf.crop_size
        sides = {size.shortest_edge or size.height, size.shortest_edge or size.width}
        sides |= {crop.height, crop.width} if crop else set()
        if sides != {side}:
            raise LensError(f"the image processor makes tiles of {size} and {crop}; expected {side}, as the tower's")
        return PixelMap(*(Axis(length, 0, length, side, 0, n, self.patch_size) for length in (width, height)))

    def resized(self, size: Size, height: int, width: int) -> Size:
        """Width and height in front of the padding to a resolution."""
        from transformers.image_processing_utils import get_patch_output_size

        image = np.broadcast_to(np.uint8(0), (3, size[1], size[0]))
        new_height, new_width = get_patch_output_size(image, (height, width), "channels_first")
        check_size(new_width, new_height, f"the picture of {size[0]}×{size[1]}, resized for the model,")
        return new_width, new_height

    def tile(self, line: Line, size: int, resized: int, number: int) -> Axis:
        """One axis of a tile's map: its tokens, evenly over the patches they stand for.

        Lengths are counted in the `unit`th part of a pixel, so that they are whole where tokens are fewer than patches.
        """
        own, patch = line.of_tile(number), self.patch_size
        unit = 1 if line.tokens == line.shown else line.tokens
        padding = (line.tiles * line.n * patch - resized) // 2
        step = patch if unit == 1 else patch * line.shown
        crop = (line.cut * patch - padding) * unit + own.start * step
        return Axis(size, 0, size, resized * unit, crop, len(own), step)


class LlavaNextProcessor(Processor):
    """Prompts in which an image takes as many tokens as its size asks for."""

    Images = LlavaNextImages

    @classmethod
    def image_processor(cls, settings: Any, cfg: LlavaConfig) -> ImageProcessor | None:
        if isinstance(cfg, LlavaNextConfig) and (not settings or isinstance(settings, dict)):
            settings = {"image_grid_pinpoints": [list(each) for each in cfg.resolutions]} | (settings or {})
        return super().image_processor(settings, cfg)

    def extras(self, images: Sequence[Image.Image], inputs: Any, cfg: LlavaConfig) -> dict[str, Tensor]:
        """The images' sizes, (height, width)."""
        return {"image_sizes": torch.tensor([image.size[::-1] for image in images])} if images else {}


class HookedLlavaNext(HookedLlava):
    """LLaVA-NeXT; logits are bit-equal to Hugging Face's. `image_newline` is the vector at the ends of lines."""

    Config = LlavaNextConfig
    Processor = LlavaNextProcessor
    extra_inputs = ("image_sizes",)
    weight_table = (
        *LLAVA_TABLE,
        Fold("model.image_newline", "image_newline"),
        Row("image_newline", "image_newline"),
    )

    def __init__(self, cfg: LlavaNextConfig, processor: Any = None):
        super().__init__(cfg, processor)
        self.image_newline = nn.Parameter(torch.zeros(cfg.d_model))

    def from_hf_layout(self, pixels: Any, extras: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """`[image, n, channel, height, width]`, where black tiles fill up the images, as the pictures there are.

        Raises `LensError` where the sizes do not say how many tiles are real.
        """
        if pixels is None or pixels.ndim != 5:
            return pixels, extras
        counts = [len(layout.pictures) for layout in self.cfg.layouts(extras) or ()]
        if len(counts) != len(pixels) or max(counts) > pixels.shape[1]:
            given = f"pixel_values of {len(pixels)} × up to {pixels.shape[1]} tiles"
            raise LensError(f"{given}; the images of these image_sizes are cut into {counts}")
        return torch.cat([each[:count] for each, count in zip(pixels, counts, strict=True)]), extras

    def arrange(self, image: Float[Tensor, "image feature d_model"], inputs: Inputs) -> Tensor:
        """The features of each image as its layout says, with the newline vector at the ends of lines."""
        found, start = [], 0
        for layout in (layout for row in inputs.layouts(self.cfg) for layout in row):
            stop = start + len(layout.pictures)
            found.append(self.pack(image[start:stop], layout))
            start = stop
        return torch.cat(found)

    def pack(self, image: Float[Tensor, "picture feature d_model"], layout: Layout) -> Float[Tensor, "token d_model"]:
        """The tokens of one image."""
        assert self.cfg.vision is not None
        which = order(layout, self.cfg.vision.token_grid[1], image.shape[1], image.device)
        return torch.cat((image.flatten(0, 1), self.image_newline[None].to(image.dtype)))[which]
