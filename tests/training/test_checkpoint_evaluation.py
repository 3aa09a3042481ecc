"""One checkpoint has one set of records, whoever evaluates it; "best" follows the metric's direction."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffscale.config.factory import build_diffusion, build_model, open_training_data
from diffscale.config.load import load_experiment
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data import Dataset
from diffscale.evaluation import ModelSource
from diffscale.evaluation.distribute import Stopped
from diffscale.models.cost import Cost
from diffscale.records.schema import Record
from diffscale.records.store import read_records, write_record
from diffscale.training import evaluate_runs, posthoc_ema
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.tensors import CheckpointDamaged, read_group, write_group
from diffscale.training.checkpoint_evaluation import CheckpointEvaluator
from diffscale.training.evaluate_runs import EvaluateOptions, evaluate_run
from diffscale.training.numerics import Numerics
from diffscale.training.own_records import evaluated_points, is_own
from diffscale.training.parallel import World
from diffscale.training.run_evaluations import RunEvaluations
from diffscale.training.trainer import Trainer
from tests.support.run_records import own_record

from .small import BATCH, experiment

PRECISION = "precision_efficientnet_lite0"
OF_THE_EVALUATION = ("created", "evaluated_on")
EVALUATED: dict[str, Any] = {
    "eval_resolution": 16,
    "n_generated": 64,
    "n_reference": 64,
    "points": [1.0],
    "grid_images": 4,
    "metrics": ["fd_efficientnet_lite0", "kid_efficientnet_lite0"],
    "solver": {"name": "ddim", "steps": 1},
}


@pytest.fixture(scope="module")
def run(shared_storage: Path, dataset: Dataset) -> str:
    """A run in bf16 of 8-pixel images that is evaluated at 16 pixels."""
    e = experiment(shared_storage, name="enlarged", train={"images": 2 * BATCH, "precision": "bf16"}, eval=EVALUATED)
    folder = e.run_folder(dataset.content_hash)
    Trainer(e, folder, World(), Cost(1, 1.0, 100.0)).run()
    return folder


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Evaluation without Ray actors."""
    monkeypatch.setenv("DIFFSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate_runs, "connect", lambda: None)
    monkeypatch.setattr(evaluate_runs, "devices", lambda workers: (0, "cpu"))


def comparable(records: list[Record]) -> dict[str, dict[str, Any]]:
    rows = {r.record_id: r.model_dump() for r in records}
    return {key: {k: v for k, v in row.items() if k not in OF_THE_EVALUATION} for key, row in rows.items()}


def test_training_and_evaluate_write_the_same_records(run: str, in_this_process: None) -> None:
    trained = read_records([run])
    again = evaluate_run(run)
    assert len(trained) == 3
    assert comparable(again) == comparable(trained)
    assert {r.evaluated_on for r in again} == {"own workers"}
    assert all(r.val_loss is not None and r.value_native is not None for r in trained if r.metric.startswith("fd"))
    assert all('"precision":"bf16"' in r.sampler for r in trained)
    assert not list(Path(run).glob("evaluating-*"))


def test_an_interrupted_evaluation_of_a_remote_run_resumes_on_another_machine(
    run: str, dataset: Dataset, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its features were on the disk of the machine that was lost."""
    checkpoint = ck.list_checkpoints(run)[-1]
    e = experiment(Path(run).parents[1], eval=EVALUATED | {"n_generated": 150, "batch": 64})
    columns, drawn = ck.read_state(checkpoint)["record"], list[int]()
    original = ModelSource.samples
    monkeypatch.setattr(ModelSource, "samples", lambda *a: drawn.append(a[1]) or original(*a))
    for machine, answers in (("first", [False, False, True]), ("second", [False] * 3)):
        monkeypatch.setenv("DIFFSCALE_CACHE", str(tmp_path / machine))
        asked = iter(answers)
        evaluator = CheckpointEvaluator(
            e, dataset, build_diffusion(e, dataset), World(), Numerics(), stop_requested=lambda asked=asked: next(asked)
        )
        evaluator.prepare()
        with pytest.raises(Stopped) if machine == "first" else nullcontext():
            evaluator.evaluate(
                evaluator.stored(checkpoint), columns, run_folder=f"{bucket}/evaluated", evaluated_on="training workers"
            )
    assert drawn == [0, 64, 128]
    assert {r.n_generated for r in read_records([f"{bucket}/evaluated"])} == {150}
    assert not [uri for uri in storage.list_files(f"{bucket}/evaluated", recursive=True) if "evaluating" in uri]


def test_samples_that_do_not_fit_the_memory_end_the_evaluation_with_a_smaller_batch(
    run: str, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that ran out of memory was restarted to meet it again, train.max_failures times."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(ModelSource, "draw", full)
    with pytest.raises(UserError, match=r"eval\.batch = 64") as told:
        evaluate_run(run)
    assert told.value.fields()["fix"] == "eval.batch=32"


def test_held_out_images_are_compared_at_the_resolution_of_evaluation(shared_storage: Path, dataset: Dataset) -> None:
    e = experiment(shared_storage, eval=EVALUATED)
    evaluator = CheckpointEvaluator(e, dataset, build_diffusion(e, dataset), World(), Numerics())
    heldout = evaluator.evaluator.heldout
    assert heldout is not None
    assert (dataset.resolution, heldout.resolution) == (8, 16)
    assert heldout.n == dataset.heldout.n  # type: ignore[union-attr]


def test_widths_of_a_run_below_the_resolution_of_evaluation_can_be_swept(run: str, in_this_process: None) -> None:
    """The samples are drawn in the run's precision."""
    widths = [0.05, 0.1]
    checkpoint, _ = posthoc_ema.make(run, widths)
    found: list[Record] = []
    best = posthoc_ema.sweep(checkpoint, widths, on_record=found.append)
    assert [r.ema for r in found] == ["std0.050", "std0.100"]
    assert best.value == min(r.value for r in found)
    assert all(r.eval_resolution == 16 and '"precision":"bf16"' in r.sampler for r in found)


@pytest.mark.parametrize(("metric", "best"), [("fd_efficientnet_lite0", "std0.050"), (PRECISION, "std0.100")])
def test_the_best_width_follows_the_direction_of_the_metric(metric: str, best: str) -> None:
    rows = [SimpleNamespace(metric=metric, value=v, ema=e) for e, v in (("std0.050", 0.1), ("std0.100", 0.9))]
    assert posthoc_ema.best_of(rows).ema == best  # type: ignore[arg-type]


@pytest.mark.parametrize(("metric", "best"), [("fd_efficientnet_lite0", 10), (PRECISION, 30)])
def test_the_best_checkpoints_follow_the_direction_of_the_metric(
    shared_storage: Path, dataset: Dataset, metric: str, best: int
) -> None:
    settings = {"keep_best": 1, "keep_points": False}
    e = experiment(shared_storage, train={"checkpoint": settings}, eval={"metrics": [metric]})
    values = {10: 0.1, 20: 0.5, 30: 0.9}
    evaluations = RunEvaluations(
        e,
        "/nowhere",
        dataset,
        build_diffusion(e, dataset),
        World(),
        Numerics(),
        {},
        submit=None,
        on_records=lambda images, records: False,
        on_picture=lambda images, uri: None,
        stop_requested=lambda: False,
    )
    evaluations.values.update(values)
    assert evaluations.retain([10, 20, 30], []) == {best}


def test_values_of_other_settings_do_not_count_as_the_run_s_own(run: str, in_this_process: None) -> None:
    (images,) = evaluated_points(run, experiment("/tmp", name="enlarged", eval=EVALUATED))
    own = next(r for r in read_records([run]) if r.metric == "fd_efficientnet_lite0" and r.ema == "halflife")
    evaluate_run(run, ["eval.n_generated=32"], EvaluateOptions(labels="balanced"))
    assert evaluated_points(run, experiment("/tmp", name="enlarged", eval=EVALUATED)) == {images: own.value}


OTHER: dict[str, dict[str, Any]] = {
    "number of samples": {"n_generated": 32},
    "sampler": {"sampler": "{}"},
    "average": {"ema": "none"},
    "seed": {"sample_seed": 1},
    "reference": {"reference": "other", "reference_file": "published.npz"},
    "resolution": {"eval_resolution": 64},
    "number of references": {"reference": "fewer", "settings": {"eval.n_reference": 7}},
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER.keys())
def test_only_the_own_evaluation_of_a_run_is_its_value(tmp_path: Path, change: dict[str, Any]) -> None:
    e = experiment(tmp_path, eval=EVALUATED)
    assert is_own(own_record(e, 5.0), e)
    write_record(str(tmp_path), own_record(e, 1.0, images_seen=10, **change))
    assert str(evaluated_points(str(tmp_path), e)) == "{10: nan}"
    write_record(str(tmp_path), own_record(e, 5.0, images_seen=10))
    assert evaluated_points(str(tmp_path), e) == {10: 5.0}


def test_a_value_of_an_earlier_launch_under_other_settings_is_done_but_never_the_best(
    tmp_path: Path, shared_storage: Path, dataset: Dataset
) -> None:
    """Its settings of evaluation had changed between the launches; 1.0 is of another number of samples."""
    settings = {"keep_best": 1, "keep_points": False}
    e = experiment(shared_storage, train={"checkpoint": settings}, eval=EVALUATED)
    write_record(str(tmp_path), own_record(e, 1.0, images_seen=10, n_generated=32))
    write_record(str(tmp_path), own_record(e, 5.0, images_seen=20))
    evaluations = RunEvaluations(
        e,
        str(tmp_path),
        dataset,
        build_diffusion(e, dataset),
        World(),
        Numerics(),
        {10: 1.0, 20: 5.0},
        submit=None,
        on_records=lambda images, records: False,
        on_picture=lambda images, uri: None,
        stop_requested=lambda: False,
    )
    assert evaluations.retain([10, 20], []) == {20}
    assert set(evaluations.values) == {10, 20}


def test_a_later_evaluation_records_its_own_settings(run: str, in_this_process: None) -> None:
    """The number of samples in `settings` was that of the training before, whatever was evaluated."""
    options = EvaluateOptions(averages=("0.1",), solvers=("ddim,steps=2",))
    (record, *_) = evaluate_run(run, ["eval.n_generated=48", "eval.n_heldout=16", "eval.seed=3"], options)
    told = {key: record.settings[f"eval.{key}"] for key in ("n_generated", "n_heldout", "seed", "ema", "solver.steps")}
    assert told == {"n_generated": 48, "n_heldout": 16, "seed": 3, "ema": "std0.100", "solver.steps": 2}
    assert (record.n_generated, record.n_heldout, record.sample_seed, record.ema) == (48, 16, 3, "std0.100")
    every, *_ = evaluate_run(run, ["eval.n_generated=48", "eval.seed=3"], options)
    assert every.record_id != record.record_id
    assert (every.value, every.value_heldout) == (record.value, pytest.approx(every.value_heldout))
    assert every.value_heldout != record.value_heldout


def test_a_checkpoint_whose_average_lacks_a_parameter_is_damaged(run: str, tmp_path: Path) -> None:
    """The weights of training took the place of what lacked before."""
    place = Path(shutil.copytree(run, tmp_path / "run"))
    checkpoint = ck.list_checkpoints(str(place))[-1]
    group = {name: tensor.clone() for name, tensor in read_group(checkpoint, "ema/halflife").items()}
    name = sorted(group)[0]
    write_group(checkpoint, "ema/halflife", {key: t for key, t in group.items() if key != name}, {}, 0, 1)
    settings = ck.read_experiment(checkpoint)
    model = build_model(settings, open_training_data(settings))
    with pytest.raises(CheckpointDamaged, match=name):
        ck.load_weights(model, checkpoint, "halflife")
    ck.load_weights(model, checkpoint, "none")


def test_a_guided_network_that_carries_state_has_own_records_too(tmp_path: Path) -> None:
    """Its sampler has a setting that others lack; the evaluation and the search for its records take one sampler."""
    e = load_experiment("quickstart-rin", ["eval.guidance_scale=2.0", f"storage={tmp_path}"])
    record = own_record(e, 5.0)
    assert "guidance_state" in record.sampler
    assert is_own(record, e)
