"""Pictures in, pixel values and the map back out; the truth is Hugging Face's PIL processor on painted pictures."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from llava_lens.errors import LensError
from llava_lens.images import MAX_PIXELS, ImageProcessor, NoSuchImage, load_image, resized_size
from llava_lens.pictures import Axis

SIDE, PATCH = 24, 6
SIZES = [(24, 24), (25, 24), (24, 31), (97, 41), (41, 97), (7, 5), (13, 40), (200, 3), (48, 48), (1, 1)]
"""Widths and heights: exact, odd by one, odd both ways, smaller than the model's, long, even factors, one pixel."""
SETTINGS: dict[str, Any] = {
    "shortest edge, cropped": CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE),
    "larger than the crop": CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size=SIDE),
    "smaller than the crop": CLIPImageProcessorPil(size={"shortest_edge": 17}, crop_size=SIDE),
    "squeezed": CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False),
    "squeezed, then cropped": CLIPImageProcessorPil(size={"height": 30, "width": 41}, crop_size=SIDE),
    "not resized": CLIPImageProcessorPil(do_resize=False, crop_size=SIDE),
    "padded to a square": LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": SIDE}, crop_size=SIDE),
    "padded, larger than the crop": LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 31}, crop_size=SIDE),
    "LLaVA's, not padded": LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE),
}
EVERY_WAY = pytest.mark.parametrize("setting", SETTINGS)


def processor(setting: str, **changes: Any) -> ImageProcessor:
    hf = SETTINGS[setting]
    return ImageProcessor(type(hf)(**{**hf.to_dict(), **changes}), SIDE, PATCH)


def raw(setting: str, resample: Image.Resampling) -> ImageProcessor:
    """A processor whose pixel values are the picture's own 0 … 255 and whose padding, if any, is 0."""
    mean = {"image_mean": [0.0, 0.0, 0.0]}
    return processor(setting, resample=resample, do_rescale=False, do_normalize=False, **mean)


