from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from diffscale.evaluation.metrics.distances import inception_score, kernel_distance
from diffscale.evaluation.metrics.precision_recall import (
    memorisation,
    nearest,
    precision_recall,
    usual_distance,
)


def features(n: int, seed: int, dim: int = 32, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, size=(n, dim)).astype(np.float32)


def test_kid_agrees_with_torch_fidelity():
    x, y = features(300, 0, shift=0.2), features(260, 1)
    settings = {"kid_subsets": 20, "kid_subset_size": 100, "verbose": False}
    mean, std = kernel_distance(x, y, subsets=20, subset_size=100)
    # In float64, where both are exact: to 1e-6. On float32 features torch-fidelity sums in float32, worth 1e-4 here.
    exact = kid_features_to_metric(*(torch.from_numpy(f.astype(np.float64)) for f in (x, y)), **settings)
    assert mean == pytest.approx(exact["kernel_inception_distance_mean"], rel=1e-6)
    assert std == pytest.approx(exact["kernel_inception_distance_std"], rel=1e-6)
    single = kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), **settings)
    assert mean == pytest.approx(single["kernel_inception_distance_mean"], rel=1e-4)


def test_kid_of_two_samples_of_one_distribution_is_near_zero_and_small_sets_use_what_they_have():
    mean, std = kernel_distance(features(400, 0), features(400, 1), subsets=50)
    assert abs(mean) < 3 * std + 1e-3


def test_inception_score_agrees_with_torch_fidelity():
    logits = 3 * features(500, 0, dim=1008)
    theirs = isc_features_to_metric(torch.from_numpy(logits))
    mean, std = inception_score(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-6)


def test_precision_and_recall_agree_with_torch_fidelity_where_the_first_is_generated():
    generated, reference = features(300, 0, dim=8, shift=0.7), features(420, 1, dim=8)
    theirs = prc_features_to_metric(
        torch.from_numpy(generated),
        torch.from_numpy(reference),
        prc_neighborhood=3,
        prc_batch_size=100,
        save_cpu_ram=False,
        verbose=False,
    )
    ours = precision_recall(generated, reference)
    values = (ours.precision, ours.recall, ours.f_score)
    assert values == pytest.approx((theirs["precision"], theirs["recall"], theirs["f_score"]), rel=1e-6)


def test_a_generator_of_one_mode_has_precision_without_recall_and_not_the_other_way_round():
    reference = np.concatenate([features(200, 0, dim=4), features(200, 1, dim=4, shift=30)])
    one_mode = precision_recall(features(200, 2, dim=4), reference)
    assert one_mode.precision > 0.9
    assert one_mode.recall < 0.55
    assert one_mode.coverage < 0.55
    assert one_mode.density == pytest.approx(1, abs=0.25)


def test_nearest_is_exact_across_blocks(monkeypatch):
    from diffscale.evaluation.metrics import precision_recall as neighbours

    monkeypatch.setattr(neighbours, "QUERIES", 7)
    monkeypatch.setattr(neighbours, "CORPUS", 11)
    x, y = features(30, 0), features(50, 1)
    distances, rows = nearest(x, y, 3)
    full = torch.cdist(torch.from_numpy(x), torch.from_numpy(y)).sort(dim=1)
    np.testing.assert_allclose(distances, full.values[:, :3], rtol=1e-5)
    np.testing.assert_array_equal(rows, full.indices[:, :3])


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="more than 5"):
        precision_recall(features(5, 0), features(50, 1))


@pytest.mark.parametrize("with_heldout", [True, False])
def test_memorisation_is_one_for_copies_and_about_one_per_cent_for_unseen_images(with_heldout):
    training, heldout, fresh = features(2000, 0), features(2000, 1), features(2000, 2)
    usual = usual_distance(training, heldout if with_heldout else None)
    assert memorisation(fresh, training, usual) == pytest.approx(0.01, abs=0.008)
    assert memorisation(training[:300] + np.float32(0.01), training, usual) == 1.0


def test_duplicates_in_the_training_set_do_not_hide_memorisation():
    training = features(500, 0)
    usual = usual_distance(np.concatenate([training, training]), None)
    assert memorisation(training[:50] + np.float32(0.01), training, usual) == 1.0
