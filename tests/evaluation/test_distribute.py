"""Sample i comes from seed i: whatever the batch's neighbours, the number of samples, the ranks or the actors."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from diffscale.config.experiment import EvalSettings
from diffscale.core.errors import UserError
from diffscale.diffusion import SOLVERS, Guidance
from diffscale.evaluation.distribute import Featuriser, Stopped, chunk_ranges, run_local, run_on_ranks, run_on_ray
from diffscale.evaluation.image_sources import DatasetSource
from diffscale.evaluation.sampling import ModelSource, draw_labels, sampling_of_settings, to_uint8

from .conftest import write_dataset

COUNTS = (10, 20, 30)


@pytest.fixture
def source(network, diffusion, sampling) -> ModelSource:
    return ModelSource(network, diffusion, sampling, (3, 16, 16), 130, COUNTS)


def test_a_sample_does_not_depend_on_how_many_are_drawn_or_from_where(source):
    images, labels = source.images(0, 20)
    again, labels_again = source.images(8, 19)
    assert images.shape == (20, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert torch.equal(images[8:19], again)
    assert torch.equal(labels[8:19], labels_again)
    assert images.float().std() > 10


def test_another_batch_size_changes_rounding_alone(source):
    images, _ = source.draw(torch.arange(16))
    for size in (1, 5):
        parts = torch.cat([source.draw(torch.arange(16)[i : i + size])[0] for i in range(0, 16, size)])
        torch.testing.assert_close(parts, images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m_sde", "heun"])
def test_stochastic_solvers_are_keyed_by_the_sample_too(source, solver):
    s = replace(source, sampling=replace(source.sampling, solver=SOLVERS[solver](steps=3), solver_name=solver))
    together, _ = s.draw(torch.arange(6))
    alone, _ = s.draw(torch.tensor([4]))
    torch.testing.assert_close(alone[0], together[4], rtol=1e-4, atol=1e-4)
    other, _ = replace(s, sampling=replace(s.sampling, seed=1)).draw(torch.tensor([4]))
    assert (other - alone).abs().mean() > 0.05


def test_the_model_is_left_in_the_mode_it_was_in(source):
    source.model.train()
    source.images(0, 2)
    assert source.model.training


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("train", [1 / 6, 1 / 3, 1 / 2]), ("uniform", [1 / 3] * 3), ("balanced", [1 / 3] * 3), ("2", [0, 0, 1])],
)
def test_label_policies(policy, expected):
    positions = torch.arange(3000)
    labels = draw_labels(policy, 0, positions, COUNTS)
    shares = torch.bincount(labels, minlength=3).double() / 3000
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.03)
    assert torch.equal(labels[100:110], draw_labels(policy, 0, positions[100:110], COUNTS))


def test_the_label_policy_none_is_the_models_null_and_others_are_refused():
    assert draw_labels("none", 0, torch.arange(4), COUNTS).tolist() == [3] * 4
    with pytest.raises(UserError, match="labels"):
        draw_labels("3", 0, torch.arange(4), COUNTS)


def test_guidance_is_in_the_cost_and_the_identity(source, diffusion):
    plain, guided = source.sampling, replace(source.sampling, guidance=Guidance(2.0))
    assert guided.fields(diffusion)["nfe"] == 2 * plain.fields(diffusion)["nfe"]
    assert guided.canonical() != plain.canonical()
    assert replace(plain, batch=64).canonical() == plain.canonical()


def test_without_labels_the_model_does_not_guide_itself(source, diffusion):
    guided = replace(source.sampling, guidance=Guidance(2.0), labels="none")
    assert guided.fields(diffusion)["nfe"] == source.sampling.fields(diffusion)["nfe"]
    plain = replace(source, sampling=replace(source.sampling, labels="none"))
    assert torch.equal(replace(source, sampling=guided).draw(torch.arange(4))[0], plain.draw(torch.arange(4))[0])


def test_a_record_says_which_state_guided_passes_start_from_where_there_is_one():
    solver = SOLVERS["ddim"](steps=2)

    def canonical(carries_state: bool, **settings) -> dict:
        settings = {"guidance_scale": 2.0, "solver": {"name": "ddim"}} | settings
        sampling = sampling_of_settings(EvalSettings(**settings), solver, 8, carries_state=carries_state)
        return json.loads(sampling.canonical())

    assert canonical(True)["guidance_state"] == "shared"
    assert canonical(True, guidance_state="own")["guidance_state"] == "own"
    assert "guidance_state" not in canonical(False)  # as in the records of other backbones
    assert "guidance_state" not in canonical(True, guidance_scale=1.0)


def test_rounding_to_pixels():
    x = torch.tensor([-1.2, -1.0, 0.0, 1.0, 1.01, 2 * 7 / 255 - 1])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 7]


def test_chunks_are_whole_batches_and_only_the_missing_ones():
    assert chunk_ranges(200, 24) == [(0, 72), (72, 144), (144, 200)]
    assert chunk_ranges(200, 24, {72: 144, 144: 150}) == [(0, 72), (144, 200)]
    assert chunk_ranges(0, 8) == []


def test_ranks_share_the_chunks_in_order(tmp_path):
    source = DatasetSource(write_dataset(tmp_path, 200, 8), np.arange(200))
    featurise, ranges = Featuriser([]), chunk_ranges(200, 8)
    alone = dict(run_local(source, featurise, ranges, keep_below=200))
    slots: list[list] = []
    for rank in range(3):  # each rank's own objects, round by round
        slots.append([])
        list(run_on_ranks(source, featurise, ranges, rank, 3, lambda mine, r=rank: slots[r].append(mine) or [], 200))
    rounds = iter(zip(*slots, strict=True))
    merged = dict(run_on_ranks(source, featurise, ranges, 0, 3, lambda mine: list(next(rounds)), 200))
    assert list(merged) == list(alone)
    assert all(np.array_equal(merged[k]["images"], alone[k]["images"]) for k in alone)


def test_features_go_to_rank_0_alone(tmp_path):
    """They went to all: half a gigabyte onto each of 1,024 ranks in every round."""
    source, ranges = DatasetSource(write_dataset(tmp_path, 200, 8), np.arange(200)), chunk_ranges(200, 8)
    sent: list[Any] = []
    flags: list[Any] = []

    def to_first(mine: Any) -> list[Any]:
        sent.append(mine)
        return []

    given = run_on_ranks(
        source, Featuriser([]), ranges, 1, 2, lambda flag: flags.append(flag) or [flag], to_first=to_first
    )
    assert list(given) == []
    assert [first for done in sent for first, _ in done] == [64, 192]
    assert flags == [False, False]


def test_a_stop_request_on_one_rank_stops_all_after_the_same_chunks(tmp_path):
    source, ranges = DatasetSource(write_dataset(tmp_path, 200, 8), np.arange(200)), chunk_ranges(200, 8)
    slots: list[Any] = [None, None]
    barrier = threading.Barrier(2)

    def chunks_of(rank: int) -> list[int]:
        def gather(mine: Any) -> list[Any]:
            slots[rank] = mine
            barrier.wait()
            everyone = list(slots)
            barrier.wait()
            return everyone

        chunks = run_on_ranks(source, Featuriser([]), ranges, rank, 2, gather, stop_requested=lambda: rank == 1)
        given = [next(chunks)[0], next(chunks)[0]] if rank == 0 else []
        with pytest.raises(Stopped):
            next(chunks)
        return given

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(chunks_of, range(2))) == [[0, 64], []]


@pytest.mark.slow
@pytest.mark.gate
def test_samples_are_identical_to_the_bit_on_one_and_two_actors_and_after_one_was_killed(ray_cluster, source):
    def run(workers: int, kill: bool = False) -> np.ndarray:
        parts = {}
        chunks = run_on_ray(source, [], chunk_ranges(130, 8), workers=workers, keep_below=130)
        for first, columns in chunks:
            if kill:
                _kill_one_actor()
                kill = False
            parts[first] = columns["images"]
        return np.concatenate([parts[first] for first in sorted(parts)])

    here = np.concatenate([c["images"] for _, c in run_local(source, Featuriser([]), chunk_ranges(130, 8), 130)])
    assert np.array_equal(run(1), here)
    assert np.array_equal(run(2), here)
    assert np.array_equal(run(2, kill=True), here)


def _kill_one_actor() -> None:
    """SIGKILL to a process that Ray named for the actor's class."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        below = psutil.Process().children(recursive=True)
        for process in below:
            with contextlib.suppress(psutil.Error):
                if any(part.startswith("ray::_Actor") for part in process.cmdline()):
                    process.kill()
                    return
        time.sleep(0.2)
    raise AssertionError("no actor process was found")
