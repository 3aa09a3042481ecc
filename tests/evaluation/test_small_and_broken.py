"""Too few images, broken statistics, a diverged network, and two evaluations at once: one clear answer each."""

from __future__ import annotations

import math
import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffscale.core.cache import file_lock
from diffscale.core.errors import UserError
from diffscale.core.hashing import file_sha256
from diffscale.diffusion import SOLVERS, Guidance
from diffscale.evaluation import Evaluator
from diffscale.evaluation.evaluator import Measurement
from diffscale.evaluation.folder import evaluate_folder
from diffscale.evaluation.image_sources import DatasetSource
from diffscale.evaluation.metrics.registry import KINDS, LEAST, check_counts, parse_metric
from diffscale.evaluation.metrics.statistics import load_moments
from diffscale.evaluation.networks.extractor import LITE0
from diffscale.evaluation.networks.weights import load_weights
from diffscale.evaluation.sample_writer import SampleWriter
from diffscale.evaluation.sampling import ModelSource, Sampling, check_sampling

from .conftest import pictures, write_dataset
from .test_evaluator import FD, by_name, settings

OF_LITE0 = [f"{kind}_efficientnet_lite0" for kind in KINDS if kind not in ("sfid", "is")]


def write_pngs(folder: Path, n: int, seed: int = 0) -> str:
    folder.mkdir()
    for i, image in enumerate(pictures(n, 16, seed)[0]):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return str(folder)


@pytest.mark.parametrize("metric", OF_LITE0)
def test_one_image_is_refused_with_the_number_that_the_metric_needs(tmp_path: Path, cache: Path, metric: str) -> None:
    one, reference = write_pngs(tmp_path / "one", 1), write_pngs(tmp_path / "reference", 12)
    least = LEAST[parse_metric(metric).kind]
    with pytest.raises(UserError, match=f"at least {least} images to evaluate for {metric}") as refused:
        evaluate_folder(one, reference, [metric])
    assert "FOLDER" in str(refused.value)
    with pytest.raises(UserError, match=rf"at least \d reference images for {metric}"):
        evaluate_folder(write_pngs(tmp_path / "many", 30), one, [metric])


@pytest.mark.parametrize("metric", OF_LITE0)
def test_the_fewest_images_give_a_number(tmp_path: Path, cache: Path, metric: str) -> None:
    few = write_pngs(tmp_path / "few", LEAST[parse_metric(metric).kind])
    reference = write_pngs(tmp_path / "reference", 6, seed=1)
    assert all(math.isfinite(row["value"]) for row in evaluate_folder(few, reference, [metric]))


def test_a_run_without_evaluations_needs_no_images() -> None:
    check_counts([parse_metric(name) for name in OF_LITE0], 0, 100)
    check_counts([parse_metric("fid")], 2, None)


