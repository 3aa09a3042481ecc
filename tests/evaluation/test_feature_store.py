from __future__ import annotations

import numpy as np
import pytest

from diffscale.evaluation.feature_store import FeatureStore, ends, select_rows, write_chunk
from diffscale.evaluation.metrics.distances import Root, inception_score, kernel_distance
from diffscale.evaluation.metrics.intervals import frechet_at_infinity, frechet_interval
from diffscale.evaluation.metrics.precision_recall import CORPUS, memorisation, precision_recall, usual_distance
from diffscale.evaluation.metrics.statistics import moments_of


def chunk(first: int, n: int) -> dict[str, np.ndarray]:
    rows = np.arange(first, first + n)
    return {"features": np.stack([rows, -rows], 1).astype(np.float32), "labels": rows.astype(np.int64)}


def test_rows_come_in_sample_order_whatever_the_order_of_writing(tmp_path):
    for first in (20, 0, 10):
        write_chunk(tmp_path, first, chunk(first, 10))
    features = FeatureStore(tmp_path)["features"]
    assert features.shape == (30, 2)
    np.testing.assert_array_equal(features[:][:, 0], np.arange(30))
    np.testing.assert_array_equal(features[8:23][:, 1], -np.arange(8, 23))
    np.testing.assert_array_equal(features[np.array([29, 0, 15, 15])][:, 0], [29, 0, 15, 15])


def test_a_smaller_number_is_a_prefix_and_a_longer_chunk_replaces_a_shorter(tmp_path):
    write_chunk(tmp_path, 0, chunk(0, 10))
    write_chunk(tmp_path, 10, chunk(10, 4))
    assert ends(tmp_path) == {0: 10, 10: 14}
    write_chunk(tmp_path, 10, chunk(10, 10))
    assert ends(tmp_path) == {0: 10, 10: 20}
    assert FeatureStore(tmp_path).n == 20
    spool = FeatureStore(tmp_path, 13)
    assert (spool.n, len(spool["labels"])) == (13, 13)


def test_samples_that_another_process_cleared_away_are_missed(tmp_path):
    for first in (0, 10, 20):
        write_chunk(tmp_path, first, chunk(first, 10))
    with pytest.raises(FileNotFoundError, match="samples 30 to 40"):
        FeatureStore(tmp_path, 40)
    (tmp_path / "chunk-000000010-000000020.arrow").unlink()
    with pytest.raises(FileNotFoundError, match="samples 10 to 19"):
        FeatureStore(tmp_path)


class Watched:
    """Features on disk, as it were: `most` is the largest number of rows that were read at once."""

    def __init__(self, n: int, dim: int, seed: int) -> None:
        self.values = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
        self.shape, self.dtype, self.most = self.values.shape, self.values.dtype, 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key):
        read = self.values[key]
        self.most = max(self.most, len(read))
        return read


METRICS = {
    "fd": lambda x, y: frechet_interval(x, Root.of(moments_of(y))),
    "fd_inf": lambda x, y: frechet_at_infinity(x, Root.of(moments_of(y))),
    "kid": kernel_distance,
    "is": lambda x, y: inception_score(x),
    "precision_recall": precision_recall,
    "memorisation": lambda x, y: memorisation(x, y, usual_distance(y, x)),
    "a class": lambda x, y: frechet_interval(select_rows(x, np.arange(1, 10_000)), Root.of(moments_of(y))),
}


@pytest.mark.parametrize("metric", METRICS)
def test_no_metric_reads_all_features_at_once(metric):
    generated, reference = Watched(10_000, 4, 0), Watched(9_000, 4, 1)
    METRICS[metric](generated, reference)
    assert 0 < generated.most <= CORPUS
    assert reference.most <= CORPUS


def test_an_empty_folder_is_an_error_and_unfinished_files_are_not_seen(tmp_path):
    (tmp_path / ".chunk-000000000-000000010.arrow.abc.tmp").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="no features"):
        FeatureStore(tmp_path)
