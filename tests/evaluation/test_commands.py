"""`evaluate` and `sample` on a real run: a network of fifty thousand weights after two steps on 8-pixel emoji."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffscale import evaluate, sample
from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model, open_training_data
from diffscale.config.load import merge, validate
from diffscale.core.errors import UserError
from diffscale.data import Dataset, Loader, open_dataset
from diffscale.evaluation import Evaluator
from diffscale.evaluation.folder import evaluate_folder
from diffscale.evaluation.image_sources import FileSource
from diffscale.evaluation.metrics.statistics import moments_of, save_moments
from diffscale.evaluation.sampling import ModelSource
from diffscale.models.cost import count_cost
from diffscale.records.store import read_records
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint import saver as saving
from diffscale.training.checkpoint_evaluation import CheckpointEvaluator
from diffscale.training.evaluate_runs import evaluate_run
from diffscale.training.learner import Learner
from diffscale.training.load import list_targets, settings_of_run
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World
from diffscale.training.record_columns import record_columns
from tests.support.commands import run_command

from .conftest import pictures, write_dataset

FD = "fd_efficientnet_lite0"
SETTINGS = {
    "name": "small",
    "data": {"resolution": 8},
    "model": {"name": "unet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
    "train": {"images": 24, "global_batch": 12, "precision": "fp32", "compile": False, "channels_last": False},
    "eval": {
        "metrics": [FD],
        "n_generated": 20,
        "n_reference": 64,
        "batch": 10,
        "solver": {"name": "ddim", "steps": 2},
    },
}


@dataclass
class Training:
    """A network after two steps of training, and what a run's records say about it."""

    experiment: Experiment
    learner: Learner
    dataset: Dataset
    columns: dict

    @property
    def folder(self) -> Path:
        return Path(self.experiment.run_folder(self.dataset.content_hash))


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Training:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("storage")
    experiment = validate(SETTINGS | {"storage": str(place)})
    dataset = open_training_data(experiment)
    torch.manual_seed(0)
    diffusion = build_diffusion(experiment, dataset)
    learner = Learner(
        build_model(experiment, dataset), diffusion, experiment, World(), Numerics(), dataset.num_classes, None
    )
    with Loader(dataset, seed=0, global_batch=12, verify=False) as loader:
        for batch, _ in zip(loader, range(2), strict=False):
            learner.step(batch)
    cost = count_cost(lambda: build_model(experiment, dataset), 8, 3, dataset.num_classes)
    columns = record_columns(experiment, dataset, cost, World(), learner.images_seen, 1.0, None, 0.5, "fp32", 1)
    return Training(experiment, learner, dataset, columns)


@pytest.fixture(scope="module")
def run(training) -> Path:
    """A run's folder with one checkpoint, as training writes it."""
    shape = {"resolution": 8, "channels": 3, "num_classes": training.dataset.num_classes}
    settings = ck.save_settings(training.experiment)
    saver = saving.Saver(str(training.folder), 0, 1, "test", settings, lambda _: None)
    saver.save(saving.snapshot(training.learner, {"record": training.columns, "data": shape}, 0))
    saver.wait()
    return training.folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DIFFSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def call(app, *arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.mark.slow
@pytest.mark.gate
def test_evaluate_writes_records_once_with_several_solvers_and_averages(ray_cluster, run, own_cache, tmp_path):
    arguments = [str(run), "--solver", "ddim,steps=2", "--solver", "heun,steps=2", "--ema", "none", "--ema", "halflife"]
    output = call(evaluate.app, *arguments, "--workers", "1", "--out", str(tmp_path / "rows.json"))
    assert FD in output
    records = read_records([str(run)])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(r.solver, r.ema, r.nfe) for r in records} == {
        ("ddim", "none", 2),
        ("ddim", "halflife", 2),
        ("heun", "none", 3),
        ("heun", "halflife", 3),
    }
    assert {r["record_id"] for r in rows} == {r.record_id for r in records}
    # Not the weights of training under the name of their average: the two differ.
    values = {(r.solver, r.ema): r.value for r in records}
    assert values["ddim", "none"] != values["ddim", "halflife"]
    first = records[0]
    assert (first.images_seen, first.n_generated, first.n_reference, first.evaluated_on) == (24, 20, 64, "own workers")
    assert (first.memorisation is not None, first.value_heldout is not None) == (True, True)
    assert list((own_cache / "evaluations").iterdir()) == []
    assert list((run / "samples").glob("*.png"))


