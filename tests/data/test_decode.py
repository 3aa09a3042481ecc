from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffscale.data.build import decode
from diffscale.data.build.decode import ImageError, Preparation, encode, fit, open_image, to_array


def saved(image, form="PNG", **settings) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **settings)
    return out.getvalue()


def gradient(width=12, height=8) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 20, y * 30, x + y], axis=-1).astype(np.uint8)


def pixels(data, **settings):
    return to_array(open_image(data, Preparation(**settings)).image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    """Each stored form, turned by its tag, is the same upright image (Exif 2.32, table 4.6.4)."""
    upright = gradient()
    back = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(back[orientation](upright)))
    assert np.array_equal(pixels(saved(stored, exif=exif)), upright)


def test_a_palette_becomes_its_colours():
    image = Image.fromarray(gradient()).quantize(200)
    assert np.array_equal(pixels(saved(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 30)])
@pytest.mark.parametrize("form", ["RGBA", "LA", "palette", "RGB with tRNS"])
def test_transparent_pixels_show_the_background(background, form):
    rgb = gradient()
    if form == "RGBA":
        data = saved(Image.fromarray(np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)])))
    elif form == "LA":
        data = saved(Image.fromarray(np.dstack([rgb[..., 0], np.zeros(rgb.shape[:2], np.uint8)]), "LA"))
    elif form == "palette":
        image = Image.new("P", (12, 8), 3)
        image.putpalette(bytes(range(30)))
        data = saved(image, transparency=3)
    else:
        data = saved(Image.new("RGB", (12, 8), (1, 2, 3)), transparency=(1, 2, 3))
    assert (pixels(data, background=background) == background).all()


def test_half_transparent_is_half_of_each():
    image = Image.new("RGBA", (4, 4), (200, 0, 100, 128))
    value = pixels(saved(image))[0, 0]
    assert np.abs(value - (np.array([200, 0, 100]) * 128 + 255 * 127) / 255).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(form):
    deep = (np.arange(96, dtype=np.uint32).reshape(8, 12) * 689).astype(np.uint16)
    image = Image.fromarray(deep)
    expected = np.rint(deep / 257).astype(np.uint8)
    got = pixels(saved(image, form))
    assert got.shape == (8, 12, 3)
    assert np.array_equal(got[..., 0], expected)
    assert np.array_equal(pixels(saved(image, form), channels=1)[..., 0], expected)


