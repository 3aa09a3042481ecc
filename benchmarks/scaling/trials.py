"""1,000 trials through `diffscale tune`, whose training is a stand-in that writes a record: what a sweep costs.

python -m benchmarks.scaling.trials FOLDER TRIALS      one command of the sweep, as the measurement starts it
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

TRIALS = 1000
CPUS = 2
PATIENCE = 3600.0  # seconds
POLL = 0.5
TINY: dict[str, Any] = {
    "data.resolution": 8,
    "train.images": 64,
    "train.flops": None,
    "train.precision": "fp32",
    "train.compile": False,
    "train.channels_last": False,
    "train.winograd": False,
    "train.trackers": [],
    "eval.n_generated": 16,
    "model": {"name": "unet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []},
}


def measure_trials(trials: int = TRIALS) -> list[dict[str, Any]]:
    """Run the sweep, kill it with SIGKILL when half of the trials have ended, and run it again to the end."""
    with tempfile.TemporaryDirectory() as folder:
        first = _Command(folder, trials)
        rows = first.follow(until=trials // 2)
        os.killpg(first.process.pid, signal.SIGKILL)
        first.process.wait()
        second = _Command(folder, trials)
        before = _ended(folder)
        second.wait(lambda: _ended(folder) > before)
        restart = time.perf_counter() - second.started
        rows += second.follow(until=trials)
        second.wait(lambda: second.process.poll() is not None)
        written = _written(folder)
        whole = {
            "what": "sweep",
            "trials": _ended(folder),
            "restart_s": round(restart, 1),
            "files_per_trial": round(written[0] / trials, 2),
            "bytes_per_trial": round(written[1] / trials),
            "exit_code": second.process.returncode,
        }
    return [*rows, whole]


class _Command:
    """A started command of the sweep."""

    def __init__(self, folder: str, trials: int) -> None:
        self.folder = folder
        self.started = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.scaling.trials", folder, str(trials)]
        with Path(folder, "log").open("a") as log:
            self.process = psutil.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait(self, condition: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(Path(self.folder, "log").read_text()[-2000:])
            time.sleep(POLL)

    def follow(self, until: int) -> list[dict[str, Any]]:
        """Measure the driver after each tenth of the trials that it runs.

        until: number of ended trials at which to stop
        """
        rows, first = [], _ended(self.folder)
        for tenth in range(1, 11):
            goal, begun, since = first + (until - first) * tenth // 10, _ended(self.folder), time.perf_counter()
            cpu = sum(self.process.cpu_times()[:2])
            self.wait(lambda goal=goal: _ended(self.folder) >= goal or self.process.poll() is not None)
            if self.process.poll() is not None:
                break
            ran = max(_ended(self.folder) - begun, 1)
            rows.append(
                {
                    "what": "driver",
                    "trials": _ended(self.folder),
                    "memory_mb": round(self.process.memory_info().rss / 2**20),
                    "driver_cpu_s_per_trial": round((sum(self.process.cpu_times()[:2]) - cpu) / ran, 3),
                    "seconds_per_trial": round((time.perf_counter() - since) / ran, 2),
                }
            )
        return rows


def _ended(folder: str) -> int:
    return len(list(Path(folder).glob("sweeps/*/ended/*.json")))


def _written(folder: str) -> tuple[int, int]:
    """Return the files of the ledger, and their bytes."""
    sizes = [file.stat().st_size for file in Path(folder).glob("sweeps/*/*/*.json")]
    return len(sizes), sum(sizes)


# ---- the command


def stand_in() -> None:
    """Replace training in a process of the sweep: Ray calls it where a worker starts."""
    from diffscale.training import run  # import cost

    run.train = _train


def _train(experiment: Any, **options: Any) -> Any:
    """Write the record of a run that was not trained: its value is the distance of the learning rate from 3e-4."""
    from benchmarks.scaling.records import TEMPLATE  # import cost
    from diffscale.config.factory import open_training_data  # import cost
    from diffscale.core.hashing import identify  # import cost
    from diffscale.records.schema import Record  # import cost
    from diffscale.records.store import read_records_file, write_record  # import cost
    from diffscale.training.own_records import first_metric, own_sampling  # import cost
    from diffscale.training.run import RunResult  # import cost

    content = open_training_data(experiment).content_hash
    run_id, folder = experiment.run_id(content), experiment.run_folder(content)
    columns = {
        "record_id": identify(run=run_id),
        "run_id": run_id,
        "run_name": experiment.name,
        "precision": "fp32",
        "ema": experiment.eval.ema,
        "metric": first_metric(experiment),
        "resize": experiment.eval.resize,
        "train_resolution": experiment.data.resolution,
        "eval_resolution": experiment.data.resolution,
        "n_generated": experiment.eval.n_generated,
        "sampler": own_sampling(experiment, "fp32").canonical(),
        "sample_seed": experiment.eval.seed,
        "settings": experiment.dotted(),
        "images_seen": experiment.train.images,
        "value": abs(experiment.optim.lr - 3e-4),
        "reference_file": None,
    }
    write_record(folder, Record.model_validate(read_records_file(str(TEMPLATE))[0].model_dump() | columns))
    return RunResult(folder, run_id, experiment.train.images, "finished")


def main(folder: str, trials: int) -> None:
    """Run or resume the sweep in this process."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray  # import cost

    from diffscale.sweep.ledger import Ledger  # import cost
    from diffscale.sweep.run import run  # import cost
    from diffscale.sweep.settings import Sweep  # import cost

    hook: Any = {"worker_process_setup_hook": "benchmarks.scaling.trials.stand_in"}
    ray.init(num_cpus=CPUS, include_dashboard=False, log_to_driver=False, runtime_env=hook)
    sweep = Sweep.model_validate(
        {
            "name": "many",
            "base": "quickstart-unet",
            "overrides": TINY | {"storage": folder},
            "space": {"optim.lr": [1e-4 * (1 + i / trials) for i in range(trials)]},
            "max_concurrent": CPUS,
        }
    )
    run(Ledger(sweep))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