BROKEN = {
    "nan in the mean": {"mu": [math.nan, 0.0, 0.0]},
    "infinity in the mean": {"mu": [0.0, math.inf, 0.0]},
    "nan in the covariance": {"sigma": np.full((3, 3), math.nan)},
    "another shape": {"sigma": np.eye(4)},
    "no dimensions": {"mu": [], "sigma": np.zeros((0, 0))},
    "not symmetric": {"sigma": [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]},
    "a negative variance": {"sigma": np.diag([1.0, -1.0, 1.0])},
    "of one image": {"n": 1},
    "of fewer than no images": {"n": -5},
    "of nan images": {"n": math.nan},
    "of infinitely many images": {"n": math.inf},
    "of two numbers of images": {"n": [3, 4]},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_statistics_that_cannot_be_are_refused(tmp_path: Path, change: dict) -> None:
    np.savez(tmp_path / "stats.npz", **({"mu": np.zeros(3), "sigma": np.eye(3), "n": 100} | change))
    with pytest.raises(UserError, match="reference"):
        load_moments(tmp_path / "stats.npz")


def test_statistics_of_nan_or_without_a_root_are_refused_by_the_command(tmp_path: Path, cache: Path) -> None:
    many = write_pngs(tmp_path / "many", 6)
    mean = np.zeros(1280)
    mean[3] = math.nan
    np.savez(tmp_path / "nan.npz", mu=mean, sigma=np.eye(1280))
    with pytest.raises(UserError, match="nan or infinity"):
        evaluate_folder(many, str(tmp_path / "nan.npz"), [FD])
    indefinite = np.eye(1280)
    indefinite[0, 1] = indefinite[1, 0] = 2.0  # eigenvalues -1 and 3, though the diagonal is positive
    np.savez(tmp_path / "indefinite.npz", mu=np.zeros(1280), sigma=indefinite)
    with pytest.raises(UserError, match="eigenvalue -1"):
        evaluate_folder(many, str(tmp_path / "indefinite.npz"), [FD])


def _evaluate(images: str, reference: str, results) -> None:
    torch.set_num_threads(1)
    try:
        results.put((reference, evaluate_folder(images, reference, [FD])[0]["value"]))
    except BaseException as error:  # the other process waits for an answer
        results.put((reference, repr(error)))


def test_two_evaluations_of_one_folder_at_once_have_the_values_of_one_after_the_other(
    tmp_path: Path, cache: Path
) -> None:
    """Their features shared a folder before, and the first to end removed it."""
    images = write_pngs(tmp_path / "images", 40)
    references = [write_pngs(tmp_path / f"reference{i}", 10, seed=i) for i in (1, 2)]
    alone = {reference: evaluate_folder(images, reference, [FD])[0]["value"] for reference in references}
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    jobs = [*references, references[0]]  # two differ, two are the same
    processes = [context.Process(target=_evaluate, args=(images, reference, results)) for reference in jobs]
    for process in processes:
        process.start()
    found = [results.get(timeout=240) for _ in jobs]
    for process in processes:
        process.join()
    assert sorted(found) == sorted((reference, alone[reference]) for reference in jobs)
    assert list((cache / "evaluations").iterdir()) == []
    assert list((cache / "unpacked").iterdir()) == []


def test_evaluations_that_differ_have_different_folders(dataset, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", 48, 16, seed=1)
    place = str(tmp_path)
    evaluators = [
        Evaluator(settings(), dataset, place),
        Evaluator(settings(n_generated=41), dataset, place),
        Evaluator(settings(n_reference=40), dataset, place),
        Evaluator(settings(n_heldout=4), dataset, place),
        Evaluator(settings(metrics=("kid_efficientnet_lite0",)), dataset, place),
        Evaluator(settings(resize="clean"), dataset, place),
        Evaluator(settings(), dataset, place, compared=other),
        Evaluator(settings(), dataset, place, heldout=other),
        Evaluator(settings(), dataset, place, per_class=True),
    ]
    assert len({evaluator.identity() for evaluator in evaluators}) == len(evaluators)
    assert Evaluator(settings(), dataset, place).identity() == evaluators[0].identity()


@pytest.mark.parametrize("broken", [1, 40])
def test_samples_of_a_diverged_network_have_no_distance(
    dataset, network, diffusion, tmp_path: Path, broken: int
) -> None:
    """Their pixels became black images before, whose distance is a number."""
    names = (FD, "kid_efficientnet_lite0", "precision_efficientnet_lite0")
    evaluator = Evaluator(settings(metrics=names), dataset, str(tmp_path), per_class=True)
    sampling = evaluator.sampling(SOLVERS["ddim"](steps=1))

    class Diverged(ModelSource):
        def draw(self, positions, callback=None):
            images, labels = super().draw(positions, callback)
            lost = (positions < broken).view(-1, 1, 1, 1)
            return torch.where(lost, math.nan, images), labels

    good = evaluator.samples(network, diffusion, sampling)
    source = Diverged(**{name: getattr(good, name) for name in good.__dataclass_fields__})
    rows = by_name(evaluator.evaluate_source(source))
    for name in names:
        assert math.isnan(rows[name].value)
        assert rows[name].value_low is None
        assert rows[name].memorisation is None
        assert f"{broken} of 40 samples are not finite" in rows[name].warning
    whole = [row for name, row in rows.items() if "[" in name and math.isfinite(row.value)]
    assert bool(whole) == (broken == 1)  # a class without a broken sample keeps its value


def test_one_held_out_image_is_said_and_not_compared(dataset, tmp_path: Path) -> None:
    one = write_dataset(tmp_path / "held", 1, 16, seed=5)
    evaluator = Evaluator(settings(), dataset, str(tmp_path), heldout=one)
    source = write_dataset(tmp_path / "more", 12, 16, seed=6)
    (row,) = evaluator.evaluate_source(DatasetSource(source, np.arange(12))).measurements
    assert (row.value_heldout, row.n_heldout) == (None, None)
    assert "one held-out image is too few" in row.warning


def test_a_measurement_says_which_held_out_images_and_which_file_it_used(dataset, tmp_path: Path) -> None:
    heldout = write_dataset(tmp_path / "held", 24, 16, seed=5)
    source = DatasetSource(dataset, np.arange(48))

    def measured(**changes) -> Measurement:
        return (
            Evaluator(settings(**changes), dataset, str(tmp_path), heldout=heldout)
            .evaluate_source(source)
            .measurements[0]
        )

    every, few = measured(), measured(n_heldout=10)
    assert (every.n_heldout, few.n_heldout, every.reference_file) == (24, 10, None)
    assert None not in (every.heldout, few.heldout)
    assert every.heldout != few.heldout


@pytest.mark.parametrize(
    ("change", "counts", "setting"),
    [
        ({"precision": "fp23"}, (1, 1), "precision"),
        ({"labels": "3"}, (5, 5), "labels"),
        ({"labels": "3"}, (), "labels"),
        ({"labels": "odd"}, (), "labels"),
        ({"guidance": Guidance(2.0)}, (), r"eval\.guidance_scale"),
    ],
)
def test_sampling_options_that_would_have_no_effect_are_refused(
    sampling: Sampling, change: dict, counts: tuple[int, ...], setting: str
) -> None:
    """A record would say them all the same."""
    with pytest.raises(UserError, match=setting):
        check_sampling(replace(sampling, **change), counts)
    check_sampling(sampling, counts)


def test_a_class_without_counts_is_no_proportion(sampling: Sampling) -> None:
    with pytest.raises(ValueError, match="no class has an image"):
        check_sampling(sampling, (0, 0, 0))


def test_threads_that_do_the_same_evaluation_wait_for_each_other(dataset, tmp_path: Path, cache: Path, caplog) -> None:
    path, order = cache / "locks" / "x", []

    def second() -> None:
        with file_lock(path, "the same evaluation"):
            order.append("second")

    with file_lock(path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.5)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert "waiting for another process: the same evaluation" in caplog.text


def test_own_weights_of_a_network_are_another_network(dataset, tmp_path: Path, cache: Path, monkeypatch) -> None:
    """A record said the network's name whatever the weights, and took the reference's features from the cache."""
    source = DatasetSource(dataset, np.arange(48))
    published = Evaluator(settings(), dataset, str(tmp_path)).evaluate_source(source).measurements[0]
    state = load_weights(LITE0)
    state["conv_stem.weight"] = -state["conv_stem.weight"]
    save_file(state, tmp_path / "efficientnet_lite0.safetensors")
    digits = file_sha256(tmp_path / "efficientnet_lite0.safetensors")[:8]
    monkeypatch.setenv("DIFFSCALE_WEIGHTS", str(tmp_path))
    own = Evaluator(settings(), dataset, str(tmp_path)).evaluate_source(source).measurements[0]
    assert (published.network, own.network) == ("efficientnet_lite0", f"efficientnet_lite0@{digits}")
    assert published.reference != own.reference
    assert [published.value, own.value] == pytest.approx([0, 0], abs=1e-3)


@pytest.mark.parametrize("metric", ["kid_efficientnet_lite0", "precision_efficientnet_lite0", FD])
def test_statistics_that_answer_no_metric_are_refused_before_anything_is_sampled(
    dataset, tmp_path: Path, metric: str
) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(UserError, match="reference"):
        Evaluator(settings(metrics=(metric,)), dataset, str(tmp_path), reference_file=tmp_path / "stats.npz")
    with pytest.raises(UserError, match="reference"):
        Evaluator(settings(metrics=(metric,)), dataset, str(tmp_path), reference_file=tmp_path / "missing.npz")


@pytest.mark.parametrize("form", ["png", "arrow"])
def test_samples_of_another_sampler_are_not_mixed_into_a_folder(tmp_path: Path, form: str) -> None:
    images, labels = pictures(4, 8)
    columns = {"images": images.transpose(0, 3, 1, 2).reshape(4, -1), "labels": labels}
    for source in ({"sampler": "a"}, {"sampler": "a"}):
        writer = SampleWriter(tmp_path / "samples", form, (3, 8, 8), [], source)
        writer(0, columns)
        writer.close()
    with pytest.raises(UserError, match="the same weights and sampler"):
        SampleWriter(tmp_path / "samples", form, (3, 8, 8), [], {"sampler": "b"})
    other = "arrow" if form == "png" else "png"
    with pytest.raises(UserError, match="the same weights and sampler"):
        SampleWriter(tmp_path / "samples", other, (3, 8, 8), [], {"sampler": "a"})
