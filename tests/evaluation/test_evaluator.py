"""One evaluation from end to end on a small real network and dataset; the feature network is the embedded one."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffscale.core.errors import UserError
from diffscale.diffusion import SOLVERS
from diffscale.evaluation import Evaluator
from diffscale.evaluation.feature_store import ends
from diffscale.evaluation.image_sources import DatasetSource
from diffscale.evaluation.metrics.statistics import moments_of, save_moments

from .conftest import write_dataset

FD = "fd_efficientnet_lite0"


def settings(**changes) -> SimpleNamespace:
    """The fields of `experiment.eval`; the evaluator reads attributes alone."""
    values = {
        "metrics": (FD,),
        "n_generated": 40,
        "n_reference": None,
        "n_heldout": None,
        "eval_resolution": None,
        "resize": "default",
        "solver": SimpleNamespace(name="ddim"),
        "guidance_scale": 1.0,
        "guidance_interval": None,
        "guidance_channels": None,
        "guidance_state": "shared",
        "guide": None,
        "seed": 0,
        "batch": 8,
        "grid_images": 9,
    }
    return SimpleNamespace(**values | changes)


def by_name(evaluation) -> dict:
    return {m.metric: m for m in evaluation.measurements}


def test_every_number_of_an_evaluation_is_there(dataset, network, diffusion, tmp_path):
    heldout = write_dataset(tmp_path / "held", 24, 16, seed=5)
    names = (FD, "kid_efficientnet_lite0", "precision_efficientnet_lite0", "fd_inf_efficientnet_lite0")
    evaluator = Evaluator(settings(metrics=names), dataset, str(tmp_path), heldout=heldout, per_class=True)
    sampling = evaluator.sampling(SOLVERS["ddim"](steps=2))
    evaluation = evaluator.evaluate(network, diffusion, sampling)
    found = by_name(evaluation)
    fd = found[FD]
    assert np.isfinite([m.value for m in evaluation.measurements]).all()
    assert fd.value_low < fd.value < fd.value_high
    assert fd.value_heldout > 0
    assert fd.value_heldout != fd.value
    assert (fd.n_generated, fd.n_reference, fd.eval_resolution, fd.resize) == (40, 48, 16, "default")
    assert 0 <= fd.memorisation <= 1
    assert "biased" in fd.warning
    assert "fewer generated (40) than reference images (48)" in fd.warning
    assert {f"{FD}[0]", "kid_efficientnet_lite0_std", "precision_efficientnet_lite0[2]"} <= set(found)
    picture = Image.open(io.BytesIO(evaluation.grid_png))
    assert picture.width > 3 * 48
    assert set(sampling.fields(diffusion)) == {
        "solver",
        "nfe",
        "guidance_scale",
        "sampler",
        "sample_seed",
        "sample_batch",
    }


def test_only_samples_of_a_class_are_labelled(dataset, network, diffusion, tmp_path):
    evaluator = Evaluator(settings(metrics=()), dataset, str(tmp_path))
    sizes = []
    for classes in (3, 0):
        network.num_classes = classes
        evaluation = evaluator.evaluate(network, diffusion, evaluator.sampling(SOLVERS["ddim"](steps=1)))
        sizes.append(Image.open(io.BytesIO(evaluation.grid_png)).size)
    labelled, bare = sizes
    assert bare == (3 * (16 + 2) + 2, 3 * (16 + 2) + 2)
    assert labelled > bare


def test_copies_of_the_training_images_have_no_distance_and_are_called_memorised(dataset, tmp_path):
    evaluator = Evaluator(settings(), dataset, str(tmp_path), heldout=write_dataset(tmp_path / "h", 120, 16, seed=5))
    source = DatasetSource(dataset, np.arange(48), batch=8)
    fd = by_name(evaluator.evaluate_source(source))[FD]
    assert fd.value == pytest.approx(0, abs=1e-3)
    assert fd.memorisation == 1.0
    assert fd.value_heldout > 10 * abs(fd.value)


def test_an_interrupted_evaluation_resumes_with_the_same_numbers(dataset, network, diffusion, tmp_path):
    evaluator = Evaluator(settings(n_generated=130), dataset, str(tmp_path))
    sampling = evaluator.sampling(SOLVERS["ddim"](steps=1))
    whole = evaluator.evaluate(network, diffusion, sampling, folder=tmp_path / "work")
    files = sorted((tmp_path / "work").iterdir())
    before = [f.stat().st_mtime_ns for f in files]
    files[1].unlink()
    again = evaluator.evaluate(network, diffusion, sampling, folder=tmp_path / "work")
    assert [m.value for m in again.measurements] == [m.value for m in whole.measurements]
    after = [f.stat().st_mtime_ns for f in files]
    assert (after[0], after[2]) == (before[0], before[2])
    assert ends(tmp_path / "work") == {0: 64, 64: 128, 128: 130}


def test_runs_of_another_resolution_are_compared_at_the_common_one_and_at_their_own(dataset, tmp_path):
    larger = write_dataset(tmp_path / "large", 48, 32)
    both = settings(eval_resolution=32)
    evaluator = Evaluator(both, dataset, str(tmp_path), compared=larger)
    fd = by_name(evaluator.evaluate_source(DatasetSource(dataset, np.arange(48), batch=8)))[FD]
    assert fd.eval_resolution == 32
    assert fd.value_native == pytest.approx(0, abs=1e-3)
    assert fd.value > 1  # enlarged images are not the large ones
    with pytest.raises(UserError, match="eval_resolution"):
        Evaluator(both, dataset, str(tmp_path))


def test_the_resize_is_in_the_metrics_name_and_the_reference(dataset, tmp_path):
    source = DatasetSource(dataset, np.arange(48), batch=8)
    plain = by_name(Evaluator(settings(), dataset, str(tmp_path)).evaluate_source(source))[FD]
    clean = by_name(Evaluator(settings(resize="clean"), dataset, str(tmp_path)).evaluate_source(source))
    assert list(clean) == [f"{FD}_clean"]
    assert clean[f"{FD}_clean"].reference != plain.reference


def test_ranks_of_a_training_job_agree_with_one_process(dataset, network, diffusion, tmp_path):
    import threading

    sampling = Evaluator(settings(n_generated=130), dataset, str(tmp_path)).sampling(SOLVERS["ddim"](steps=1))
    alone = Evaluator(settings(n_generated=130), dataset, str(tmp_path)).evaluate(network, diffusion, sampling)
    barrier, slots, answers = threading.Barrier(2), [None, None], {}

    def worker(rank: int) -> None:
        def gather(mine):
            slots[rank] = mine
            barrier.wait()
            everyone = list(slots)
            barrier.wait()
            return everyone

        torch.set_num_threads(1)
        place = str(tmp_path / "two")
        evaluator = Evaluator(settings(n_generated=130), dataset, place, rank=rank, world=2, gather=gather)
        answers[rank] = evaluator.evaluate(network, diffusion, sampling)

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=120)
    assert answers[1].measurements == []
    assert answers[0].measurements[0].value == pytest.approx(alone.measurements[0].value, rel=1e-6)
    assert answers[0].grid_png == alone.grid_png


def test_published_statistics_can_be_the_reference(dataset, tmp_path):
    random = np.random.default_rng(0)
    save_moments(tmp_path / "stats.npz", moments_of(random.normal(size=(2000, 1280))))
    evaluator = Evaluator(settings(), dataset, str(tmp_path), reference_file=tmp_path / "stats.npz")
    fd = by_name(evaluator.evaluate_source(DatasetSource(dataset, np.arange(48), batch=8)))[FD]
    assert (fd.n_reference, fd.memorisation) == (2000, None)


def test_a_lossy_source_is_in_every_record(dataset, tmp_path):
    dataset.lossy = True
    evaluator = Evaluator(settings(), dataset, str(tmp_path))
    for m in evaluator.evaluate_source(DatasetSource(dataset, np.arange(48), batch=8)).measurements:
        assert "lossy" in m.warning


def test_the_picture_of_nearest_training_images(dataset, network, diffusion, tmp_path):
    evaluator = Evaluator(settings(), dataset, str(tmp_path))
    sampling = evaluator.sampling(SOLVERS["ddim"](steps=1))
    evaluator.evaluate(network, diffusion, sampling, folder=tmp_path / "work")
    png = evaluator.nearest_picture(evaluator.samples(network, diffusion, sampling), tmp_path / "work", 4)
    assert Image.open(io.BytesIO(png)).size[0] > 4 * 32


@pytest.mark.parametrize("name", ["fidd", "fd_inception", "kid_", "sfid_x"])
def test_a_wrong_metric_is_refused_before_anything_begins(dataset, tmp_path, name):
    with pytest.raises(UserError, match=r"eval\.metrics"):
        Evaluator(settings(metrics=(name,)), dataset, str(tmp_path))


def test_too_few_samples_for_a_metric_are_refused_before_anything_begins(dataset, tmp_path):
    with pytest.raises(UserError, match=r"eval\.n_generated"):
        Evaluator(settings(metrics=("fd_inf_efficientnet_lite0",), n_generated=20), dataset, str(tmp_path))


def test_latents_have_no_fid(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(type(dataset), "is_latent", True)
    with pytest.raises(UserError, match=r"data\.decoder"):
        Evaluator(settings(), dataset, str(tmp_path))
