"""Pictures on their way to pixel values, and the exact way back: which patch shows which part of the original.

Unusual: the pixel values come from Hugging Face's own image processor (the PIL one, so that they do not depend on
torchvision), and the map beside them from the same settings in whole numbers, so no edge is off by a rounding.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from llava_lens.errors import LensError, nearest

MAX_PIXELS = 100_000_000
"""The largest picture that is decoded, padded or resized to, in pixels."""
MAX_ASPECT = 100
"""The most that a picture's long side may exceed its short side by, as a factor."""

PIL_CLASSES = ("CLIPImageProcessorPil", "LlavaImageProcessorPil", "BlipImageProcessorPil")
"""The image processors of transformers that are used here, by name: what defines them is imported late."""

DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)
EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class NoSuchImage(LensError, FileNotFoundError):
    """A path at which there is no file."""


def load_image(source: Any) -> Image.Image:
    """One picture with 8 bits a channel from a path, a PIL image, or an array or tensor `[height, width(, channel)]`.

    A file is turned upright as its EXIF orientation says; a PIL image and an array are taken as they are. Arrays hold
    uint8, or floats in 0 … 1, with 1, 3 or 4 channels, last or (where no doubt is possible) first. Raises
    `LensError` for anything that is not one sensible picture (`NoSuchImage` for a missing file), before decoding
    where the size is at fault.

    >>> load_image(np.zeros((4, 6, 3), np.uint8)).size
    (6, 4)
    """
    if isinstance(source, str | Path):
        return _from_file(source)
    if isinstance(source, Image.Image):
        return _decoded(source, "the PIL image")
    if isinstance(source, Tensor):
        source = (source.float() if source.is_floating_point() else source).detach().cpu().numpy()
    if isinstance(source, np.ndarray) or hasattr(source, "__array__"):
        return Image.fromarray(_eight_bits(_channels_last(np.asarray(source))))
    raise LensError(f"an image of type {type(source).__name__}; expected a path, a PIL image, or an array")