def test_grey_is_repeated_or_kept():
    grey = gradient()[..., 0]
    data = saved(Image.fromarray(grey))
    assert np.array_equal(pixels(data), np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(pixels(data, channels=1), grey[..., None])


def test_one_bit_images_are_black_and_white():
    image = Image.fromarray(gradient()[..., 0] > 100)
    assert set(np.unique(pixels(saved(image)))) == {0, 255}


def test_cmyk_is_converted_with_and_without_a_profile():
    image = Image.fromarray(gradient()).convert("CMYK")
    plain = pixels(saved(image, "TIFF"))
    assert np.array_equal(plain, np.asarray(image.convert("RGB")))
    broken = pixels(saved(image, "TIFF", icc_profile=b"not a profile"))
    assert np.array_equal(broken, plain)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # a profile of the wrong kind
    assert pixels(saved(image, "TIFF", icc_profile=srgb)).shape == plain.shape


def test_a_crop_is_central_and_a_resize_antialiased():
    """BOX at an integer factor is the mean of the pixels that it covers; the crop leaves the middle."""
    wide = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    got = to_array(fit(Image.fromarray(wide), 8, Preparation(filter="box")))
    middle = wide[:, 8:40].reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(got - middle).max() <= 1
    lanczos = to_array(fit(Image.fromarray(wide), 8, Preparation()))
    direct = Image.fromarray(wide[:, 8:40]).resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(lanczos, np.asarray(direct))


@pytest.mark.parametrize("size", [(100, 61), (61, 100), (33, 40), (16, 31), (64, 64)])
def test_adms_crop_halves_with_a_box_then_resizes_bicubically_then_cuts(size):
    """center_crop_arr of openai/guided-diffusion, guided_diffusion/image_datasets.py, written as its formula says."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    got = to_array(fit(image, 16, Preparation(crop="adm")))
    halvings = int(np.log2(min(size) / 16))
    for _ in range(halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    short = min(image.size)
    wanted = (round(image.width * 16 / short), round(image.height * 16 / short))
    pixels = np.asarray(image.resize(wanted, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - 16) // 2, (pixels.shape[1] - 16) // 2
    assert np.array_equal(got, pixels[top : top + 16, left : left + 16])
    assert Preparation(crop="adm").recorded()["filter"] == "box, bicubic"


def test_an_image_that_fits_is_untouched():
    square = gradient(8, 8)
    assert np.array_equal(to_array(fit(Image.fromarray(square), 8, Preparation())), square)


def test_images_that_the_choices_exclude_are_refused():
    image = Image.fromarray(gradient())
    with pytest.raises(ImageError, match="smaller than 16"):
        fit(image, 16, Preparation())
    assert fit(image, 16, Preparation(upsample=True)).size == (16, 16)
    with pytest.raises(ImageError, match="12 x 8"):
        fit(image, 8, Preparation(crop="none"))


@pytest.mark.parametrize("form", ["png", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_encoding_loses_nothing(form, channels):
    noise = np.random.default_rng(1).integers(0, 256, (16, 16, channels), np.uint8)
    data = encode(Image.fromarray(noise if channels == 3 else noise[..., 0]), form)
    out = np.empty_like(noise)
    decode.decode_exact(data, out)
    assert np.array_equal(out, noise)


@pytest.mark.parametrize("side", [1, 2, 5, 17, 2100])  # sixteen bytes at a time and the rest; 2,100: several blocks
def test_pixels_are_copied_to_the_byte_and_nothing_behind_them(side):
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    room = np.full(noise.size + 64, 77, np.uint8)
    decode.copy_pixels(Image.fromarray(noise), room[: noise.size].reshape(noise.shape))
    assert np.array_equal(room[: noise.size].reshape(noise.shape), noise)
    assert (room[noise.size :] == 77).all()


def test_lossy_files_are_distinguished_from_lossless_ones():
    image = Image.fromarray(gradient())
    lossy = {
        form: open_image(saved(image, form), Preparation()).lossy for form in ("PNG", "JPEG", "BMP", "GIF", "TIFF")
    }
    assert lossy == {"PNG": False, "JPEG": True, "BMP": False, "GIF": False, "TIFF": False}
    assert open_image(saved(image, "WEBP"), Preparation()).lossy
    assert not open_image(saved(image, "WEBP", lossless=True), Preparation()).lossy
    assert not open_image(saved(image.convert("RGBA"), "WEBP", lossless=True, exif=b"Exif\0\0"), Preparation()).lossy


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises these sizes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(100_000, 100_000), (20_000, 20_000), (0, 5), (2**31 - 1, 1)])
def test_absurd_sizes_are_refused_before_anything_is_allocated(size):
    with pytest.raises(ImageError):
        open_image(bomb(*size), Preparation())


def test_damaged_files_are_refused():
    good = saved(Image.fromarray(gradient(64, 64)), "JPEG")
    png = saved(Image.fromarray(gradient(64, 64)))
    for data in (
        b"",
        b"not an image",
        good[: len(good) // 2],
        png[: len(png) // 2],
        png[:40] + b"\xff" * 20 + png[60:],
    ):
        with pytest.raises(ImageError):
            open_image(data, Preparation())


def test_random_damage_is_an_image_or_refused_and_nothing_else():
    random = np.random.default_rng(0)
    files = [saved(Image.fromarray(gradient(32, 32)), form) for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")]
    for i in range(600):
        data = bytearray(files[i % len(files)])
        for _ in range(random.integers(1, 6)):
            data[random.integers(len(data))] = random.integers(256)
        with suppress(ImageError):
            assert open_image(bytes(data), Preparation()).image.mode == "RGB"
