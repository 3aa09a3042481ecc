"""From the bytes of one image file to pixels: what a build accepts, how it is converted, cropped and resized.

Every choice is explicit and recorded in the manifest. What cannot be used raises `Unusable` with the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from diffscale.kernels import compile as native

MOST_BYTES = 256 << 20  # of one compressed file: it is in memory beside its pixels
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


class Unusable(Exception):
    """The image cannot be used; the text says why."""


@dataclass(frozen=True)
class Preparation:
    """How every image becomes (resolution, resolution, channels) uint8.

    crop: `center` cuts the longer side; `none` refuses images that are not square. filter: antialiased, `lanczos` or
    `box`. background: the colour under transparent pixels. channels: 3 is RGB, 1 is luminance (ITU-R 601).
    upsample: accept images smaller than the resolution, enlarging them. max_pixels: larger images are refused before
    they are decoded (decompression bombs); decoding takes up to 16 bytes for each pixel.
    """

    crop: Literal["center", "none"] = "center"
    filter: Literal["lanczos", "box"] = "lanczos"
    background: tuple[int, int, int] = (255, 255, 255)
    channels: Literal[1, 3] = 3
    upsample: bool = False
    max_pixels: int = 50_000_000

    def recorded(self) -> dict[str, Any]:
        return {**asdict(self), "background": list(self.background), "reducing_gap": None, "exif": "applied"}


@dataclass(frozen=True)
class Decoded:
    """image: mode RGB or L, upright, without alpha. lossy: the file was stored lossily. plain: the pixels are those of
    the file itself (nothing was rotated, blended or converted), so its bytes may be kept."""

    image: Image.Image
    lossy: bool
    plain: bool


def open_image(data: bytes, preparation: Preparation) -> Decoded:
    """Decodes one file to RGB or L. Raises Unusable: damaged, absurdly large, empty or not an image.
    Of an animation the first frame is taken."""
    if not data:
        raise Unusable("the file is empty")
    if len(data) > MOST_BYTES:
        raise Unusable(f"the file has more than {MOST_BYTES:,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width < 1 or height < 1:
                raise Unusable(f"its size is {width} x {height}")
            if width * height > preparation.max_pixels:
                raise Unusable(f"decompression bomb: {width} x {height}, more than {preparation.max_pixels:,} pixels")
            lossy = is_lossy(image, data)
            orientation = image.getexif().get(ORIENTATION, 1)
            image.load()
            upright = ImageOps.exif_transpose(image) if orientation not in (0, 1) else image
            converted = to_mode(upright, preparation)
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable("not an image, or its header is damaged") from None
    except DECODE_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise Unusable(f"damaged ({reason})") from None
    return Decoded(converted, lossy, converted is image)


def from_array(pixels: NDArray[Any], preparation: Preparation) -> Image.Image:
    """An image of (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8. Raises Unusable."""
    flat = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    if flat.dtype != np.uint8 or flat.ndim not in (2, 3) or (flat.ndim == 3 and flat.shape[2] not in (3, 4)):
        raise Unusable(f"it is {pixels.dtype} {pixels.shape} instead of uint8 (H, W, C)")
    return to_mode(Image.fromarray(np.ascontiguousarray(flat)), preparation)


def is_grey(data: Any) -> bool:
    """Whether the array or encoded image has luminance only."""
    if isinstance(data, np.ndarray):
        return data.ndim == 2 or data.shape[2] == 1
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode in ("1", "L", "I", "I;16", "F")
    except DECODE_ERRORS:
        return False


def is_lossy(image: Image.Image, data: bytes) -> bool:
    """Whether the file's format threw information away (a WebP is lossless when its chunk is VP8L)."""
    if image.format == "WEBP":
        return b"VP8L" not in data[:4096]
    if image.format == "TIFF":
        return image.info.get("compression") in ("jpeg", "tiff_jpeg")
    return image.format in LOSSY_FORMATS


def to_mode(image: Image.Image, preparation: Preparation) -> Image.Image:
    """To RGB or L: alpha over the background, palettes resolved, 16 bits scaled to 8, CMYK through its own profile."""
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
    """16-bit grey to 8 bits: v * 255 / 65535, which is v / 257, rounded; also 32-bit integers in that range."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise Unusable(f"mode {image.mode} has values outside of 0 to 65535")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _from_print(image: Image.Image) -> Image.Image:
    """CMYK through the embedded colour profile where it has one, else by Pillow's plain formula."""
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
    """Cuts the middle square and resizes it to resolution x resolution."""
    width, height = image.size
    side = min(width, height)
    if width != height and preparation.crop == "none":
        raise Unusable(f"it is {width} x {height} and crop is none")
    if side < resolution and not preparation.upsample:
        raise Unusable(f"it is {width} x {height}, smaller than {resolution}")
    left, top = (width - side) // 2, (height - side) // 2
    if width != height:  # before resizing: the filter must not see what is cut off
        image = image.crop((left, top, left + side, top + side))
    if side == resolution:
        return image
    return image.resize((resolution, resolution), FILTERS[preparation.filter], reducing_gap=None)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, C) uint8."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def encode(image: Image.Image, form: Literal["png", "webp"]) -> bytes:
    """The image as a lossless file."""
    out = io.BytesIO()
    if form == "webp":
        image.save(out, "WEBP", lossless=True, quality=75, method=4)
    else:
        image.save(out, "PNG", compress_level=6)
    return out.getvalue()


def decode_exact(data: Any, out: NDArray[np.uint8]) -> None:
    """Fills out (H, W, C) uint8 from the bytes of an encoded image of a dataset. Raises Unusable."""
    height, width, channels = out.shape
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size != (width, height):
                raise Unusable(f"it is {image.size[0]} x {image.size[1]} instead of {width} x {height}")
            mode = "L" if channels == 1 else "RGB"
            copy_pixels(image if image.mode == mode else image.convert(mode), out)
    except DECODE_ERRORS as error:
        raise Unusable((str(error) or type(error).__name__).splitlines()[0][:160]) from None


def copy_pixels(image: Image.Image, out: NDArray[np.uint8]) -> None:
    """Of mode RGB or L to out (H, W, C). Pillow keeps a pixel of RGB in four bytes, which Arrow can see where they are
    one block; dropping the fourth straight into `out` saves the copies of `np.asarray`."""
    kernel = native.library("rows") if image.mode == "RGB" and out.flags.c_contiguous else None
    if kernel is not None:
        with contextlib.suppress(ValueError):  # a large image, in several blocks
            block = pa.array(image).buffers()[-1]
            kernel.drop_fourth(ctypes.c_void_p(block.address), *native.addresses(out), *native.integers(out.size // 3))
            return
    pixels = np.asarray(image)
    out[...] = pixels[..., None] if image.mode == "L" else pixels
