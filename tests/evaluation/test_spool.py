from __future__ import annotations

import numpy as np
import pytest

from diffscale.evaluation.spool import Spool, ends, write_chunk


def chunk(first: int, n: int) -> dict[str, np.ndarray]:
    rows = np.arange(first, first + n)
    return {"features": np.stack([rows, -rows], 1).astype(np.float32), "labels": rows.astype(np.int64)}


def test_rows_come_in_sample_order_whatever_the_order_of_writing(tmp_path):
    for first in (20, 0, 10):
        write_chunk(tmp_path, first, chunk(first, 10))
    features = Spool(tmp_path)["features"]
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
    assert Spool(tmp_path).n == 20
    spool = Spool(tmp_path, 13)
    assert (spool.n, len(spool["labels"])) == (13, 13)


def test_an_empty_folder_is_an_error_and_unfinished_files_are_not_seen(tmp_path):
    (tmp_path / ".chunk-000000000-000000010.arrow.abc.tmp").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="no features"):
        Spool(tmp_path)