def _from_file(source: str | Path) -> Image.Image:
    path = Path(source).expanduser()
    if str(source).startswith(("http://", "https://", "data:")):
        raise LensError(f"image {str(source)[:60]!r} is an address; expected a local file: download it first")
    if not path.is_file():
        if path.is_dir():
            raise LensError(f"image {str(source)!r} is a folder; expected one file in it")
        raise NoSuchImage(f"no image file {str(source)!r}{nearest(path.name, _names_beside(path))}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(path)
        except Image.DecompressionBombError as error:
            raise LensError(
                f"image {str(source)!r} is too large: {error}; the limit is {MAX_PIXELS:,} pixels"
            ) from None
        except UnidentifiedImageError:
            raise LensError(f"{str(source)!r} is not an image that Pillow can read; expected PNG, JPEG …") from None
        except DECODING_ERRORS as error:
            raise LensError(f"cannot read image {str(source)!r}: {error}") from error
        with image:
            return _decoded(image, f"image {str(source)!r}", upright=True)


def _names_beside(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []


def _decoded(image: Image.Image, what: str, upright: bool = False) -> Image.Image:
    check_size(*image.size, what)
    if image.mode not in EIGHT_BIT_MODES:
        raise LensError(
            f"{what} has mode {image.mode!r}; expected 8 bits a channel ('L', 'RGB' …): scale its values to 0 … 1 "
            "and pass them as a float array"
        )
    try:
        image.load()
        return ImageOps.exif_transpose(image) if upright else image
    except DECODING_ERRORS as error:
        raise LensError(f"cannot decode {what}, {image.size[0]}×{image.size[1]}: {error}") from error


def _channels_last(array: np.ndarray) -> np.ndarray:
    given = f"an image array of shape {tuple(array.shape)}"
    if array.ndim == 4:
        raise LensError(f"{given} holds {len(array)} pictures; expected one: pass list(array)")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    elif array.ndim == 3 and {array.shape[0], array.shape[2]} <= {1, 3, 4} and array.shape[0] == 3:
        raise LensError(f"{given}: channels first or last? pass a PIL image")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise LensError(f"{given}; expected [height, width] or [height, width, 1, 3 or 4]")
    check_size(array.shape[1], array.shape[0], given)
    return array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _eight_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise LensError(f"an image array of {array.dtype}; expected uint8 in 0 … 255 or floats in 0 … 1")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
        near = "; for 0 … 255 use uint8" if low >= 0 and 1 < high <= 255 else ""
        raise LensError(f"an image array of {array.dtype} from {low:g} to {high:g}; expected floats in 0 … 1{near}")
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)


def check_size(width: int, height: int, what: str) -> None:
    """Raises `LensError` for a picture without pixels, with more than `MAX_PIXELS`, or longer than `MAX_ASPECT`."""
    if width < 1 or height < 1:
        raise LensError(f"{what} has no pixels: {width}×{height}")
    if width * height > MAX_PIXELS:
        raise LensError(
            f"{what} is {width}×{height} = {width * height:,} pixels; the limit is {MAX_PIXELS:,}: resize it"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise LensError(f"{what} is {width}×{height}; the long side may be {MAX_ASPECT} times the short one: crop it")


@dataclass(frozen=True)
class Axis:
    """One axis of the way from a picture to its patches: pad, resize, crop, cut into `n` patches of `patch` pixels.

    `size`, `padded` and `resized` are lengths in pixels; `pad` is added in front, `crop` is cut off in front after
    the resize (negative: that many zeros were put in front).
    """

    size: int
    pad: int
    padded: int
    resized: int
    crop: int
    n: int
    patch: int

    def to_source(self, u: int | float) -> float:
        """The place in the original picture that ends up at `u` in the pixel values."""
        return (u + self.crop) * self.padded / self.resized - self.pad

    def patch_of(self, pixel: int) -> int | None:
        """The patch that the centre of an original pixel falls into."""
        unit = 2 * self.padded  # the centre, pixel + ½, in whole numbers of 1 / unit
        at = (2 * (pixel + self.pad) + 1) * self.resized - self.crop * unit
        index = at // (unit * self.patch)
        return index if 0 <= index < self.n else None

    def pixels_of(self, patch: int) -> slice:
        """The original pixels that a patch covers, wholly or in part; empty for one in the padding."""
        start = (patch * self.patch + self.crop) * self.padded - self.pad * self.resized
        stop = start + self.patch * self.padded
        first, last = start // self.resized, -(-stop // self.resized)
        return slice(min(max(first, 0), self.size), min(max(last, 0), self.size))


def grown(patches: Bool[np.ndarray, "row col"], buffer: int) -> Bool[np.ndarray, "row col"]:
    """A choice of patches with `buffer` patches around each chosen one.

    >>> grown(np.eye(3, dtype=bool), 1).tolist()
    [[True, True, True], [True, True, True], [True, True, True]]
    """
    if buffer < 0:
        raise LensError(f"a buffer of {buffer} patches; expected 0 or more")
    near = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= buffer for n in patches.shape]
    return near[0] @ patches @ near[1]


@dataclass(frozen=True)
class PixelMap:
    """Where each patch of one prepared picture comes from, in pixels of the original; exact."""

    x: Axis
    y: Axis

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the original picture."""
        return self.x.size, self.y.size

    def box_of_patch(self, row: int, col: int) -> tuple[float, float, float, float]:
        """The patch's box `(x0, y0, x1, y1)` in original pixels; outside the picture where that was padded."""
        return self._box(slice(col, col + 1), slice(row, row + 1))

    def region(self) -> tuple[float, float, float, float]:
        """The box of all patches together: the part of the picture that the model sees."""
        return self._box(slice(0, self.x.n), slice(0, self.y.n))

    def _box(self, cols: slice, rows: slice) -> tuple[float, float, float, float]:
        x, y = self.x, self.y
        left, right = (x.to_source(c * x.patch) for c in (cols.start, cols.stop))
        top, bottom = (y.to_source(r * y.patch) for r in (rows.start, rows.stop))
        return left, top, right, bottom

    def patch_of_pixel(self, x: int | float, y: int | float) -> tuple[int, int] | None:
        """Row and column of the patch that shows the centre of pixel (`x`, `y`); None if that was cropped away."""
        width, height = self.size
        if not (0 <= x < width and 0 <= y < height):
            raise LensError(f"pixel ({x}, {y}) is outside the picture of {width}×{height}")
        row, col = self.y.patch_of(int(y)), self.x.patch_of(int(x))
        return None if row is None or col is None else (row, col)

    def patches_of_mask(self, mask: Shaped[np.ndarray, "height width"], buffer: int = 0) -> Bool[np.ndarray, "row col"]:
        """The patches that a mask of the original picture touches, and those within `buffer` patches around them."""
        if mask.shape != self.size[::-1] or mask.dtype != np.bool_:
            expected = f"bool of shape {self.size[::-1]} (height, width)"
            raise LensError(f"a mask of {mask.dtype} and shape {mask.shape}; expected {expected}, as the picture")
        rows = np.stack([mask[self.y.pixels_of(r)].any(0) for r in range(self.y.n)])
        touched = np.stack([rows[:, self.x.pixels_of(c)].any(1) for c in range(self.x.n)], 1)
        return grown(touched, buffer)

    def to_original(self, scores: Shaped[np.ndarray, "row col"]) -> Float[np.ndarray, "height width"]:
        """One score per patch as one per pixel of the original picture; NaN where the picture was cropped away."""
        if scores.shape != (self.y.n, self.x.n):
            raise LensError(f"scores of shape {scores.shape}; expected {(self.y.n, self.x.n)}, one per patch")
        out = np.full(self.size[::-1], np.nan)
        rows, cols = ([axis.patch_of(i) for i in range(axis.size)] for axis in (self.y, self.x))
        seen_y = np.array([r is not None for r in rows])
        seen_x = np.array([c is not None for c in cols])
        kept = np.ix_([r for r in rows if r is not None], [c for c in cols if c is not None])
        out[np.ix_(seen_y, seen_x)] = np.asarray(scores, np.float64)[kept]
        return out


class ImageProcessor:
    """Hugging Face's PIL image processor of a checkpoint, with the map that belongs to it.

    Made at the first picture: what transformers imports for it takes longer than loading a small model.
    """

    def __init__(self, hf: Any, image_size: int, patch_size: int):
        pil_class_name(hf)
        self.given = hf
        self.image_size, self.patch_size = image_size, patch_size

    @cached_property
    def hf(self) -> Any:
        """The processor of transformers."""
        return pil_processor(self.given)

    @property
    def pads_to_square(self) -> bool:
        return hasattr(self.hf, "pad_to_square") and bool(self.hf.do_pad)

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Float[np.ndarray, "image 3 y x"], tuple[PixelMap, ...]]:
        """Pixel values `[image, channel, y, x]` and one map per picture. Raises `LensError` as `load_image` does."""
        maps = tuple(self.map(*image.size) for image in images)
        upright = [image if self.hf.do_convert_rgb else image.convert("RGB") for image in images]
        return self.hf(upright, return_tensors="np")["pixel_values"].astype(np.float32), maps

    def map(self, width: int, height: int) -> PixelMap:
        """The map of a picture of this size, without preparing it."""
        pad_x = pad_y = 0
        padded = (width, height)
        if self.pads_to_square:
            side = max(width, height)
            pad_x, pad_y, padded = (side - width) // 2, (side - height) // 2, (side, side)
            check_size(*padded, f"the picture of {width}×{height}, padded to a square,")
        resized = resized_size(self.hf.size, *padded) if self.hf.do_resize else padded
        check_size(*resized, f"the picture of {width}×{height}, resized for the model,")
        crop = (self.hf.crop_size.width, self.hf.crop_size.height) if self.hf.do_center_crop else resized
        if crop != (self.image_size, self.image_size):
            expected = f"{self.image_size}×{self.image_size}, the tower's image_size"
            raise LensError(f"the image processor makes pictures of {crop[0]}×{crop[1]}; expected {expected}")
        n = self.image_size // self.patch_size
        axes = (
            Axis(size, pad, whole, new, (new - kept) // 2, n, self.patch_size)
            for size, pad, whole, new, kept in zip((width, height), (pad_x, pad_y), padded, resized, crop, strict=True)
        )
        return PixelMap(*axes)


def resized_size(size: Any, width: int, height: int) -> tuple[int, int]:
    """Width and height after the resize that a processor's `size` asks for, as Hugging Face computes them."""
    from transformers.image_transforms import get_size_with_aspect_ratio
    from transformers.image_utils import get_image_size_for_max_height_width

    if size.shortest_edge and size.longest_edge:
        new_height, new_width = get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge)
    elif size.shortest_edge:
        short, long = sorted((width, height))
        new_short, new_long = size.shortest_edge, int(size.shortest_edge * long / short)
        new_width, new_height = (new_short, new_long) if width <= height else (new_long, new_short)
    elif size.max_height and size.max_width:
        new_height, new_width = get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
    elif size.height and size.width:
        new_height, new_width = size.height, size.width
    else:
        raise LensError(f"an image processor with size {size}; expected shortest_edge, or height and width")
    return new_width, new_height


def pil_processor(hf: Any) -> Any:
    """The PIL twin of a CLIP, LLaVA or BLIP image processor, given as an object or as the settings in its JSON file."""
    import transformers

    kind = getattr(transformers, pil_class_name(hf))
    return hf if isinstance(hf, kind) else kind.from_dict(_settings_of(hf))


def pil_class_name(hf: Any) -> str:
    """The name of that twin's class. Raises `LensError` for any other image processor."""
    for inherited in type(hf).__mro__:
        if inherited.__name__ in PIL_CLASSES:
            return inherited.__name__
    settings = _settings_of(hf)
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "CLIPImageProcessor"
    name = kind.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if f"{name}ImageProcessorPil" not in PIL_CLASSES:
        known = " or ".join(each.removesuffix("Pil") for each in PIL_CLASSES)
        raise LensError(f"an image processor of type {kind!r}; expected {known}")
    return f"{name}ImageProcessorPil"


def _settings_of(hf: Any) -> dict[str, Any]:
    return dict(hf) if isinstance(hf, dict) else hf.to_dict()