def test_sample_keeps_images_and_compares_runs_at_the_same_seeds(ray_cluster, run, tmp_path):
    call(sample.app, str(run), str(run), "--n", "12", "--out", str(tmp_path), "--trajectory", "2", "--workers", "1")
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert len(list(folder.glob("*.png"))) == 12
    assert {p.name.removeprefix(folder.name) for p in tmp_path.glob("*.png")} == {
        "-grid.png",
        "-trajectory.png",
        "comparison.png",
    }
    comparison = np.asarray(Image.open(tmp_path / "comparison.png").convert("L"))[:, -600:]
    half = comparison.shape[0] // 2
    np.testing.assert_array_equal(comparison[2 : half - 1], comparison[half + 1 : -2][: half - 3])
    call(sample.app, str(run), "--n", "12", "--out", str(tmp_path / "arrow"), "--format", "arrow", "--workers", "1")
    dataset = open_dataset(str(next(p for p in (tmp_path / "arrow").iterdir() if p.is_dir())))
    images, _ = dataset.gather(np.arange(12))
    first = np.asarray(Image.open(folder / "000000.png"))
    np.testing.assert_array_equal(images[0].numpy(), first)


@pytest.mark.slow
def test_sample_and_evaluate_say_how_many_images_are_done(ray_cluster, run, own_cache, tmp_path):
    drawn = run_command("sample", str(run), "--n", "12", "--out", str(tmp_path / "drawn"), "--workers", "1")
    assert "12 of 12 images in " in drawn.err
    solvers = ("--solver", "ddim,steps=1", "--solver", "heun,steps=1")
    evaluated = run_command("evaluate", str(run), *solvers, "eval.n_reference=63", "--workers", "1")
    assert evaluated.err.count("samples: 20 of 20 images in ") == 2
    assert "reference of efficientnet_lite0: 63 of 63 images in " in evaluated.err
    assert "evaluating: 2 of 2 sets of weights and samplers in " in evaluated.err
    (folder,) = (p for p in (tmp_path / "drawn").iterdir() if p.is_dir())
    of_folder = run_command("evaluate", str(folder), "--reference", str(folder), "--metrics", FD)
    assert "features: 12 of 12 images in " in of_folder.err


def test_settings_that_were_fixed_in_training_are_refused(run):
    (uri,) = list_targets(str(run))
    assert settings_of_run(uri, ["eval.n_generated=7"], "heun,steps=5").eval.solver.steps == 5
    with pytest.raises(UserError, match="OVERRIDE"):
        settings_of_run(uri, ["model.model_channels=32"])
    with pytest.raises(UserError, match="has: 24"):
        list_targets(str(run), "48")


