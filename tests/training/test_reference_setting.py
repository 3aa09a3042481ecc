"""`eval.reference`: a run that is compared with a file of statistics from its first evaluation on."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest

from diffscale.config.factory import open_training_data
from diffscale.core.errors import UserError
from diffscale.evaluation.metrics.statistics import moments_of, save_moments
from diffscale.records.store import read_records
from diffscale.training.own_records import evaluated_points
from diffscale.training.parallel import World
from diffscale.training.run import count
from diffscale.training.settings_check import check_settings
from diffscale.training.trainer import Trainer

from .small import BATCH, experiment

EVAL = {
    "n_generated": 16,
    "n_heldout": 0,
    "points": [1.0],
    "grid_images": 0,
    "metrics": ["fd_efficientnet_lite0"],
    "solver": {"name": "ddim", "steps": 1},
}


def test_a_runs_records_name_the_statistics_and_are_its_own(shared_storage: Path, tmp_path: Path) -> None:
    save_moments(tmp_path / "stats.npz", moments_of(np.random.default_rng(0).normal(size=(2000, 1280))))
    e = experiment(shared_storage, train={"images": BATCH}, eval=EVAL | {"reference": str(tmp_path / "stats.npz")})
    dataset = check_settings(e)
    folder = e.run_folder(dataset.content_hash)
    Trainer(e, folder, World(), count(e, dataset)).run()
    records = [r for r in read_records([folder]) if r.reference_file]
    assert [(r.reference_file, r.n_reference, r.crop) for r in records] == [("stats.npz", 2000, "center")]
    assert not math.isnan(evaluated_points(folder, e)[BATCH])
    other = experiment(shared_storage, train={"images": BATCH}, eval=EVAL)
    assert math.isnan(evaluated_points(folder, other)[BATCH])


def test_a_reference_that_does_not_compare_is_refused_before_anything_starts(
    shared_storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFSCALE_OFFLINE", "1")
    monkeypatch.setenv("DIFFSCALE_CACHE", str(tmp_path))
    open_training_data(experiment(shared_storage))

    def refused(reference: str, **changes: object) -> str:
        with pytest.raises(UserError) as caught:
            check_settings(experiment(shared_storage, eval=EVAL | {"reference": reference, **changes}))
        return caught.value.text()

    assert "could not be fetched" in refused("cifar10")
    out = io.BytesIO()
    np.savez(out, mu=np.zeros(4), sigma=np.eye(4))
    (tmp_path / "references" / "published").mkdir(parents=True, exist_ok=True)
    (tmp_path / "references" / "published" / "cifar10-32x32.npz").write_bytes(out.getvalue())
    assert "32, the images of cifar10-32x32.npz" in refused("cifar10", metrics=["fid"])
    assert "mu and sigma" in refused(str(tmp_path / "missing.npz"))