def pixel_ids(width: int, height: int) -> Image.Image:
    """A picture whose every pixel says where it is: column and row, both counted from 1, and 200 in blue."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x + 1, y + 1, np.full_like(x, 200)], -1).astype(np.uint8))


@EVERY_WAY
@pytest.mark.parametrize("size", SIZES)
def test_every_output_pixel_comes_from_where_the_map_says(setting: str, size: tuple[int, int]) -> None:
    pixels, (pixel_map,) = raw(setting, Image.Resampling.NEAREST)([pixel_ids(*size)])
    width, height = size
    for v, u in itertools.product(range(SIDE), range(SIDE)):
        x, y = pixel_map.x.to_source(u + 0.5), pixel_map.y.to_source(v + 0.5)
        column, row, inside = pixels[0, :, v, u].astype(int)
        assert bool(inside) == (0 <= x < width and 0 <= y < height)
        if inside:
            # A place exactly between two pixels may go to either.
            assert column - 1 in {int(x - 1e-9), int(x + 1e-9)} and row - 1 in {int(y - 1e-9), int(y + 1e-9)}
            box = pixel_map.box_of_patch(v // PATCH, u // PATCH)
            assert box[0] <= x <= box[2] and box[1] <= y <= box[3]


@EVERY_WAY
@pytest.mark.parametrize("size", SIZES)
def test_each_pixel_belongs_to_the_one_box_around_its_centre(setting: str, size: tuple[int, int]) -> None:
    pixel_map = processor(setting).map(*size)
    boxes = {(r, c): pixel_map.box_of_patch(r, c) for r in range(4) for c in range(4)}
    for x, y in itertools.product(range(0, size[0], 3), range(0, size[1], 3)):
        around = [p for p, (x0, y0, x1, y1) in boxes.items() if x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1]
        found = pixel_map.patch_of_pixel(x, y)
        assert [found] == around if found else around == []


@EVERY_WAY
@pytest.mark.parametrize("size", [(97, 41), (61, 90), (24, 31), (48, 48)])
def test_painting_a_mask_changes_the_patches_it_touches_and_no_others(setting: str, size: tuple[int, int]) -> None:
    """With the box filter a pixel counts only where it lies: touched ⊇ changed ⊇ painted centres inside."""
    prepared, rng = raw(setting, Image.Resampling.BOX), np.random.default_rng(0)
    width, height = size
    black = np.zeros((height, width, 3), np.uint8)
    before, (pixel_map,) = prepared([Image.fromarray(black)])
    for _ in range(12):
        (x0, x1), (y0, y1) = (sorted(rng.integers(0, n + 1, 2)) for n in size)
        mask = np.zeros((height, width), bool)
        mask[y0:y1, x0:x1] = True
        after, _ = prepared([Image.fromarray(np.where(mask[..., None], np.uint8(255), black))])
        changed = (after != before)[0].any(0).reshape(4, PATCH, 4, PATCH).any((1, 3))
        touched = pixel_map.patches_of_mask(mask)
        assert not (changed & ~touched).any()
        for row, col in np.argwhere(touched & ~changed):
            left, top, right, bottom = pixel_map.box_of_patch(int(row), int(col))
            centres_y, centres_x = (np.argwhere(mask) + 0.5).T
            inside = (left < centres_x) & (centres_x < right) & (top < centres_y) & (centres_y < bottom)
            assert not inside.any()


def photo(name: str) -> Image.Image:
    data = pytest.importorskip("skimage.data", reason="the photos come with scikit-image")
    path = Path(data.__file__).parent / f"{name}.png"
    if not path.exists():
        pytest.skip(f"this scikit-image does not ship {name}.png")
    return load_image(path)


@pytest.mark.parametrize("name", ["chelsea", "coffee"])
@pytest.mark.parametrize("upright", [True, False])
@EVERY_WAY
def test_photos_painted_patch_by_patch_with_the_real_bicubic_resize(name: str, upright: bool, setting: str) -> None:
    """The filter spreads a little; most of what painting a patch's box changes is in that patch."""
    picture = photo(name) if upright else photo(name).rotate(90, expand=True)
    if setting == "not resized":
        picture = picture.resize((picture.width // 10, picture.height // 10))
    prepared = processor(setting)
    before, (pixel_map,) = prepared([picture])
    shown = 0
    for row, col in itertools.product(range(4), range(4)):
        x0, y0, x1, y1 = pixel_map.box_of_patch(row, col)
        box = max(round(x0), 0), max(round(y0), 0), min(round(x1), picture.width), min(round(y1), picture.height)
        if box[2] - box[0] < 2 or box[3] - box[1] < 2:
            continue
        painted = picture.copy()
        crop = np.asarray(painted.crop(box))
        painted.paste(Image.fromarray(np.where(crop > 127, crop - 120, crop + 120).astype(np.uint8)), box[:2])
        change = np.abs(prepared([painted])[0] - before)[0].sum(0).reshape(4, PATCH, 4, PATCH).sum((1, 3))
        assert np.unravel_index(change.argmax(), change.shape) == (row, col)
        assert change[row, col] > 0.75 * change.sum()
        shown += 1
    assert shown >= 8


@pytest.mark.parametrize("name", ["chelsea", "coffee"])
def test_what_lies_outside_the_region_is_not_seen(name: str) -> None:
    picture, prepared = photo(name), processor("shortest edge, cropped")
    before, (pixel_map,) = prepared([picture])
    x0, y0, x1, y1 = pixel_map.region()
    assert (y0, y1) == (0, picture.height) and x1 - x0 == pytest.approx(picture.height, rel=0.01)
    far = np.asarray(picture).copy()
    support = 2 * picture.height / SIDE  # of the bicubic filter, in original pixels
    far[:, : int(x0 - support)] = 0
    far[:, int(x1 + support) + 1 :] = 0
    assert np.array_equal(prepared([Image.fromarray(far)])[0], before)
    assert pixel_map.patch_of_pixel(0, 0) is None and pixel_map.patch_of_pixel(picture.width // 2, 0) == (0, 2)


def test_masks_and_scores_against_loops() -> None:
    pixel_map, rng = processor("padded to a square").map(50, 31), np.random.default_rng(1)
    for density in (0.0, 0.001, 0.02):
        mask = rng.random((31, 50)) < density
        touched = np.zeros((4, 4), bool)
        for y, x in np.argwhere(mask):
            for r, c in itertools.product(range(4), range(4)):
                x0, y0, x1, y1 = pixel_map.box_of_patch(r, c)
                touched[r, c] |= x0 < x + 1 and x < x1 and y0 < y + 1 and y < y1
        assert np.array_equal(pixel_map.patches_of_mask(mask), touched)
        grown = np.array(
            [[touched[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].any() for c in range(4)] for r in range(4)]
        )
        assert np.array_equal(pixel_map.patches_of_mask(mask, buffer=1), grown)
    scores = rng.random((4, 4))
    laid = pixel_map.to_original(scores)
    for y, x in itertools.product(range(31), range(50)):
        assert laid[y, x] == scores[pixel_map.patch_of_pixel(x, y)]
    cropped = processor("shortest edge, cropped").map(50, 31).to_original(scores)
    assert np.isnan(cropped[:, 0]).all() and not np.isnan(cropped[:, 25]).any()


def test_the_map_is_whole_numbers_so_no_edge_is_rounded() -> None:
    axis = Axis(size=9, pad=0, padded=9, resized=27, crop=0, n=3, patch=9)
    assert [axis.patch_of(i) for i in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [axis.pixels_of(i) for i in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 9)]
    third = Axis(size=1000, pad=0, padded=1000, resized=999, crop=0, n=3, patch=333)
    assert third.pixels_of(1) == slice(333, 667) and third.patch_of(333) == 1 and third.patch_of(332) == 0


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 24},
        {"shortest_edge": 24, "longest_edge": 40},
        {"height": 20, "width": 30},
        {"max_height": 20, "max_width": 30},
    ],
)
def test_resized_size_is_hugging_faces(size: dict[str, int]) -> None:
    hf: Any = CLIPImageProcessorPil(size=size)
    for width, height in [(24, 24), (25, 24), (24, 31), (97, 41), (41, 97), (7, 5), (333, 500), (1023, 767)]:
        array = np.zeros((3, height, width), np.uint8)
        assert resized_size(hf.size, width, height) == hf.resize(array, hf.size).shape[:0:-1]


