"""Runs begun by earlier code resume: commit 3316457 wrote the folders in old_run/ and stopped at 144 images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffscale.config.experiment import Experiment
from diffscale.config.load import parse_yaml, validate
from diffscale.core.device import device_name
from diffscale.data import Dataset
from diffscale.training.metrics_log import read_history
from diffscale.training.numerics import settled
from diffscale.training.parallel import World
from diffscale.training.run import prepare
from diffscale.training.trainer import Trainer

from .small import final_state

OLD = Path(__file__).parent / "old_run"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())


def settings_of(run: str, storage: Path) -> Experiment:
    """The settings of the old run, with another storage and twice the images."""
    text = (OLD / run / "checkpoints" / "images-000000144" / "experiment.yaml").read_text()
    tree = parse_yaml(text, run)
    tree["storage"] = str(storage)
    tree["train"]["images"] = 288
    return validate(tree)


@pytest.mark.parametrize("run", list(EXPECTED["runs"]), ids=["explicit", "auto"])
def test_a_run_of_an_earlier_commit_resumes_to_the_weights_of_an_uninterrupted_one(
    shared_storage: Path, dataset: Dataset, run: str
) -> None:
    """Losses agree on any machine; weights, averages and moments agree to the bit on the kind that made them.

    The row at 180 images is left out: checkpoints of that commit do not hold the sums of an unfinished interval.
    """
    e = settings_of(run, shared_storage)
    folder = shared_storage / "runs" / run
    shutil.copytree(OLD / run, folder)
    _, cost = prepare(e)
    e = settled(e, dataset)
    assert e.run_folder(dataset.content_hash) == str(folder)
    outcome = Trainer(e, str(folder), World(), cost).run()
    assert outcome.reason == "finished"
    losses = {str(row["images_seen"]): row["loss"] for row in read_history(str(folder)) if row["images_seen"] != 180}
    expected = EXPECTED["runs"][run]
    assert losses == pytest.approx(expected["losses"], rel=1e-3)
    cpu = f"{device_name(torch.device('cpu'))}, {torch.backends.cpu.get_cpu_capability()}"
    if (cpu, torch.__version__.split("+")[0]) == (EXPECTED["cpu"], EXPECTED["torch"]):
        assert final_state(str(folder)) == expected["sha256"]
