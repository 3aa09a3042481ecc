"""Decodes, converts, crops and resizes image files.

Every choice is explicit and recorded in the manifest. A file that cannot be used raises `ImageError` with the reason.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from diffscale.core.text import one_line
from diffscale.kernels import rows

MOST_BYTES = 256 << 20  # of one compressed file, which is in memory together with its pixels
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
LOSSY_FORMATS = {"JPEG", "MPO", "JPEG2000", "AVIF", "HEIF"}
ORIENTATION = 0x0112
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
DECODE_ERRORS = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    MemoryError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    AttributeError,
    NotImplementedError,
    ArithmeticError,
    RuntimeError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class ImageError(Exception):
    """An image that cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Preparation:
    """The choices that turn an image into (resolution, resolution, channels) uint8."""

    # center cuts the longer side, then resizes; adm resizes as `adm_fit` does, then cuts; none refuses images that are
    # not square
    crop: Literal["center", "adm", "none"] = "center"
    filter: Literal["lanczos", "box"] = "lanczos"  # both antialiased
    background: tuple[int, int, int] = (255, 255, 255)  # colour under transparent pixels
    channels: Literal[1, 3] = 3  # 3 is RGB, 1 is luminance (ITU-R 601)
    upsample: bool = False  # enlarge images smaller than the resolution instead of refusing them
    max_pixels: int = 50_000_000  # larger images are refused before decoding, which takes up to 16 bytes per pixel

    def recorded(self) -> dict[str, Any]:
        """Return the choices as the manifest notes them."""
        used = {"filter": "box, bicubic"} if self.crop == "adm" else {}
        return {**asdict(self), **used, "background": list(self.background), "reducing_gap": None, "exif": "applied"}

    @classmethod
    def of(cls, recorded: Mapping[str, Any], channels: int) -> Preparation:
        """Return the choices that a manifest notes. Raises ValueError for one that no build has written.

        channels: of the dataset. A dataset that notes no choices, such as one of samples, was neither cropped nor
        resized.
        """
        known = {field.name for field in fields(cls)}
        choices = {name: value for name, value in recorded.items() if name in known}
        background = tuple(choices.get("background", cls.background))
        made = cls(**{"crop": "none", **choices, "background": background, "channels": channels})
        shades = len(background) == 3 and all(isinstance(shade, int) and 0 <= shade <= 255 for shade in background)
        if made.crop not in ("center", "none") or made.filter not in FILTERS or channels not in (1, 3) or not shades:
            raise ValueError(f"its images were made by {dict(recorded)}, {channels} channels")
        return made


@dataclass(frozen=True)
class Decoded:
    """A decoded image file.

    image: mode RGB or L, upright, without alpha
    lossy: the file was stored lossily
    plain: the pixels are those of the file (not rotated, blended or converted), so its bytes may be stored
    """

    image: Image.Image
    lossy: bool
    plain: bool


class Header(NamedTuple):
    """What the first bytes of an image file say.

    width, height: in pixels, as stored
    lossy: its format lost information
    grey: it has luminance only
    """

    width: int
    height: int
    lossy: bool
    grey: bool