@EVERY_WAY
def test_pixel_values_are_hugging_faces_bit_for_bit(setting: str) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in SIZES]
    ours, _ = processor(setting)(pictures)
    theirs = SETTINGS[setting](pictures, return_tensors="np")["pixel_values"]
    assert ours.dtype == np.float32 and ours.tobytes() == theirs.astype(np.float32).tobytes()


def test_a_processor_in_memory_is_used_as_it_is() -> None:
    class Own(CLIPImageProcessorPil):
        pass

    own = Own(size={"shortest_edge": SIDE}, crop_size=SIDE)
    assert ImageProcessor(own, SIDE, PATCH).hf is own


def test_settings_from_any_generation_of_files_give_the_same_processor() -> None:
    old = {"crop_size": 24, "size": 24, "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor"}
    new = {**SETTINGS["shortest edge, cropped"].to_dict(), "image_processor_type": "CLIPImageProcessorFast"}
    maps = {ImageProcessor(settings, SIDE, PATCH).map(50, 31) for settings in (old, new)}
    assert maps == {processor("shortest edge, cropped").map(50, 31)}
    llava = {**SETTINGS["padded to a square"].to_dict(), "image_processor_type": "LlavaImageProcessorFast"}
    assert ImageProcessor(llava, SIDE, PATCH).map(50, 31) == processor("padded to a square").map(50, 31)
    with pytest.raises(LensError, match="type 'SiglipImageProcessor'; expected CLIP"):
        ImageProcessor({"image_processor_type": "SiglipImageProcessor"}, SIDE, PATCH)
    with pytest.raises(LensError, match="makes pictures of 24×24; expected 30×30"):
        ImageProcessor(old, 30, PATCH).map(50, 31)


# Getting a picture in


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that claims this size, whatever it holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(kind: str, **how: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, kind, **how)
    return out.getvalue()


