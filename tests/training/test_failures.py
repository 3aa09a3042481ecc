"""An error that would come again ends the run; what a lost node causes does not."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from diffscale.core.errors import UserError
from diffscale.data import Dataset, ShardError
from diffscale.records.schema import Record
from diffscale.records.store import read_records
from diffscale.training.failures import outcome_of
from diffscale.training.run import train

from .small import BATCH, experiment, wait_for

EVALUATED = {"n_generated": 16, "n_reference": 32, "n_heldout": 0, "batch": 16, "points": [0.5, 1.0]}


def test_an_error_of_settings_or_data_ends_the_run_at_once(tmp_path: Path) -> None:
    refused = outcome_of(UserError(setting="a.b", value=1, expected="2"), str(tmp_path), 0, 12)
    assert refused is not None
    assert refused.reason == "refused"
    damaged = outcome_of(ShardError("x.arrow", "it is missing"), str(tmp_path), 0, 12)
    assert damaged is not None
    assert damaged.reason == "data"
    full = outcome_of(OSError(errno.ENOSPC, "No space left on device", "/a"), str(tmp_path), 0, 12)
    assert full is not None
    assert (full.reason, full.message) == ("storage", "No space left on device: /a")


def test_the_same_error_at_the_same_position_ends_the_run_the_second_time(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert outcome_of(ZeroDivisionError("division by zero"), folder, 0, 12) is None
    assert outcome_of(ZeroDivisionError("division by zero"), folder, 0, 24) is None  # further on
    assert outcome_of(ValueError("division by zero"), folder, 0, 24) is None  # another error
    assert outcome_of(ValueError("division by zero"), folder, 1, 24) is None  # another rank
    failed = outcome_of(ValueError("division by zero"), folder, 0, 24)
    assert failed is not None
    assert failed.reason == "failed"
    assert "24 images: ValueError: division by zero" in failed.message
    assert "ValueError" in json.loads((tmp_path / "failures" / "rank-0.json").read_text())["traceback"][-1]


@pytest.mark.parametrize(
    "error",
    [
        dist.DistNetworkError("the store is gone"),
        RuntimeError("[third_party/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"),
        RuntimeError("NCCL error in: remote process exited"),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError("the store does not answer"),
        OSError("AWS Error NETWORK_CONNECTION during GetObject"),
    ],
    ids=repr,
)
def test_what_a_lost_node_causes_never_ends_the_run(error: Exception, tmp_path: Path) -> None:
    assert all(outcome_of(error, str(tmp_path), 0, 12) is None for _ in range(9))


class Breaks:
    """A rule that fails with each record and leaves nothing of the run, so that the next attempt meets it too."""

    def __init__(self, run_folder: str, attempts: Path) -> None:
        self.run_folder, self.attempts = Path(run_folder), attempts

    def __call__(self, record: Record) -> bool:
        wait_for(lambda: list(self.run_folder.glob("checkpoints/*/COMPLETE")))
        for folder in ("checkpoints", "records"):
            shutil.rmtree(self.run_folder / folder)
        with self.attempts.open("a") as file:
            file.write("x")
        raise ArithmeticError(f"no rule for {record.metric}")


@pytest.mark.slow
@pytest.mark.gate
def test_workers_that_fail_alike_are_started_twice_and_no_more(
    shared_storage: Path, dataset: Dataset, private_ray: None, tmp_path: Path
) -> None:
    train_settings = {"images": 4 * BATCH, "max_failures": 8}
    e = experiment(shared_storage, name="breaks", train=train_settings, eval=EVALUATED | {"points": [0.5]})
    breaks = Breaks(e.run_folder(dataset.content_hash), tmp_path / "attempts")
    result = train(e, should_stop=breaks, show=False)
    assert result.reason == "failed"
    assert f"twice the same error at {2 * BATCH} images: ArithmeticError: no rule for fd_" in result.message
    assert (tmp_path / "attempts").read_text() == "xx"
    assert train(e, should_stop=breaks, show=False).reason == "failed"
    assert (tmp_path / "attempts").read_text() == "xxx"  # another launch does not try it twice again


def test_a_label_that_the_data_do_not_name_ends_the_run_at_once(
    shared_storage: Path, dataset: Dataset, private_ray: None, tmp_path: Path
) -> None:
    folder = shutil.copytree(dataset.path, tmp_path / "mislabelled")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["class_names"] = manifest["class_names"][:1]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    e = experiment(shared_storage, name="mislabelled", data={"path": str(folder)})
    result = train(e, show=False)
    assert result.reason == "data"
    assert result.images_seen == 0


@pytest.mark.slow
@pytest.mark.gate
def test_a_run_that_diverges_stops_and_says_so_again(shared_storage: Path, dataset: Dataset, private_ray: None) -> None:
    optim = {"name": "sgd", "lr": 1e30, "clip_grad_norm": None}
    limits = {"images": 20 * BATCH, "nonfinite_limit": 3}
    e = experiment(shared_storage, name="lost", optim=optim, train=limits, eval=EVALUATED | {"points": [1.0]})
    for _ in range(2):
        result = train(e, show=False)
        assert result.reason == "nonfinite"
        assert "not finite" in result.message
    assert not read_records([result.run_folder])
