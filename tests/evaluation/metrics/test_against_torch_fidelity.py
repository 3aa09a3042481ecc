"""torch-fidelity on the same features, and the published check value through diffscale's own path from Arrow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset as TorchDataset
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from diffscale.core.errors import UserError
from diffscale.evaluation.folder import evaluate_folder
from diffscale.evaluation.image_sources import DatasetSource
from diffscale.evaluation.metrics.distances import (
    Root,
    frechet_of_features,
    inception_score,
    kernel_distance,
)
from diffscale.evaluation.metrics.precision_recall import precision_recall
from diffscale.evaluation.metrics.statistics import moments_of
from diffscale.evaluation.networks.extractor import create_extractor

from ..conftest import write_dataset


class Images(TorchDataset):
    def __init__(self, source: DatasetSource) -> None:
        self.images = source.images(0, source.n)[0]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i]


class Plugin(FeatureExtractorBase):
    """An extractor of ours as a plug-in of torch-fidelity. In float64, since torch-fidelity's KID sums in the dtype of
    the features and float32 would cost it the sixth digit."""

    extract: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    def forward(self, x):
        return (type(self).extract(x).double(),)

    @staticmethod
    def get_provided_features_list():
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "features"


def colours(images: torch.Tensor) -> torch.Tensor:
    """(B,3,16,16) → (B,48): mean colours of 4×4 pixels; fewer dimensions than there are images."""
    return torch.nn.functional.avg_pool2d(images.float(), 4).flatten(1) / 64


def lite0(images: torch.Tensor) -> torch.Tensor:
    return create_extractor("efficientnet_lite0")(images)["features"]


@pytest.mark.parametrize(("extract", "fid_tolerance"), [(colours, 1e-6), (lite0, 1e-5)])
def test_every_metric_agrees_with_calculate_metrics_to_1e6(extract, fid_tolerance, tmp_path):
    """torch-fidelity's PPL is left out: it asks a generator for a path between latents, not for features. With 80
    samples of 1280 dimensions torch-fidelity's FID adds up rounding of eigenvalues that are zero: 1e-5 there."""
    sets = [write_dataset(tmp_path / str(seed), 80, 16, seed) for seed in (0, 1)]
    sources = [DatasetSource(d, np.arange(d.n)) for d in sets]
    name = f"diffscale-{extract.__name__}"
    register_feature_extractor(name, type(name, (Plugin,), {"extract": staticmethod(extract)}))
    theirs = calculate_metrics(
        input1=Images(sources[0]),
        input2=Images(sources[1]),
        feature_extractor=name,
        cuda=False,
        cache=False,
        fid=True,
        kid=True,
        prc=True,
        isc=True,
        kid_subsets=10,
        kid_subset_size=40,
        verbose=False,
        save_cpu_ram=True,
        batch_size=13,
    )
    generated, reference = (extract(s.images(0, s.n)[0]).numpy() for s in sources)
    kid = kernel_distance(generated, reference, subsets=10, subset_size=40)
    near, score = precision_recall(generated, reference), inception_score(generated)
    ours = {
        "frechet_inception_distance": frechet_of_features(generated, Root.of(moments_of(reference))),
        "kernel_inception_distance_mean": kid[0],
        "kernel_inception_distance_std": kid[1],
        "precision": near.precision,
        "recall": near.recall,
        "f_score": near.f_score,
        "inception_score_mean": score[0],
        "inception_score_std": score[1],
    }
    assert set(theirs) == set(ours)
    for key, value in ours.items():
        tolerance = fid_tolerance if key == "frechet_inception_distance" else 1e-6
        assert value == pytest.approx(theirs[key], rel=tolerance), key


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_check_value_from_arrow_with_the_real_inception(tmp_path):
    """FID of CIFAR-10 train and test, 256 images each: 110.2808 ± 0.01 in torch-fidelity's own test suite."""
    from benchmarks.throughput.features import CHECK_VALUE, arrow, check_images

    try:
        create_extractor("inception")
        for name, train in (("train", True), ("test", False)):
            arrow(check_images(train), tmp_path / name)
    except UserError as error:
        pytest.skip(f"neither on this machine nor from a registry: {error.setting}")
    (fid,) = evaluate_folder(str(tmp_path / "test"), str(tmp_path / "train"), ["fid"])
    assert fid["value"] == pytest.approx(CHECK_VALUE, abs=0.01)
    assert (fid["metric"], fid["network"], fid["n_generated"], fid["n_reference"]) == ("fid", "inception", 256, 256)