FILES = {
    "note.txt": (b"not a picture", "is not an image"),
    "empty.png": (b"", "is not an image"),
    "cut.png": (encoded("PNG")[:4000], "cannot decode image .*cut.png', 64×64"),
    "cut.jpg": (encoded("JPEG")[:1000], "cannot decode image .*64×64: .*truncated"),
    "huge.png": (png(30_000, 30_000), rf"30000×30000 = 900,000,000 pixels; the limit is {MAX_PIXELS:,}|too large"),
    "large.png": (png(10_001, 10_000), rf"10001×10000 = 100,010,000 pixels; the limit is {MAX_PIXELS:,}: resize it"),
    "thin.png": (png(101, 1), "101×1; the long side may be 100 times the short one"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LensError, match=message):
        load_image(tmp_path / name)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb.png").write_bytes(png(12_000, 12_000))
    lazy = None
    with pytest.warns(Image.DecompressionBombWarning):
        lazy = Image.open(tmp_path / "bomb.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    with lazy, pytest.raises(LensError, match="the PIL image is 12000×12000"):
        load_image(lazy)
    with pytest.raises(LensError, match="12000×12000 = 144,000,000 pixels"):
        load_image(str(tmp_path / "bomb.png"))


def test_a_missing_file_names_those_that_resemble_it(tmp_path: Path) -> None:
    (tmp_path / "kitten.png").write_bytes(encoded("PNG"))
    with pytest.raises(NoSuchImage, match=r"no image file .*kiten.png'; nearest: 'kitten.png'"):
        load_image(tmp_path / "kiten.png")
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "no" / "such" / "folder.png")
    with pytest.raises(LensError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(LensError, match="is an address; expected a local file"):
        load_image("https://example.org/kitten.png")


NOISE = np.random.default_rng(2).integers(0, 256, (5, 7, 3), np.uint8)
BAD_ARRAYS: dict[str, tuple[Any, str]] = {
    "wrong dtype": (NOISE.astype(np.int64), "an image array of int64; expected uint8 in 0 … 255 or floats in 0 … 1"),
    "out of range": (NOISE.astype(np.float32), "of float32 from .* to 25.; .*for 0 … 255 use uint8"),
    "negative": (NOISE / 255 - 0.5, "from -0.49.* to .*; expected floats in 0 … 1$"),
    "not a number": (np.full((4, 4), np.nan), "from nan to nan"),
    "a batch": (NOISE[None], "holds 1 pictures; expected one: pass list"),
    "two channels": (np.zeros((5, 7, 2), np.uint8), r"shape \(5, 7, 2\); expected \[height, width\] or"),
    "one axis": (np.zeros(5, np.uint8), r"shape \(5,\); expected \[height, width\] or"),
    "either way round": (np.zeros((3, 9, 3), np.uint8), "channels first or last"),
    "no pixels": (np.zeros((0, 7, 3), np.uint8), "has no pixels: 7×0"),
    "too long": (np.zeros((1, 500, 3), np.uint8), "500×1; the long side may be 100 times"),
    "no image at all": (3, "type int; expected a path, a PIL image, or an array"),
    "bytes": (b"\x89PNG", "type bytes; expected a path"),
    "deep": (Image.new("I;16", (8, 8)), r"mode 'I;16'; expected 8 bits a channel"),
    "empty PIL image": (Image.new("RGB", (0, 5)), "has no pixels: 0×5"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_a_bad_array_is_refused_with_a_reason(name: str) -> None:
    given, message = BAD_ARRAYS[name]
    with pytest.raises(LensError, match=message):
        load_image(given)


def test_a_padded_or_resized_picture_may_not_explode_either() -> None:
    with pytest.raises(LensError, match=r"padded to a square, is 20000×20000 = 400,000,000 pixels"):
        processor("padded to a square").map(20_000, 300)


def test_every_form_of_one_picture_is_the_same_picture(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "noise.png")
    forms = [
        tmp_path / "noise.png",
        str(tmp_path / "noise.png"),
        Image.fromarray(NOISE),
        NOISE,
        NOISE[:, ::-1][:, ::-1],
        NOISE / 255,
        (NOISE / 255).astype(np.float32),
        np.moveaxis(NOISE, -1, 0),
        torch.from_numpy(NOISE),
        (torch.from_numpy(NOISE).permute(2, 0, 1) / 255).requires_grad_(),
    ]
    for form in forms:
        assert np.array_equal(np.asarray(load_image(form)), NOISE)
    assert np.asarray(load_image(np.full((2, 2), 0.999)))[0, 0] == 255
    grey = NOISE[..., 0]
    assert all(np.array_equal(np.asarray(load_image(form)), grey) for form in (grey, grey[..., None], grey[None]))


def test_a_sideways_file_is_turned_upright_and_transparency_is_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to view
    Image.fromarray(NOISE).save(tmp_path / "sideways.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "sideways.png")), np.rot90(NOISE, -1))
    clear = Image.new("RGBA", (24, 24), (9, 9, 9, 0))
    white = Image.new("RGB", (24, 24), "white")
    prepared = processor("squeezed")
    assert np.array_equal(prepared([clear])[0], prepared([white])[0])
    grey = processor("squeezed", do_convert_rgb=False)([Image.new("L", (24, 24), 255)])[0]
    assert np.array_equal(grey, prepared([white])[0])


def test_places_outside_and_masks_of_the_wrong_kind_are_refused() -> None:
    pixel_map = processor("squeezed").map(50, 31)
    with pytest.raises(LensError, match=r"pixel \(50, 0\) is outside the picture of 50×31"):
        pixel_map.patch_of_pixel(50, 0)
    with pytest.raises(LensError, match=r"expected bool of shape \(31, 50\) \(height, width\)"):
        pixel_map.patches_of_mask(np.zeros((50, 31), bool))
    with pytest.raises(LensError, match="a mask of float64"):
        pixel_map.patches_of_mask(np.zeros((31, 50)))
    with pytest.raises(LensError, match="a buffer of -1 patches"):
        pixel_map.patches_of_mask(np.zeros((31, 50), bool), buffer=-1)
    with pytest.raises(LensError, match=r"scores of shape \(3, 4\); expected \(4, 4\)"):
        pixel_map.to_original(np.zeros((3, 4)))
