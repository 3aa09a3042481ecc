"""`eval.guide`: another run's network guides the samples, and records say which and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_solver
from diffscale.core.errors import UserError
from diffscale.core.keyed_random import Stream, normal
from diffscale.diffusion import Guidance, keyed_noise, sample
from diffscale.records.store import read_records
from diffscale.training.checkpoint_evaluation import CheckpointEvaluator
from diffscale.training.draw_samples import DrawOptions, sampling_of
from diffscale.training.guide import load_guide, with_guide
from diffscale.training.load import list_targets, load_trained, settings_of_run
from diffscale.training.numerics import Numerics
from diffscale.training.own_records import evaluated_points
from diffscale.training.parallel import World
from diffscale.training.run import count
from diffscale.training.settings_check import check_settings
from diffscale.training.trainer import Trainer

from .small import BATCH, experiment

EVAL: dict[str, Any] = {
    "n_generated": 16,
    "n_reference": 32,
    "n_heldout": 0,
    "points": [1.0],
    "grid_images": 0,
    "metrics": ["fd_efficientnet_lite0"],
    "guidance_scale": 2.0,
    "solver": {"name": "ddim", "steps": 3, "clip": "none"},
}


def guided(storage: Path, guide: str, **changes: Any) -> Experiment:
    return with_guide(
        experiment(storage, **{"name": "guided", "train": {"images": BATCH}, "eval": EVAL | {"guide": guide}} | changes)
    )


def trained(e: Experiment) -> str:
    dataset = check_settings(e)
    folder = e.run_folder(dataset.content_hash)
    Trainer(e, folder, World(), count(e, dataset)).run()
    return folder


@pytest.fixture(scope="module")
def guide(shared_storage: Path) -> str:
    """A smaller network without labels, as EDM2 guides with."""
    return trained(
        experiment(
            shared_storage,
            name="guide",
            data={"class_conditional": False},
            model={"channel_mult": [1, 1]},
            train={"images": BATCH},
        )
    )


@pytest.fixture(scope="module")
def run(shared_storage: Path, guide: str) -> str:
    return trained(guided(shared_storage, guide))


def test_records_name_the_guide_and_count_its_passes(shared_storage, run, guide) -> None:
    (record,) = read_records([run])
    (checkpoint,) = list_targets(guide)
    e = guided(shared_storage, guide)
    sampler = json.loads(record.sampler)
    assert (sampler["autoguidance"], sampler["guide"]) == (True, e.eval.guide_weights)
    assert record.settings["eval.guide"] == checkpoint
    assert record.nfe == 6
    cost = load_guide(e, check_settings(e)).forward_macs  # type: ignore[union-attr]
    assert cost < record.forward_macs
    assert record.sampling_flops == 2 * 3 * (record.forward_macs + cost)
    assert evaluated_points(run, e) == {BATCH: record.value}
    assert record.run_id == experiment(shared_storage, train={"images": BATCH}, name="x").run_id(record.dataset_hash)


def test_samples_are_guided_by_the_other_network(shared_storage, run, guide) -> None:
    """The formula, by the networks themselves: x = guide + 2 (model - guide) at every step."""
    (uri,) = list_targets(run)
    e = settings_of_run(uri)
    model = load_trained(uri, e.eval.ema, e)
    sampling = sampling_of(model, DrawOptions(n=4, labels="train"))
    source = CheckpointEvaluator(e, model.dataset, model.diffusion, World(), Numerics()).evaluator.samples(
        model.model, model.diffusion, sampling
    )
    drawn, labels = source.draw(torch.arange(4))
    (other,) = list_targets(guide)
    weaker = load_trained(other, "halflife", settings_of_run(other)).model
    assert weaker.num_classes == 0
    noise = normal(0, Stream.SAMPLE_NOISE, torch.arange(4), source.shape)
    expected = sample(
        build_diffusion(e, model.dataset),
        model.model,
        noise,
        solver=build_solver(e),
        label=labels,
        guidance=Guidance(2.0, model=weaker),
        noise_fn=keyed_noise(0, torch.arange(4), source.shape),
    )
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    alone = settings_of_run(uri, ["eval.guide=null"])
    plain = sampling_of(load_trained(uri, e.eval.ema, alone), DrawOptions(n=4, labels="train"))
    assert plain.canonical() != sampling.canonical()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"eval": EVAL | {"guide": "GUIDE", "guidance_scale": 1.0}}, "eval.guidance_scale"),
    ({"eval": EVAL | {"guide": "/no/such/run"}}, "eval.guide"),
    ({"diffusion": {"prediction": "x0"}}, "diffusion.prediction = x0"),
    ({"data": {"resolution": 16}, "model": {"attn_resolutions": [8]}}, "resolution 16"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_a_guide_that_does_not_fit_is_refused_before_anything_starts(shared_storage, guide, changes, said) -> None:
    changes = json.loads(json.dumps(changes).replace("GUIDE", guide))
    with pytest.raises(UserError) as caught:
        check_settings(guided(shared_storage, guide, **changes))
    assert said in caught.value.text()


def test_a_network_without_labels_takes_no_guide_with_classes(shared_storage, run) -> None:
    with pytest.raises(UserError, match="or of none"):
        check_settings(guided(shared_storage, run, data={"class_conditional": False}))
