"""Mistakes of other implementations of FID, from their issue trackers: one test for each."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffscale.evaluation.distribute import chunk_ranges
from diffscale.evaluation.metrics.distances import Root, frechet, frechet_of_features
from diffscale.evaluation.metrics.precision_recall import precision_recall
from diffscale.evaluation.metrics.registry import parse_metric, views_of
from diffscale.evaluation.metrics.statistics import moments_of
from diffscale.evaluation.networks.extractor import create_extractor
from diffscale.evaluation.networks.resize import resize


def features(n: int, dim: int = 64, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.normal(shift, 1, (n, dim)) * np.exp(-np.arange(dim) / 6)).astype(np.float32)


def test_eigh_of_a_float32_non_symmetrised_product_is_off_and_ours_is_not():
    a, b = moments_of(features(3000)), moments_of(features(3000, seed=1, shift=0.2))
    product = (a.covariance @ b.covariance).astype(np.float32)
    wrong = np.sqrt(np.linalg.eigvalsh(product).clip(min=0)).sum()
    right = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).real.clip(min=0)).sum()
    assert abs(wrong - right) / right > 1e-3
    difference = a.mean - b.mean
    expected = difference @ difference + np.trace(a.covariance + b.covariance) - 2 * right
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)


def test_fewer_samples_than_dimensions_are_neither_complex_nor_nan():
    value = frechet_of_features(features(10, 256), Root.of(moments_of(features(12, 256, seed=1))))
    assert isinstance(value, float)
    assert np.isfinite(value)
    assert value > 0


def test_constant_features_are_no_problem():
    constant = np.ones((20, 8), np.float32)
    assert frechet(moments_of(constant), moments_of(constant)) == pytest.approx(0, abs=1e-12)


def test_features_depend_on_nothing_but_the_image():
    extractor = create_extractor("efficientnet_lite0")
    x = torch.randint(0, 256, (19, 3, 16, 16), dtype=torch.uint8)
    alone = torch.cat([extractor(x[i : i + 1])["features"] for i in range(3)])
    torch.testing.assert_close(extractor(x)["features"][:3], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
def test_the_last_batch_is_not_dropped(n):
    assert sum(end - first for first, end in chunk_ranges(n, 8)) == n


def test_resize_is_one_setting_for_reference_and_samples():
    views = views_of([parse_metric("fid"), parse_metric("precision")], 32, "clean")
    assert {v.resize for v in views.values()} == {"clean"}
    x = torch.randint(0, 256, (2, 3, 400, 400)).float()
    assert (resize(x, 299, "tf1_bilinear") - resize(x, 299, "clean_bicubic")).abs().mean() > 5


def test_jpeg_on_one_side_moves_the_distance():
    random = np.random.default_rng(0)
    base = np.linspace(0, 200, 32)[:, None, None] + random.normal(0, 25, (48, 32, 32, 3))
    images = base.clip(0, 255).astype(np.uint8)

    def jpeg(image: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=75)
        return np.asarray(Image.open(buffer))

    extractor = create_extractor("efficientnet_lite0")

    def of(pixels: np.ndarray) -> np.ndarray:
        return extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2))["features"].numpy()

    reference = Root.of(moments_of(of(images[:24])))
    plain = frechet_of_features(of(images[24:]), reference)
    lossy = frechet_of_features(of(np.stack([jpeg(i) for i in images[24:]])), reference)
    assert lossy > 1.2 * plain


def test_fewer_samples_than_reference_images_is_in_the_record():
    from diffscale.evaluation.metrics.registry import _warnings

    reference = SimpleNamespace(n=50_000, lossy=False)
    text = _warnings(parse_metric("fid"), 2048, 5000, 50_000, reference)
    assert "fewer generated (5000) than reference images (50000)" in text
    assert _warnings(parse_metric("fid"), 2048, 50_000, 50_000, reference) == ""


def test_which_side_is_generated_is_not_swapped():
    wide, narrow = features(300, 4, shift=0.0), 0.1 * features(300, 4, seed=1)
    generated_is_narrow = precision_recall(narrow, wide)
    assert generated_is_narrow.precision > 0.9 > 0.6 > generated_is_narrow.recall
    generated_is_wide = precision_recall(wide, narrow)
    assert generated_is_wide.recall > 0.9 > 0.6 > generated_is_wide.precision


def test_fid_is_always_and_only_the_inception_of_2015():
    assert parse_metric("fid").network == "inception"
    assert parse_metric("fd_efficientnet_lite0").network == "efficientnet_lite0"
    assert parse_metric("fd_inf_dinov2_vitl14").network == "dinov2_vitl14"
    assert parse_metric("kid").network == "inception"