def read_header(data: Any) -> Header:
    """Read the header of an encoded image without its pixels, or what it would be of an array (H, W[, C]).

    Raises ImageError for a file that is not an image."""
    if isinstance(data, np.ndarray):
        return Header(data.shape[1], data.shape[0], False, data.ndim == 2 or data.shape[2] == 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                grey = image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")
                return Header(*image.size, is_lossy(image, bytes(data[:4096])), grey)
    except DECODE_ERRORS as error:
        raise ImageError(f"not an image, or its header is damaged ({type(error).__name__})") from None


def decode(data: Any, preparation: Preparation) -> Decoded:
    """Decode a source's image: the bytes of a file, or pixels (H, W[, C]) uint8. Raises ImageError."""
    if isinstance(data, np.ndarray):
        return Decoded(from_array(data, preparation), False, False)
    return open_image(bytes(data), preparation)


def open_image(data: bytes, preparation: Preparation) -> Decoded:
    """Decode one file to RGB or L, the first frame of an animation.

    Raises ImageError for a file that is damaged, empty, larger than allowed or not an image."""
    if not data:
        raise ImageError("the file is empty")
    if len(data) > MOST_BYTES:
        raise ImageError(f"the file has more than {MOST_BYTES:,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width < 1 or height < 1:
                raise ImageError(f"its size is {width} x {height}")
            if width * height > preparation.max_pixels:
                raise ImageError(f"decompression bomb: {width} x {height}, more than {preparation.max_pixels:,} pixels")
            lossy = is_lossy(image, data)
            orientation = image.getexif().get(ORIENTATION, 1)
            image.load()
            upright = ImageOps.exif_transpose(image) if orientation not in (0, 1) else image
            converted = to_mode(upright, preparation)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image, or its header is damaged") from None
    except DECODE_ERRORS as error:
        raise ImageError(f"damaged ({one_line(error, 160) or type(error).__name__})") from None
    return Decoded(converted, lossy, converted is image)


def from_array(pixels: NDArray[Any], preparation: Preparation) -> Image.Image:
    """Return the image of an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8. Raises ImageError."""
    flat = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    if flat.dtype != np.uint8 or flat.ndim not in (2, 3) or (flat.ndim == 3 and flat.shape[2] not in (3, 4)):
        raise ImageError(f"it is {pixels.dtype} {pixels.shape} instead of uint8 (H, W, C)")
    return to_mode(Image.fromarray(np.ascontiguousarray(flat)), preparation)


def is_lossy(image: Image.Image, data: bytes) -> bool:
    """Return whether the file's format lost information (a WebP is lossless if its chunk is VP8L)."""
    if image.format == "WEBP":
        return b"VP8L" not in data[:4096]
    if image.format == "TIFF":
        return image.info.get("compression") in ("jpeg", "tiff_jpeg")
    return image.format in LOSSY_FORMATS


def to_mode(image: Image.Image, preparation: Preparation) -> Image.Image:
    """Convert to RGB or L: alpha over the background, palettes resolved, 16 bits scaled to 8, CMYK by its profile."""
    target = "L" if preparation.channels == 1 else "RGB"
    if image.mode == target and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_deep(image).convert(target)
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        return _from_print(image).convert(target)
    if image.has_transparency_data or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        over = Image.new("RGBA", image.size, (*preparation.background, 255))
        over.alpha_composite(image.convert("RGBA"))
        return over.convert("RGB").convert(target)
    return image.convert(target)


def _from_deep(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey, or 32-bit integers in that range, to 8 bits: v * 255 / 65535 = v / 257, rounded."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(f"mode {image.mode} has values outside of 0 to 65535")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _from_print(image: Image.Image) -> Image.Image:
    """Convert CMYK by its embedded colour profile, or by Pillow's plain formula if it has none."""
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK" and profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile: the plain formula
    return image.convert("RGB")


def fit(image: Image.Image, resolution: int, preparation: Preparation) -> Image.Image:
    """Crop the middle square and resize it to resolution x resolution."""
    width, height = image.size
    side = min(width, height)
    if width != height and preparation.crop == "none":
        raise ImageError(f"it is {width} x {height} and crop is none")
    if side < resolution and not preparation.upsample:
        raise ImageError(f"it is {width} x {height}, smaller than {resolution}")
    if preparation.crop == "adm":
        return adm_fit(image, resolution)
    left, top = (width - side) // 2, (height - side) // 2
    if width != height:  # before resizing: the filter must not see pixels outside the square
        image = image.crop((left, top, left + side, top + side))
    if side == resolution:
        return image
    return image.resize((resolution, resolution), FILTERS[preparation.filter], reducing_gap=None)


def adm_fit(image: Image.Image, resolution: int) -> Image.Image:
    """Halve with a box filter while both sides stay at or above the resolution, resize bicubically, cut the middle.

    The preparation of ImageNet in iDDPM, ADM, DiT, EDM2 and JiT (Dhariwal and Nichol 2021, center_crop_arr).
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = round(image.size[0] * scale), round(image.size[1] * scale)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels, (H, W, C) uint8."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def encode(image: Image.Image, form: Literal["png", "webp"]) -> bytes:
    """Return the image as a lossless file."""
    out = io.BytesIO()
    if form == "webp":
        image.save(out, "WEBP", lossless=True, quality=75, method=4)
    else:
        image.save(out, "PNG", compress_level=6)
    return out.getvalue()


def decode_exact(data: Any, out: NDArray[np.uint8]) -> None:
    """Fill `out` (H, W, C) uint8 from an encoded image of a dataset. Raises ImageError."""
    height, width, channels = out.shape
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size != (width, height):
                raise ImageError(f"it is {image.size[0]} x {image.size[1]} instead of {width} x {height}")
            mode = "L" if channels == 1 else "RGB"
            copy_pixels(image if image.mode == mode else image.convert(mode), out)
    except DECODE_ERRORS as error:
        raise ImageError(one_line(error, 160) or type(error).__name__) from None


def copy_pixels(image: Image.Image, out: NDArray[np.uint8]) -> None:
    """Copy an image of mode RGB or L to `out` (H, W, C).

    Pillow stores an RGB pixel in four bytes, which Arrow can view if the image is one block. Dropping the fourth byte
    directly into `out` saves the copies of `np.asarray`."""
    if image.mode == "RGB" and out.flags.c_contiguous:
        with contextlib.suppress(ValueError):  # a large image is in several blocks
            block = pa.array(image).buffers()[-1]
            if rows.drop_fourth(block.address, out):
                return
    pixels = np.asarray(image)
    out[...] = pixels[..., None] if image.mode == "L" else pixels
