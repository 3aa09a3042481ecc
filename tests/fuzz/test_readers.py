"""Damaged files never crash a reader: what it cannot use it refuses with a UserError."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from diffscale.config import load as cli
from diffscale.records import store as records

from .mutate import damaged_bytes, damaged_tree, fuzz

RECORD = {
    "schema_version": 1,
    "record_id": "0123456789abcdef",
    "run_id": "fedcba9876543210",
    "run_name": "run",
    "created": "2026-11-24T00:00:00Z",
    "model": "unet",
    "parameters": 1000,
    "schedule": "simple_cosine",
    "interpolant": "vp",
    "prediction": "v",
    "weighting": "min_snr",
    "input_scale": 1.0,
    "dataset": "emoji",
    "dataset_hash": "aa",
    "dataset_lossy": False,
    "train_resolution": 32,
    "seed": 0,
    "global_batch": 64,
    "precision": "bf16",
    "images_seen": 6400,
    "epochs": 3.2,
    "endpoint": "constant",
    "ema": "halflife",
    "forward_macs": 1e6,
    "flops_per_image": 6e6,
    "train_flops": 3.84e10,
    "device_seconds": 12.5,
    "device": "cpu",
    "devices": 2,
    "metric": "fd_efficientnet_lite0",
    "value": 12.0,
    "value_low": 11.0,
    "value_high": 13.0,
    "network": "efficientnet_lite0",
    "resize": "default",
    "eval_resolution": 32,
    "reference": "bb",
    "n_generated": 512,
    "n_reference": 1871,
    "solver": "dpmpp_2m",
    "nfe": 12,
    "sampler": "{}",
    "sample_seed": 0,
    "sampling_flops": 1.2e7,
    "evaluated_on": "training workers",
    "commit": "cc",
    "dirty": False,
    "versions": {"torch": "2.15.0"},
    "settings": {"train.seed": 0},
}


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path


def test_the_unharmed_record_is_read(place):
    (place / "a.json").write_text(json.dumps(RECORD))
    assert records.read_record(str(place / "a.json")).value == 12.0


def read_record(place: Path, data: bytes) -> None:
    (place / "a.json").write_bytes(data)
    records.read_record(str(place / "a.json"))


def test_records_with_damaged_bytes(place):
    fuzz(damaged_bytes(json.dumps(RECORD).encode()), lambda data: read_record(place, data))


def test_records_with_wrong_values(place):
    fuzz(damaged_tree(RECORD), lambda tree: read_record(place, json.dumps(tree).encode()))


def settings_text() -> str:
    experiment = cli.load_experiment("quickstart-unet", ["storage=/tmp/x"])
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)


def read_settings(place: Path, data: bytes) -> None:
    (place / "a.yaml").write_bytes(data)
    cli.load_experiment(str(place / "a.yaml"))


def test_settings_with_damaged_bytes(place):
    fuzz(damaged_bytes(settings_text().encode()), lambda data: read_settings(place, data))


def test_settings_with_wrong_values(place):
    def read(tree: object) -> None:
        read_settings(place, yaml.safe_dump(tree, allow_unicode=True).encode(errors="surrogatepass"))

    fuzz(damaged_tree(yaml.safe_load(settings_text())), read)


def test_overrides_on_the_command_line():
    from hypothesis import strategies as st

    keys = st.sampled_from(
        ["train.seed", "model", "model.name", "data", "eval.points", "x", "storage", "optim.betas", "train"]
    )
    values = st.text(max_size=30) | st.sampled_from(
        ["[1,", "{a: 1", "${x}", "${oc.env:HOME}", "null", "1e999", "&a *a"]
    )
    item = st.builds("{}={}".format, keys, values) | st.text(max_size=20)
    fuzz(st.lists(item, max_size=3), lambda items: cli.load_experiment("quickstart-unet", ["storage=/tmp/x", *items]))


def test_reference_statistics(place):
    from diffscale.evaluation.metrics.statistics import load_moments

    valid = io.BytesIO()
    np.savez(valid, mu=np.zeros(3), sigma=np.eye(3), n=np.int64(10))

    def read(data: bytes) -> None:
        (place / "ref.npz").write_bytes(data)
        load_moments(place / "ref.npz")

    fuzz(damaged_bytes(valid.getvalue()), read)


def test_safetensors(place):
    import torch
    from safetensors.torch import save

    from diffscale.evaluation.networks.weights import read_safetensors

    def read(data: bytes) -> None:
        (place / "w.safetensors").write_bytes(data)
        read_safetensors(place / "w.safetensors")

    fuzz(damaged_bytes(save({"weight": torch.zeros(4, 4), "bias": torch.zeros(4)})), read)
