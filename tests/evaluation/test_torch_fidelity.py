"""torch-fidelity on the same features, and the published check value through diffscale's own path from Arrow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset as TorchDataset
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from diffscale.errors import UserError
from diffscale.evaluation.distances import Root, frechet_of_features, inception_score, kernel_distance
from diffscale.evaluation.features import Extractor, create_extractor
from diffscale.evaluation.neighbours import neighbourhood
from diffscale.evaluation.sources import DatasetSource
from diffscale.evaluation.statistics import moments_of

from .conftest import write_dataset


class Images(TorchDataset):
    def __init__(self, source: DatasetSource) -> None:
        self.images = source.images(0, source.n)[0]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i]


class Ours(FeatureExtractorBase):
    """diffscale's extractor as a plug-in of torch-fidelity. In float64, since torch-fidelity's KID sums in the dtype of
    the features and float32 would cost it the sixth digit."""

    extractor: Extractor

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    def forward(self, x):
        return (self.extractor(x)["features"].double(),)

    @staticmethod
    def get_provided_features_list():
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "features"


def test_every_metric_agrees_with_calculate_metrics_to_1e6(tmp_path):
    sets = [write_dataset(tmp_path / str(seed), 80, 16, seed) for seed in (0, 1)]
    sources = [DatasetSource(d, np.arange(d.n)) for d in sets]
    Ours.extractor = create_extractor("efficientnet_lite0")
    register_feature_extractor("diffscale", Ours)
    theirs = calculate_metrics(
        input1=Images(sources[0]), input2=Images(sources[1]), feature_extractor="diffscale", cuda=False, cache=False,
        fid=True, kid=True, prc=True, isc=True, kid_subsets=10, kid_subset_size=40, verbose=False, save_cpu_ram=True,
        batch_size=13,
    )  # fmt: skip
    generated, reference = (Ours.extractor(s.images(0, s.n)[0])["features"].numpy() for s in sources)
    kid = kernel_distance(generated, reference, subsets=10, subset_size=40)
    near, score = neighbourhood(generated, reference), inception_score(generated)
    ours = {
        "frechet_inception_distance": frechet_of_features(generated, Root.of(moments_of(reference))),
        "kernel_inception_distance_mean": kid[0], "kernel_inception_distance_std": kid[1],
        "precision": near.precision, "recall": near.recall,
        "inception_score_mean": score[0], "inception_score_std": score[1],
    }  # fmt: skip
    for name, value in ours.items():
        # With 80 samples of 1280 dimensions their FID adds up rounding of eigenvalues that are zero.
        tolerance = 1e-5 if name == "frechet_inception_distance" else 1e-6
        assert value == pytest.approx(theirs[name], rel=tolerance), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_check_value_from_arrow_with_the_real_inception(tmp_path):
    """110.2808 ± .01: FID of CIFAR-10 train and test, 256 images each (torch-fidelity's test suite; ASSETS.md)."""
    from benchmarks.throughput.features import CHECK_VALUE, arrow, check_images, extract

    try:
        extractor = create_extractor("inception")
        sets = [arrow(check_images(train), tmp_path / str(train)) for train in (True, False)]
    except UserError as error:
        pytest.skip(f"neither on this machine nor from a registry: {error.setting}")
    a, b = (extract(extractor, d) for d in sets)
    assert frechet_of_features(a, Root.of(moments_of(b))) == pytest.approx(CHECK_VALUE, abs=0.01)
