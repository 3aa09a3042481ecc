"""The benchmark's suites: valid runs within their budgets, and resumed where they were interrupted."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.run import asked_of, committed, keep_records, pattern, share_of, units_of
from benchmarks.suites import budget, peer_run, peers
from benchmarks.suites.peers import INSTALL, RECIPES
from benchmarks.suites.suite import RESULTS, load_suite, suite_names
from diffscale.core.errors import UserError
from diffscale.diffusion import training_loss
from diffscale.records.store import read_records, write_record
from diffscale.training.plan import whole_batches
from diffscale.training.run import prepare
from tests.support.datasets import pictures, write_dataset


def is_installed(peer: str) -> bool:
    return find_spec(peer.replace("-", "_")) is not None


@pytest.mark.parametrize("name", suite_names())
def test_a_suite_has_the_budget_that_is_committed_for_it(name: str) -> None:
    """Sizes and FLOPs are counted on the meta device, so the committed table is a function of the suite."""
    suite = load_suite(name)
    kept = pd.read_csv(budget.FILE).query("suite == @name").reset_index(drop=True)
    if not all(is_installed(peer.name) for peer in suite.peers):  # the optional extra `peers`
        suite = suite.model_copy(update={"peers": []})
        kept = kept[~kept["run"].str.startswith(tuple(RECIPES))]
    table = budget.budget(suite, suite.experiments())
    pd.testing.assert_frame_equal(table, kept, check_dtype=False)
    assert (table["nfe"] <= 20).all()
    ours = ~table["run"].str.startswith(tuple(RECIPES))
    if suite.data == "cifar10":
        assert (table["forward_gflop"][ours] <= 0.5).all()


@pytest.mark.parametrize("name", ["cifar10", "cifar10-small", "rin-settings", "rin-exchange", "rin-parts"])
def test_compared_runs_end_within_half_a_percent_of_one_compute(name: str) -> None:
    """Budgets are rounded up to whole batches, so a budget must have 200 steps or more."""
    suite = load_suite(name)
    experiment = suite.experiments()[0]
    runs = pd.read_csv(budget.FILE).query("suite == @name and train_flops == @experiment.train.flops and seed == 0")
    runs = runs[~runs["run"].str.startswith(tuple(RECIPES))]
    flops = runs["training_gflop_per_image"] * 1e9
    ends = [whole_batches(experiment.train.flops / f, experiment.train.global_batch) * f for f in flops]
    assert len(ends) == len(suite.variants)
    assert max(ends) / min(ends) < 1.005


def test_the_cifar10_suite_evaluates_as_many_samples_as_decided() -> None:
    suite = load_suite("cifar10")
    experiment = suite.experiments()[0]
    assert (experiment.eval.n_generated, suite.ends["n_generated"]) == (2048, 5000)
    assert experiment.eval.metrics[0] == "fid"
    assert len(experiment.eval.points) == 5
    grown = suite.experiments(gpu=True)[0]
    assert grown.train.flops == 50 * experiment.train.flops
    assert grown.eval.n_generated == 50_000
    assert suite.on_gpu().ends["n_generated"] == 50_000


def test_units_are_chosen_by_name_for_several_machines_or_a_short_time(tmp_path: Path) -> None:
    write_dataset(tmp_path / "datasets" / "cifar10", pictures(20, 32), classes=10)  # the suite's own takes a download
    suite = load_suite("cifar10").on_gpu().model_copy(update={"peers": []})  # whose packages are an optional extra
    experiments = suite.experiments(gpu=True, extra={"storage": str(tmp_path)})

    def names(only: str) -> list[str]:
        return [unit.name for unit in units_of(suite, experiments, ["0"] * len(experiments), pattern(only))]

    assert names("dit seed 0") == ["cifar10-dit seed 0", "cifar10-dit seed 0, n = 50,000"]
    assert names("seed 0$") == [f"cifar10-{backbone} seed 0" for backbone in ("unet", "uvit", "rin", "dit", "rin-conv")]
    assert len(names("")) == 2 * len(experiments)
    with pytest.raises(UserError, match="--only"):
        pattern("seed (")


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffscale.core.errors.importlib.util.find_spec", lambda name: None)
    suite = load_suite("icfm-cifar10")
    with pytest.raises(UserError, match="pip install --no-deps torchcfm pot"):
        budget.budget(suite, suite.experiments())
    assert not asked_of(suite, pattern("seed 0")).peers, "runs of our own need no peer's package"


@pytest.mark.slow
def test_an_evaluation_at_the_end_of_a_run_of_another_machine_trains_it_here(tmp_path: Path) -> None:
    """Only records are committed, so a suite that asks for more samples later has no weights to sample from."""
    write_dataset(tmp_path / "datasets" / "cifar10", pictures(40, 32), classes=10)
    suite = load_suite("cifar10").model_copy(update={"peers": [], "ends": {"n_generated": 32}})
    evaluated = {"metrics": ["fd_efficientnet_lite0"], "n_generated": 16, "n_reference": 32, "points": [1.0]}
    extra = {"storage": str(tmp_path), "eval": evaluated, "train": {"flops": 4e10, "cpus_per_worker": 1}}
    experiments = [e for e in suite.experiments(extra=extra) if e.name == "cifar10-unet" and e.train.seed == 0]
    (hash_,) = {prepare(e)[0].content_hash for e in experiments}
    (end,) = units_of(suite, experiments, [hash_], pattern("n = 32"))
    assert end.go()
    assert end.done(read_records([end.run_folder]))


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(UserError, match="cifar10 "):
        load_suite("cifar")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_killed_peer_resumes_to_the_same_weights(name: str, tmp_path: Path) -> None:
    if not is_installed(name):
        pytest.skip(f"needs {name}: {INSTALL[name]}")
    calm, rough = _peer(name, tmp_path / "calm"), _peer(name, tmp_path / "rough")
    values = [r.value for r in peer_run.run(calm)]
    images = peer_run.open_training_data(rough.like)
    short = peer_run.PeerRun(rough.suite, name, rough.width, _with_flops(rough.like, rough.flops / 2))
    file = Path(rough.run_folder(images.content_hash)) / "peer.pt"
    peer_run.torch.manual_seed(0)
    recipe = RECIPES[name](rough.width, images.resolution, rough.flops, peer_run.device_of(rough.like))
    peer_run.train(short, recipe, images, file)
    assert [r.value for r in peer_run.run(rough)] == values
    assert len(read_records([rough.run_folder(images.content_hash)])) == len(values)


def _peer(name: str, storage: Path) -> peer_run.PeerRun:
    suite = load_suite("unet-ablations")
    changes = {
        "storage": str(storage),
        "data": {"resolution": 32, "class_conditional": False},
        "train": {"flops": 3e10},
        "eval": {"n_generated": 4, "n_reference": 8, "n_heldout": 0, "grid_images": 0, "solver": {"steps": 1}},
    }
    width = 8 if name == "denoising-diffusion-pytorch" else 16
    return peer_run.PeerRun("test", name, width, suite.experiments(extra=changes)[0])


def test_torchcfms_loss_and_denoiser_are_those_of_our_recipe() -> None:
    """One batch at fixed times and noise: the same network has the same loss in its authors' code and in ours."""
    matching = pytest.importorskip("torchcfm.conditional_flow_matching")
    torch.manual_seed(0)
    network = peers.torchcfm_network(32, 32).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # its last convolution begins at zero
    images, noise, t = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.rand(4) * 0.9 + 0.05
    _, z, velocity = matching.ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(noise, images, t)
    theirs = (network(t, z) - velocity).square().flatten(1).mean(1)
    recipe = peers.torchcfm_recipe(32, 32, 1.0, torch.device("cpu"))
    ours = training_loss(recipe.diffusion, peers.AtFlowTime(network), images, u=1 - t, noise=noise).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _with_flops(experiment, flops: float):
    return experiment.model_copy(update={"train": experiment.train.model_copy(update={"flops": flops})})


