"""Training as a Ray job: a log that reads well, a stop with a checkpoint, and the same submission resumes it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BATCH = 16
SMALL = [
    "data.resolution=16",
    "model.model_channels=16",
    "model.channel_mult=[1,2]",
    "model.num_blocks=1",
    "model.attn_resolutions=[]",
    "model.middle_attention=false",
    "optim.warmup_images=0",
    "eval.n_generated=0",
    f"train.global_batch={BATCH}",
    "train.flops=null",
    "train.precision=fp32",
    f"train.log_every_images={BATCH}",
    "train.compile=false",
    "train.channels_last=false",
    "train.trackers=[]",
    "train.workers=2",
]


def images_seen(storage: Path) -> int:
    lines = [line for file in storage.glob("runs/*/metrics.jsonl") for line in file.read_text().splitlines()]
    return max((json.loads(line)["images_seen"] for line in lines if line.endswith("}")), default=0)


def checkpoints(storage: Path) -> list[str]:
    return sorted(mark.parent.name for mark in storage.glob("runs/*/checkpoints/*/COMPLETE"))


@pytest.mark.slow
@pytest.mark.gate
@pytest.mark.timeout(1200)
def test_a_job_is_stopped_with_a_checkpoint_and_submitting_it_again_finishes_it(local_cluster, tmp_path):
    images = BATCH * 800  # training lasts longer than a stop takes to reach the workers
    command = [
        sys.executable,
        "-m",
        "diffscale.submit",
        "--",
        "train",
        "quickstart-unet",
        f"storage={tmp_path}",
        *SMALL,
    ]
    command += [f"train.images={images}"]
    log = tmp_path / "first.log"
    with open(log, "wb") as file:
        watching = subprocess.Popen(
            command,
            cwd=ROOT,
            env=local_cluster.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 400
        while images_seen(tmp_path) < 10 * BATCH and watching.poll() is None and time.monotonic() < end:
            time.sleep(0.5)
        watching.send_signal(signal.SIGINT)  # as Ctrl-C in the terminal that watches
        code = watching.wait(300)
    finally:
        watching.kill()
    text = log.read_text()
    assert code == 143, text
    assert "stopping the job" in text
    assert "same command" in text
    stopped_at = images_seen(tmp_path)
    assert 0 < stopped_at < images
    assert checkpoints(tmp_path)[-1] == f"images-{stopped_at:09d}", "nothing that was trained is lost"

    again = local_cluster.run(*command, timeout=500)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"finished: {images:,} images" in again.stdout
    assert checkpoints(tmp_path)[-1] == f"images-{images:09d}"
    for line in again.stdout.splitlines():
        assert not re.search(r"[\x00-\x08\x0b-\x1f]", line), f"terminal codes in the log: {line!r}"
    progress = [line for line in again.stdout.splitlines() if "images/s" in line]
    assert 1 <= len(progress) <= 100, "progress, but not a flood of it"
    assert local_cluster.token not in again.stdout
    first = int(re.sub(r"\D", "", re.search(r"([\d,]+) of ", progress[0])[1]))
    assert first >= stopped_at, "it resumed"

    third = local_cluster.run(*command)
    assert third.returncode == 0
    assert "already finished" in third.stdout


@pytest.mark.slow
def test_rays_own_command_submits_the_same_job(local_cluster, tmp_path):
    done = local_cluster.run(
        "ray",
        "job",
        "submit",
        "--working-dir",
        ".",
        "--runtime-env",
        "cluster/runtime_env.yaml",
        "--",
        "python",
        "-m",
        "diffscale.train",
        "quickstart-unet",
        f"storage={tmp_path}",
        "train.images=nonsense",
    )
    assert done.returncode == 1, "Ray's command exits with 1 for every failure"
    assert "train.images" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout
