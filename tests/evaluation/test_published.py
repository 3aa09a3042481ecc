"""Published statistics by name, and ADM's archives of samples: files made here in their publishers' layouts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from diffscale.core.errors import UserError
from diffscale.evaluation import published
from diffscale.evaluation.image_sources import open_images
from diffscale.evaluation.networks.resize import RESIZES
from diffscale.evaluation.published import PUBLISHED, refuse_other_protocol, statistics_file, statistics_name
from diffscale.evaluation.reference import reference_from_npz
from diffscale.evaluation.sample_writer import SampleWriter

from .conftest import CLASSES, pictures


def statistics(seed: int = 0) -> bytes:
    """A file as EDM's `fid.py ref` writes it: mu and sigma, and no number of images."""
    features, out = np.random.default_rng(seed).normal(size=(40, 8)), io.BytesIO()
    np.savez(out, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    return out.getvalue()


@pytest.fixture
def web(cache, monkeypatch) -> list[str]:
    """The publishers' servers; the list gets the addresses that were fetched."""
    fetched: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        fetched.append(url)
        return io.BytesIO(statistics())

    monkeypatch.delenv("DIFFSCALE_OFFLINE")
    monkeypatch.setattr(published, "urlopen", urlopen)
    return fetched


def test_a_name_is_fetched_once_and_a_changed_file_is_refused(web) -> None:
    file = statistics_file("cifar10")
    assert statistics_file("cifar10") == file
    assert web == ["https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz"]  # NVlabs/edm, README
    assert file.name == statistics_name("cifar10") == "cifar10-32x32.npz"
    file.write_bytes(statistics(seed=1))
    with pytest.raises(UserError, match="SHA-256"):
        statistics_file("cifar10")


def test_a_file_that_was_fetched_elsewhere_is_taken(cache) -> None:
    with pytest.raises(UserError) as caught:
        statistics_file("imagenet64")
    place = next(word for word in caught.value.text().split() if word.endswith("imagenet-64x64.npz,"))
    assert "nvlabs-fi-cdn.nvidia.com" in caught.value.text()
    Path(place.rstrip(",")).parent.mkdir(parents=True, exist_ok=True)
    Path(place.rstrip(",")).write_bytes(statistics())
    assert statistics_file("imagenet64").name == "imagenet-64x64.npz"


def test_an_unknown_name_and_what_is_no_statistics_are_refused(web, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"cifar10 \(the nearest"):
        statistics_file("cifar")
    (tmp_path / "other.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="mu and sigma"):
        statistics_file(str(tmp_path / "other.npz"))
    monkeypatch.setattr(published, "urlopen", lambda url, timeout: io.BytesIO(b"<html>not found</html>"))
    with pytest.raises(UserError, match="mu and sigma"):
        statistics_file("ffhq64")
    with pytest.raises(UserError, match="mu and sigma"):  # and it is not trusted the second time either
        statistics_file("ffhq64")


FID = {"fid": "inception"}


@pytest.mark.parametrize(
    ("side", "resize", "networks", "said"),
    [
        (64, "default", FID, "eval.eval_resolution"),
        (32, "clean", FID, "eval.resize"),
        (32, "default", FID | {"fd_dinov2_vitl14": "dinov2_vitl14"}, "eval.metrics"),
    ],
)
def test_what_a_published_reference_does_not_compare_with_is_refused(side, resize, networks, said) -> None:
    file = Path(PUBLISHED["cifar10"].file)
    assert resize in RESIZES
    refuse_other_protocol(file, 32, "default", FID)
    refuse_other_protocol(Path("my-own.npz"), side, resize, networks)
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        refuse_other_protocol(file, side, resize, networks)


def test_a_published_file_stands_for_as_many_images_as_its_publishers_state(tmp_path) -> None:
    (tmp_path / "cifar10-32x32.npz").write_bytes(statistics())
    (tmp_path / "own.npz").write_bytes(statistics())
    assert reference_from_npz(tmp_path / "cifar10-32x32.npz", None).n == 50_000  # type: ignore[arg-type]
    assert reference_from_npz(tmp_path / "own.npz", None).n == 0  # type: ignore[arg-type]
    assert "NVIDIA's port" in PUBLISHED["cifar10"].caveat


@pytest.mark.parametrize("names", [CLASSES, []])
def test_samples_are_written_as_adms_archive_and_read_again(tmp_path, names) -> None:
    """guided-diffusion, scripts/image_sample.py: arr_0 uint8 (N,H,W,C), arr_1 the labels of a conditional model."""
    images, labels = pictures(10, 16)
    writer = SampleWriter(tmp_path / "out", "npz", (3, 16, 16), names, {})
    for first in (6, 0):  # chunks end in any order
        part = slice(first, first + 6)
        columns = {"images": images[part].transpose(0, 3, 1, 2).reshape(len(images[part]), -1), "labels": labels[part]}
        writer(first, columns)
    writer.close()
    (file,) = (tmp_path / "out").glob("*.npz")
    assert file.name == "samples_10x16x16x3.npz"
    with np.load(file, allow_pickle=False) as content:
        assert content.files == (["arr_0", "arr_1"] if names else ["arr_0"])
        np.testing.assert_array_equal(content["arr_0"], images)
        assert content["arr_0"].dtype == np.uint8
        if names:
            np.testing.assert_array_equal(content["arr_1"], labels)
    opened = open_images(str(file), tmp_path / "work")
    np.testing.assert_array_equal(opened.at(np.arange(10)).permute(0, 2, 3, 1).numpy(), images)
