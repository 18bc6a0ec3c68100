"""Images on their way to pixel values, with the exact map back to their pixels.

Unusual: the pixel values come from Hugging Face's own image processor (the PIL one, so that they do not depend on
torchvision), and the map beside them from the same settings in whole numbers, so no edge is off by a rounding.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from llava_lens.errors import LensError, nearest
from llava_lens.pictures import Axis, Layout, PixelMap

MAX_PIXELS = 100_000_000
"""The largest picture that is decoded, padded or resized to, in pixels."""
MAX_ASPECT = 100
"""The most that a picture's long side may exceed its short side by, as a factor."""

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


class ImageProcessor:
    """Hugging Face's PIL image processor of a checkpoint, with the map that belongs to it.

    A subclass names the `classes` of transformers that it stands for, and for one that cuts images into tiles
    overrides `pixels` and `layout`. The processor is made at the first picture: what transformers imports for it takes
    longer than loading a small model. `patch_size` is the side of what one token shows, in pixel values.
    """

    classes: tuple[str, ...] = ("CLIPImageProcessorPil", "LlavaImageProcessorPil")
    """The image processors of transformers that are used here, by name: what defines them is imported late."""

    def __init__(self, hf: Any, image_size: int, patch_size: int):
        pil_class_name(hf, self.classes)
        self.given = hf
        self.image_size, self.patch_size = image_size, patch_size

    @cached_property
    def hf(self) -> Any:
        """The processor of transformers."""
        return pil_processor(self.given, self.classes)

    @property
    def pads_to_square(self) -> bool:
        return hasattr(self.hf, "pad_to_square") and bool(self.hf.do_pad)

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Float[np.ndarray, "image 3 y x"], tuple[PixelMap, ...]]:
        """Pixel values `[image, channel, y, x]` and one map per picture. Raises `LensError` as `load_image` does."""
        maps = tuple(self.map(*image.size) for image in images)
        return self.hf(self.in_color(images), return_tensors="np")["pixel_values"].astype(np.float32), maps

    def in_color(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The images as the processor of transformers takes them."""
        return [image if self.hf.do_convert_rgb else image.convert("RGB") for image in images]

    def pixels(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "picture 3 y x"]:
        """Pixel values of every picture of every image, in order."""
        return self(images)[0]

    def layout(self, size: tuple[int, int], cfg: Any) -> Layout:
        """How an image of this width and height stands in a prompt, its pictures with their maps."""
        layout = cfg.layout(size)
        return replace(layout, pictures=tuple(replace(p, map=self.map(*size)) for p in layout.pictures))

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
        crops = getattr(self.hf, "do_center_crop", False)
        crop = (self.hf.crop_size.width, self.hf.crop_size.height) if crops else resized
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


def pil_processor(hf: Any, classes: Sequence[str]) -> Any:
    """The PIL twin of an image processor, given as an object or as the settings in its JSON file."""
    import transformers

    kind = getattr(transformers, pil_class_name(hf, classes))
    return hf if isinstance(hf, kind) else kind.from_dict(_settings_of(hf))


def pil_class_name(hf: Any, classes: Sequence[str]) -> str:
    """The name of that twin's class, one of `classes`. Raises `LensError` for any other image processor."""
    for inherited in type(hf).__mro__:
        if inherited.__name__ in classes:
            return inherited.__name__
    settings = _settings_of(hf)
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or classes[0]
    name = kind.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if f"{name}ImageProcessorPil" not in classes:
        expected = " or ".join(each.removesuffix("Pil") for each in classes)
        raise LensError(f"an image processor of type {kind!r}; expected {expected}")
    return f"{name}ImageProcessorPil"


def _settings_of(hf: Any) -> dict[str, Any]:
    return dict(hf) if isinstance(hf, dict) else hf.to_dict()
