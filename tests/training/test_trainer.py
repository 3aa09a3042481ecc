"""Complete launches of a run in this process: everything that a worker does, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffscale.config.experiment import Experiment
from diffscale.core import storage
from diffscale.data import Dataset
from diffscale.models.cost import Cost
from diffscale.records.store import read_records
from diffscale.training.checkpoint import layout as ck
from diffscale.training.metrics_log import read_history
from diffscale.training.parallel import World
from diffscale.training.replay import replay
from diffscale.training.run import prepare
from diffscale.training.spec import Outcome
from diffscale.training.trainer import Trainer

from .small import BATCH, experiment, final_state

COST = Cost(1, 1.0, 100.0)


def launch(e: Experiment, dataset: Dataset, **more: Any) -> tuple[Outcome, str]:
    folder = e.run_folder(dataset.content_hash)
    return Trainer(e, folder, World(), COST, **more).run(), folder


def short(storage_folder: Path, name: str, **changes: Any) -> Experiment:
    settings = {"images": 30 * BATCH, **changes.pop("train", {})}
    return experiment(storage_folder, name=name, train=settings, **changes)


def test_a_run_ends_at_its_budget_with_a_checkpoint_and_a_history(shared_storage: Path, dataset: Dataset) -> None:
    outcome, folder = launch(short(shared_storage, "ends"), dataset)
    assert outcome.reason == "finished"
    assert outcome.images_seen == 30 * BATCH
    assert ck.images_of(ck.list_checkpoints(folder)[-1]) == 30 * BATCH
    rows = read_history(folder)
    assert [row["images_seen"] for row in rows] == [10 * BATCH, 20 * BATCH, 30 * BATCH]
    assert {"loss", "grad_norm", "mfu", "data_stall", "images_per_second", "loss_logsnr_q1"} <= set(rows[0])


def test_a_stop_request_and_a_second_launch_leave_the_same_weights(shared_storage: Path, dataset: Dataset) -> None:
    _, whole = launch(short(shared_storage, "whole1"), dataset)
    e, seen = short(shared_storage, "parts1"), 0

    def stop_requested() -> bool:
        nonlocal seen
        rows = read_history(e.run_folder(dataset.content_hash))
        seen = rows[-1]["images_seen"] if rows else 0
        return seen >= 10 * BATCH

    outcome, folder = launch(e, dataset, stop_requested=stop_requested)
    if outcome.reason == "signal":  # a fast machine may be through before the thread polls
        assert outcome.images_seen < 30 * BATCH
        outcome, folder = launch(e, dataset)
    assert outcome.reason == "finished"
    assert final_state(folder) == final_state(whole)


def test_results_that_are_read_a_step_later_are_the_same(shared_storage: Path, dataset: Dataset) -> None:
    """As on a GPU: the history, its unfinished row in a checkpoint, evaluations and the end do not lag."""
    evaluated = {"n_generated": 16, "n_heldout": 0, "points": [0.5, 1.0], "solver": {"name": "ddim", "steps": 1}}
    train = {"checkpoint": {"every_images": 7 * BATCH}}
    seen = []
    for ahead in (0, 1, 3):
        e = short(shared_storage, f"ahead{ahead}", train=train, eval=evaluated)
        outcome, folder = launch(e, dataset, steps_ahead=ahead)
        assert (outcome.reason, outcome.images_seen) == ("finished", 30 * BATCH)
        kept = ("images_seen", "loss", "grad_norm", "lr", "loss_logsnr_q1")
        rows = [[row[key] for key in kept] for row in read_history(folder)]
        stored = [ck.read_state(checkpoint) for checkpoint in ck.list_checkpoints(folder)]
        states = [(s["images_seen"], s["loss_sum"], s["interval"]["loss"], s["interval"]["steps"]) for s in stored]
        records = [(r.images_seen, r.value, r.train_loss) for r in read_records([folder])]
        seen.append((rows, states, records, final_state(folder)))
    assert len(seen[0][0]) == 3
    assert len(seen[0][2]) == 2
    assert seen[0] == seen[1] == seen[2]


def test_a_stop_is_seen_one_step_later_and_continues_to_the_same_weights(
    shared_storage: Path, dataset: Dataset
) -> None:
    _, whole = launch(short(shared_storage, "whole4"), dataset)
    e = short(shared_storage, "parts4", train={"wall_seconds": 1e-9})
    outcome, _ = launch(e, dataset, steps_ahead=1)
    assert outcome.reason == "wall"
    assert outcome.images_seen == outcome.checkpoint_images
    outcome, folder = launch(short(shared_storage, "parts4"), dataset, steps_ahead=1)
    assert outcome.reason == "finished"
    assert final_state(folder) == final_state(whole)


def test_a_run_with_a_larger_budget_continues(shared_storage: Path, dataset: Dataset) -> None:
    launch(short(shared_storage, "raised", train={"images": 12 * BATCH}), dataset)
    outcome, folder = launch(short(shared_storage, "raised"), dataset)
    _, whole = launch(short(shared_storage, "raised2"), dataset)
    assert outcome.reason == "finished"
    assert final_state(folder) == final_state(whole)


def test_wall_seconds_stop_at_a_checkpoint(shared_storage: Path, dataset: Dataset) -> None:
    outcome, folder = launch(short(shared_storage, "wall", train={"images": 10**6, "wall_seconds": 1.0}), dataset)
    assert outcome.reason == "wall"
    assert ck.images_of(ck.list_checkpoints(folder)[-1]) == outcome.images_seen


def test_a_stop_request_does_not_wait_for_an_evaluation(shared_storage: Path, dataset: Dataset) -> None:
    """It stops after a chunk, which is kept; the next launch computes the same value."""
    evaluated = {"n_generated": 256, "batch": 64, "points": [1.0], "solver": {"name": "ddim", "steps": 4}}
    _, whole = launch(short(shared_storage, "evaluated1", eval=evaluated), dataset)
    e = short(shared_storage, "evaluated2", eval=evaluated)
    folder = Path(e.run_folder(dataset.content_hash))
    outcome, _ = launch(e, dataset, stop_requested=lambda: any(folder.glob("evaluating-*/chunk-*")))
    assert outcome.reason == "signal"
    assert outcome.checkpoint_images == 30 * BATCH
    assert not list(folder.glob("records/*"))
    assert list(folder.glob("evaluating-*/chunk-*"))
    outcome, _ = launch(e, dataset)
    assert outcome.reason == "finished"
    (theirs,), (ours,) = read_records([whole]), read_records([str(folder)])
    assert ours.value == theirs.value


def test_a_stop_request_does_not_wait_for_the_reference(tmp_path: Path, dataset: Dataset) -> None:
    outcome, folder = launch(short(tmp_path, "refers", eval={"n_generated": 64}), dataset, stop_requested=lambda: True)
    assert outcome.reason == "signal"
    assert outcome.images_seen == 0
    assert not ck.list_checkpoints(folder)


def test_device_seconds_end_a_run(shared_storage: Path, dataset: Dataset) -> None:
    outcome, _ = launch(short(shared_storage, "seconds", train={"images": None, "device_seconds": 1.0}), dataset)
    assert outcome.reason == "finished"
    assert 1.0 <= outcome.device_seconds < 10


def test_losses_that_are_not_finite_stop_the_run_and_can_be_replayed(
    shared_storage: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """An absurd learning rate without clipping makes the weights overflow."""
    e = short(
        shared_storage,
        "diverges",
        optim={"name": "sgd", "lr": 1e30, "clip_grad_norm": None},
        train={"images": 100 * BATCH, "nonfinite_limit": 3, "checkpoint": {"every_images": 100 * BATCH}},
    )
    outcome, folder = launch(e, dataset)
    assert outcome.reason == "nonfinite"
    assert "3 steps in a row" in outcome.message
    assert storage.exists(storage.join(folder, "nonfinite.json"))
    report = replay(e)
    assert "replaying positions" in report
    assert "not finite" in report


def test_averages_are_the_same_after_a_damaged_newest_checkpoint(shared_storage: Path, dataset: Dataset) -> None:
    e = short(shared_storage, "damaged")
    _, folder = launch(e, dataset)
    before = final_state(folder)
    newest = Path(ck.list_checkpoints(folder)[-1])
    (newest / "model.safetensors").write_bytes(b"garbage")
    outcome, _ = launch(e, dataset)
    assert outcome.reason == "finished"
    assert final_state(folder) == before


def test_a_dry_run_prints_the_cost_and_starts_nothing(shared_storage: Path) -> None:
    from diffscale.training.dry_run import describe

    e = experiment(shared_storage, name="dry")
    text = describe(e)
    assert "# parameters" in text
    assert "GFLOP per image" in text
    assert not list((shared_storage / "runs").glob("dry-*"))


def test_more_workers_than_images_are_refused(shared_storage: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.workers"):
        prepare(experiment(shared_storage, train={"workers": BATCH + 1}))


def test_counted_flops_do_not_depend_on_how_the_run_computes(shared_storage: Path) -> None:
    costs = {
        prepare(experiment(shared_storage, train=settings))[1]
        for settings in ({}, {"activation_checkpointing": True}, {"precision": "bf16", "channels_last": True})
    }
    assert len(costs) == 1
    cost = costs.pop()
    assert 2.8 < cost.flops_per_image / (2 * cost.forward_macs) < 3.1  # 3 x forward, less the first layer's input
    assert torch.get_default_device().type == "cpu"


def test_an_interrupted_evaluation_continues_with_the_samples_it_had(shared_storage: Path, dataset: Dataset) -> None:
    evaluated = {"n_generated": 128, "n_reference": 32, "n_heldout": 0, "grid_images": 4, "points": [1.0]}
    e = short(
        shared_storage,
        "cutoff",
        train={"images": 2 * BATCH},
        eval={**evaluated, "solver": {"name": "ddim", "steps": 1}},
    )
    folder = e.run_folder(dataset.content_hash)
    generated: list[int] = []

    def cut(first: int, _: Any) -> None:
        generated.append(first)
        if first:
            raise InterruptedError

    trainer = Trainer(e, folder, World(), COST)
    assert trainer.evaluations.evaluator is not None
    trainer.evaluations.evaluator.evaluator.keep_images = cut
    with pytest.raises(InterruptedError):
        trainer.run()
    trainer.saver.wait()
    assert generated == [0, 64]

    again = Trainer(e, folder, World(), COST)
    assert again.evaluations.evaluator is not None
    again.evaluations.evaluator.evaluator.keep_images = lambda first, _: generated.append(first)
    assert again.run().reason == "finished"
    assert generated == [0, 64, 64]  # the first chunk was there
    assert len(storage.list_files(storage.join(folder, "records"), ".json")) == 1
    assert not list(Path(folder).glob("evaluating*"))