def test_a_metric_without_weights_stops_before_sampling(ray_cluster, run, own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSCALE_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("diffscale.evaluation.networks.weights.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(ModelSource, "images", lambda *a: pytest.fail("sampled"))
    with pytest.raises(UserError, match=r"\(3\)"):
        evaluate_run(str(run), ["eval.metrics=[fid]"])


def test_in_training_the_average_is_evaluated_whatever_the_training_batch_is(training, own_cache, tmp_path):
    """Two mistakes of others: a distance of the weights without EMA, and one that the training batch size changes."""

    def values(**changes) -> list[float]:
        experiment = validate(merge(SETTINGS | {"storage": str(tmp_path)}, changes))
        diffusion = build_diffusion(experiment, training.dataset)
        evaluator = CheckpointEvaluator(experiment, training.dataset, diffusion, World(), Numerics())
        records = evaluator.evaluate(
            evaluator.averaged(training.learner), training.columns, run_folder=str(tmp_path), evaluated_on="own workers"
        )
        return [r.value for r in records]

    averaged = values()
    assert values(train={"global_batch": 24, "micro_batch": 6}) == averaged
    assert values(eval={"ema": "none"}) != averaged


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    dataset = tmp_path / "data"
    write_dataset(dataset, 40, 16)
    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(pictures(30, 16, seed=3)[0]):
        Image.fromarray(image).save(images / f"{i}.png")
    return images, dataset


def test_a_folder_an_npz_and_a_dataset_of_the_same_images_have_the_same_distance(folders, own_cache, tmp_path):
    images, reference = folders
    np.savez(tmp_path / "samples.npz", arr_0=pictures(30, 16, seed=3)[0])
    write_dataset(tmp_path / "as_arrow", 30, 16, seed=3)
    places = [images, tmp_path / "samples.npz", tmp_path / "as_arrow"]
    values = [evaluate_folder(str(p), str(reference), [FD])[0]["value"] for p in places]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)
    output = call(
        evaluate.app, str(images), "--reference", str(reference), "--metrics", f"{FD},recall_efficientnet_lite0"
    )
    assert FD in output
    assert evaluate_folder(str(images), str(images), [FD])[0]["value"] == pytest.approx(0, abs=1e-3)


def test_jpeg_on_one_side_is_said(folders, own_cache, tmp_path):
    images, reference = folders
    lossy = tmp_path / "lossy"
    lossy.mkdir()
    for file in images.glob("*.png"):
        Image.open(file).save(lossy / f"{file.stem}.jpg", quality=75)
    assert "only one" in evaluate_folder(str(lossy), str(reference), [FD])[0]["warning"]
    assert "only one" not in evaluate_folder(str(images), str(reference), [FD])[0]["warning"]


def test_statistics_of_another_network_are_refused(folders, own_cache, tmp_path):
    save_moments(tmp_path / "inception.npz", moments_of(np.random.default_rng(0).normal(size=(50, 2048))))
    with pytest.raises(UserError, match="1280 dimensions"):
        evaluate_folder(str(folders[0]), str(tmp_path / "inception.npz"), [FD])


def test_folders_that_cannot_be_compared_are_refused(folders, own_cache, tmp_path):
    images, reference = folders
    Image.new("RGB", (9, 9)).save(images / "odd.png")
    with pytest.raises(UserError, match=r"odd\.png is 9 x 9"):
        evaluate_folder(str(images), str(reference), [FD])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="a folder with images"):
        evaluate_folder(str(tmp_path / "empty"), str(reference), [FD])
    with pytest.raises(UserError, match="reference"):
        call(evaluate.app, str(reference))


def test_classes_and_the_nearest_pictures_of_images_on_disk(folders, own_cache, tmp_path, monkeypatch):
    images, reference = folders
    write_dataset(tmp_path / "samples", 30, 16, seed=3)
    monkeypatch.chdir(tmp_path)
    arguments = ["--reference", str(reference), "--metrics", FD, "--out", "rows.json"]
    output = call(evaluate.app, str(tmp_path / "samples"), *arguments, "--per-class", "--memorised", "4")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [r["metric"] for r in rows] == [FD, f"{FD}[0]", f"{FD}[1]", f"{FD}[2]"]
    assert [r["n_generated"] for r in rows] == [30, 10, 10, 10]
    assert "samples-nearest.png" in output
    # Four pairs of 16 pixels, enlarged until they are wide enough for their captions.
    assert Image.open(tmp_path / "samples-nearest.png").width > 4 * 2 * 16
    with pytest.raises(UserError, match="same classes"):
        call(evaluate.app, str(images), *arguments, "--per-class")


def test_options_of_sampling_are_refused_for_images_on_disk(folders, own_cache):
    images, reference = folders
    options = [["eval.n_generated=7"], ["--n", "7"], ["--solver", "ddim"], ["--ema", "none"], ["--keep", "there"]]
    options += [["--labels", "2"], ["--precision", "bf16"], ["--checkpoint", "all"]]
    for option in options:
        with pytest.raises(UserError, match="are not sampled"):
            call(evaluate.app, str(images), *option, "--reference", str(reference), "--metrics", FD)


def test_a_folder_whose_evaluation_was_interrupted_is_not_read_twice(folders, own_cache, monkeypatch):
    images, reference = folders
    whole = evaluate_folder(str(images), str(reference), [FD])
    assert list((own_cache / "evaluations").iterdir()) == []
    monkeypatch.setattr(Evaluator, "measure", lambda *a: pytest.fail("interrupted"))
    with pytest.raises(BaseException, match="interrupted"):
        evaluate_folder(str(images), str(reference), [FD])
    monkeypatch.undo()
    monkeypatch.setenv("DIFFSCALE_CACHE", str(own_cache))
    monkeypatch.setattr(FileSource, "images", lambda *a: pytest.fail("again"))
    assert evaluate_folder(str(images), str(reference), [FD]) == whole