def test_parts_of_a_suite_are_all_of_it_and_share_nothing():
    units = list(range(11))
    parts = [unit for i in (1, 2, 3) for unit in units[share_of(f"{i}/3")]]
    assert sorted(parts) == units
    for wrong in ("0/2", "3/2", "1", "a/b", "1/-2"):
        with pytest.raises(UserError, match="part"):
            share_of(wrong)


def test_results_gain_the_records_of_a_run_once_and_lose_none(tmp_path: Path) -> None:
    kept = committed(RESULTS / "unet-ablations")
    run, out = tmp_path / "run", tmp_path / "results"
    for record in kept[:3]:
        write_record(str(run), record)
    keep_records(str(run), out)
    assert committed(out) == kept[:3]
    write_record(str(run), kept[3])
    keep_records(str(run), out)
    first = (out / "records.jsonl").read_bytes()
    keep_records(str(run), out)
    assert committed(out) == kept[:4]
    assert (out / "records.jsonl").read_bytes() == first
    assert read_records([str(tmp_path)]) == kept[:4]


def test_committed_records_do_not_say_where_their_runs_were(tmp_path: Path) -> None:
    kept = committed(RESULTS / "unet-ablations")[0]
    settings = kept.settings | {"storage": "/home/me/runs", "data.path": "/home/me/runs/datasets/cifar10"}
    write_record(str(tmp_path / "run"), kept.model_copy(update={"settings": settings}))
    keep_records(str(tmp_path / "run"), tmp_path / "results")
    (found,) = committed(tmp_path / "results")
    assert found.settings["data.path"] == "STORAGE/datasets/cifar10"
    assert "/home/me" not in (tmp_path / "results" / "records.jsonl").read_text()


def test_a_suite_adds_to_the_sweep_that_it_names() -> None:
    names = [e.name for e in load_suite("emoji-schedule-x-resolution").experiments()]
    assert names[0] == "emoji-schedule-x-resolution-ddpm-linear-16"
    assert names[-2:] == ["emoji-schedule-x-resolution-simple-cosine-32"] * 2
    assert {e.eval.eval_resolution for e in load_suite("emoji-schedule-x-resolution").experiments()} == {64}
