"""Images on disk have the pixels of the dataset that `data build` makes of them, or are refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffscale.core.errors import UserError
from diffscale.data import Dataset, open_dataset
from diffscale.data.build.build import BuildOptions, build
from diffscale.data.build.decode import Preparation
from diffscale.evaluation.folder import evaluate_folder
from diffscale.evaluation.image_sources import FileSource, open_images

from .conftest import pictures, write_dataset

FD = "fd_efficientnet_lite0"
SIDE = 16
ORIENTATION = 0x0112
MODES = ("L", "LA", "P", "P+transparency", "RGB", "RGBA", "I;16", "CMYK")


def picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Random pixels of a mode."""
    random = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 2**16, (height, width), np.uint16))
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 3)
    pixels = random.integers(0, 256, (height, width, channels), np.uint8)
    if mode.startswith("P"):
        return Image.fromarray(pixels).quantize(8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)


def stored(mode: str, width: int, height: int, orientation: int, seed: int) -> tuple[str, bytes]:
    """The suffix and the bytes of a file: CMYK is a JPEG, the others are PNG."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    extra = {"transparency": 3} if mode == "P+transparency" else {}
    out = io.BytesIO()
    form = "JPEG" if mode == "CMYK" else "PNG"
    picture(mode, width, height, seed).save(out, form, exif=exif, **extra)
    return {"JPEG": ".jpg", "PNG": ".png"}[form], out.getvalue()


def write(folder: Path, files: list[tuple[str, bytes]]) -> Path:
    folder.mkdir(parents=True)
    for i, (suffix, data) in enumerate(files):
        (folder / f"{i:03d}{suffix}").write_bytes(data)
    return folder


def built(source: Path, target: Path, side: int = SIDE, **choices: object) -> Dataset:
    options = BuildOptions(str(source), str(target), (side,), workers=0, preparation=Preparation(**choices))  # type: ignore[arg-type]
    build(options, show=False)
    return open_dataset(str(target))


def pixels_by_name(images: FileSource) -> dict[str, bytes]:
    names = [unit.items[0].name for unit in images.listing.units]
    pixels = images.images(0, images.n)[0].permute(0, 2, 3, 1).numpy()
    return {name: p.tobytes() for name, p in zip(names, pixels, strict=True)}


def dataset_by_name(dataset: Dataset) -> dict[str, bytes]:
    pixels = dataset.gather(np.arange(dataset.n))[0].numpy()
    return {dataset.name(row): pixels[row].tobytes() for row in range(dataset.n)}


one_file = st.tuples(
    st.sampled_from(MODES),
    st.integers(SIDE, 3 * SIDE),
    st.integers(SIDE, 3 * SIDE),
    st.integers(1, 8),
    st.integers(0, 2**31),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(one_file, min_size=2, max_size=6),
    channels=st.sampled_from([1, 3]),
    filter_name=st.sampled_from(["lanczos", "box"]),
    background=st.tuples(*[st.integers(0, 255)] * 3),
)
def test_a_folder_has_the_pixels_of_the_dataset_built_of_it(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[str, int, int, int, int]],
    channels: int,
    filter_name: str,
    background: tuple[int, int, int],
) -> None:
    place = tmp_path_factory.mktemp("kinds")
    source = write(place / "images", [stored(*file) for file in files])
    dataset = built(source, place / "out", channels=channels, filter=filter_name, background=background)
    images = open_images(str(source), place / "work", like=dataset)
    assert isinstance(images, FileSource)
    assert (images.n, images.resolution) == (len(files), SIDE)
    assert pixels_by_name(images) == dataset_by_name(dataset)


@pytest.mark.parametrize("container", ["zip", "npz"])
def test_an_archive_and_an_array_have_the_pixels_of_the_dataset_built_of_them(tmp_path: Path, container: str) -> None:
    place = tmp_path / f"images.{container}"
    if container == "zip":
        with zipfile.ZipFile(place, "w") as archive:
            for i, mode in enumerate(MODES):
                suffix, data = stored(mode, 20, 24, 6, i)
                archive.writestr(f"{i}{suffix}", data)
    else:
        np.savez(place, arr_0=np.random.default_rng(0).integers(0, 256, (8, 24, 20, 4), np.uint8))
    dataset = built(place, tmp_path / "out")
    images = open_images(str(place), tmp_path / "work", like=dataset)
    theirs = dataset.gather(np.arange(dataset.n))[0].permute(0, 3, 1, 2).numpy()
    assert sorted(p.tobytes() for p in images.images(0, images.n)[0].contiguous().numpy()) == sorted(
        p.tobytes() for p in theirs
    )


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "I;16", "exif", "wide", "larger"])
def test_the_distance_of_a_folder_to_the_dataset_built_of_it_is_0(tmp_path: Path, cache: Path, kind: str) -> None:
    """Shown before: alpha 229, 16-bit 495, EXIF 82, not square 117."""
    width, height = {"wide": (24, SIDE), "larger": (40, 40)}.get(kind, (SIDE, SIDE))
    mode, orientation = (kind if kind in MODES else "RGB"), 6 if kind == "exif" else 1
    source = write(tmp_path / "images", [stored(mode, width, height, orientation, i) for i in range(12)])
    built(source, tmp_path / "out")
    (row,) = evaluate_folder(str(source), str(tmp_path / "out"), [FD])
    assert row["value"] == pytest.approx(0, abs=1e-3)
    assert (row["eval_resolution"], row["n_generated"], row["n_reference"]) == (SIDE, 12, 12)
    assert ("cropped or resized" in row["warning"]) == (kind in ("wide", "larger"))
    (turned,) = evaluate_folder(str(tmp_path / "out"), str(source), [FD])
    assert turned["value"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [([(16, 16), (16, 16), (20, 16)], "002.png is 20 x 16"), ([(24, 16)] * 3, "3 of 3 images are 24 x 16")],
    ids=["several sizes", "not square"],
)
def test_sizes_that_do_not_decide_the_pixels_are_refused_with_the_way_to_decide(
    tmp_path: Path, sizes: list[tuple[int, int]], said: str
) -> None:
    source = write(tmp_path / "images", [stored("RGB", *size, 1, i) for i, size in enumerate(sizes)])
    with pytest.raises(UserError, match="square images of one size") as refused:
        open_images(str(source), tmp_path / "work")
    assert said in str(refused.value)
    assert "--resolution 16" in str(refused.value)
    images = open_images(str(source), tmp_path / "work", resolution=16)
    assert pixels_by_name(images) == dataset_by_name(built(source, tmp_path / "out"))  # type: ignore[arg-type]


def test_an_image_smaller_than_the_dataset_is_named_and_many_of_one_size_are_enlarged(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", 8, 32)
    small = write(tmp_path / "small", [stored("RGB", 16, 16, 1, i) for i in range(3)])
    images = open_images(str(small), tmp_path / "work", like=dataset)
    assert (images.resolution, images.n) == (16, 3)  # the evaluator enlarges them (CONTRIBUTING.md, decision 1)
    mixed = write(tmp_path / "mixed", [stored("RGB", side, side, 1, side) for side in (32, 40, 30)])
    with pytest.raises(UserError, match=r"002\.png is 30 x 30"):
        open_images(str(mixed), tmp_path / "work", like=dataset)


def test_hidden_files_are_no_images_as_in_a_build(tmp_path: Path) -> None:
    source = write(tmp_path / "images", [stored("RGB", SIDE, SIDE, 1, i) for i in range(3)])
    for hidden in (".hidden.png", ".thumbnails/001.png"):
        (source / hidden).parent.mkdir(exist_ok=True)
        (source / hidden).write_bytes(b"not an image")
    assert open_images(str(source), tmp_path / "work").n == built(source, tmp_path / "out").n == 3


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "images", [stored("RGB", SIDE, SIDE, 1, i) for i in range(3)])
    data = (source / "001.png").read_bytes()

    def read() -> None:
        open_images(str(source), tmp_path / "work").images(0, 3)  # type: ignore[union-attr]

    for damage in (b"", data[:20], data[:-40]):
        (source / "001.png").write_bytes(damage)
        with pytest.raises(UserError, match=r"001\.png"):
            read()


def test_the_hash_says_how_the_pixels_were_made(tmp_path: Path) -> None:
    """Else features of one crop or background would be taken from the cache for another."""
    source = write(tmp_path / "images", [stored("RGBA", SIDE, SIDE, 1, i) for i in range(3)])
    white = open_images(str(source), tmp_path / "work")
    black = open_images(str(source), tmp_path / "work", like=built(source, tmp_path / "out", background=(0, 0, 0)))
    again = open_images(str(source), tmp_path / "work")
    assert white.content_hash == again.content_hash != black.content_hash


def test_lossy_files_are_known_by_their_content(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(pictures(1, SIDE)[0][0]).save(out, "JPEG")
    disguised = write(tmp_path / "images", [(".png", out.getvalue())] * 2)
    assert open_images(str(disguised), tmp_path / "work").lossy
