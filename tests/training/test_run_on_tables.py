"""A run that reads Hugging Face's files directly: its samples' classes, and a test split without labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffscale.config.factory import open_training_data
from diffscale.data import open_dataset
from diffscale.models.cost import Cost
from diffscale.records.store import read_records
from diffscale.training import evaluate_runs
from diffscale.training.evaluate_runs import EvaluateOptions, evaluate_run
from diffscale.training.parallel import World
from diffscale.training.trainer import Trainer
from tests.support.sources import CLASSES
from tests.support.tables import IMAGE, class_label, images, write_table

from .small import BATCH, experiment


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Evaluation without Ray actors."""
    monkeypatch.setenv("DIFFSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate_runs, "connect", lambda: None)
    monkeypatch.setattr(evaluate_runs, "devices", lambda workers: (0, "cpu"))


def test_a_run_with_an_unlabelled_test_split_is_evaluated_and_samples_the_classes_of_its_data(
    tmp_path: Path, in_this_process: None
) -> None:
    """-1 is the hub's sign for a label that is not published. Two of three images are cats, and so are the samples."""
    label = class_label(*CLASSES)
    train = {"image": images(range(18)), "label": [0, 1, 1] + [2] * 12 + [0, 1, 0]}
    write_table(tmp_path / "hub" / "train-00000-of-00001.parquet", train, image=IMAGE, label=label)
    write_table(tmp_path / "hub" / "test-00000-of-00001.parquet", {"image": images(range(18, 24)), "label": [-1] * 6})
    e = experiment(
        tmp_path,
        name="hub",
        data={"path": str(tmp_path / "hub")},
        train={"images": BATCH},
        eval={
            "n_generated": 64,
            "points": [1.0],
            "grid_images": 4,
            "metrics": ["fd_efficientnet_lite0"],
            "solver": {"name": "ddim", "steps": 1},
        },
    )
    folder = e.run_folder(open_training_data(e).content_hash)
    Trainer(e, folder, World(), Cost(1, 1.0, 100.0)).run()
    (record,) = read_records([folder])
    assert record.val_loss is None
    assert record.value_heldout is not None
    evaluate_run(folder, ["eval.n_generated=300"], EvaluateOptions(keep=str(tmp_path / "kept"), keep_format="arrow"))
    kept = open_dataset(str(next((tmp_path / "kept").iterdir())))
    shares = np.array(kept.class_counts) / kept.n
    np.testing.assert_allclose(shares, [1 / 6, 1 / 6, 2 / 3], atol=0.08)  # three standard deviations of 300 draws
