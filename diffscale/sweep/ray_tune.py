"""The part of a sweep that Ray Tune does: it places trials, restarts those that die, and ends them on a signal."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Callable
from typing import Any

from diffscale.sweep.ledger import Ledger, Trial
from diffscale.sweep.settings import Sweep
from diffscale.sweep.space import VARIANT, encode, point_id, point_of
from diffscale.sweep.trials import run_trial
from diffscale.training.run import on_signals

RESTARTS = 2  # of a trial whose process or node died


class Stopped(Exception):
    """Raised after SIGTERM or Ctrl-C: every running trial has saved a checkpoint, and the same command resumes."""

    def __init__(self, signals: list[int]) -> None:
        """signals: those that the command received."""
        super().__init__("stopped by a signal")
        self.signals = signals


def run_trials(
    ledger: Ledger, trials: list[Trial], flops: float | None = None, handle_signals: bool = False
) -> dict[str, str]:
    """Run each trial to its end, or to `flops`. Return the failed ones with their reasons.

    handle_signals: SIGTERM and SIGINT end the trials at a checkpoint and raise Stopped (main thread only).
    """
    if not trials:
        return {}
    for trial in trials:
        ledger.note_begun(trial.point)
    _start_ray()
    from ray import tune  # import cost

    space = {"point": tune.grid_search([json.dumps(t.point) for t in trials])}
    return _fit(ledger, space, len(trials), flops, None, handle_signals)


def run_suggested(ledger: Ledger, done: list[Trial], handle_signals: bool = False) -> dict[str, str]:
    """Run the rest of a TPE sweep: Optuna suggests points and knows every finished trial. See `run_trials`."""
    left = ledger.sweep.search.samples - len(done)
    if left <= 0:
        return {}
    _start_ray()
    from optuna import logging as optuna_logging  # import cost
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution  # import cost
    from ray.tune.search import ConcurrencyLimiter  # import cost
    from ray.tune.search.optuna import OptunaSearch  # import cost

    optuna_logging.set_verbosity(optuna_logging.WARNING)  # our own table shows the trials
    distributions: dict[str, BaseDistribution] = {}
    if ledger.sweep.variants:
        distributions[VARIANT] = CategoricalDistribution(list(ledger.sweep.variants))
    for key, d in ledger.sweep.space.items():
        values = d.grid or d.choice
        if values is not None:
            distributions[key] = CategoricalDistribution([json.dumps(v) for v in values])
        else:
            low, high = d.uniform or d.loguniform or (0.0, 1.0)
            distributions[key] = FloatDistribution(low, high, log=d.loguniform is not None)
    measured = ledger.known_values(done)
    known = [(encode(ledger.sweep, t.point), measured[t.id]) for t in done if t.id in measured]
    search = OptunaSearch(
        space=distributions,
        metric="value",
        mode="max" if ledger.higher_is_better else "min",
        seed=ledger.sweep.search.seed + len(done),
        points_to_evaluate=[p for p, _ in known] or None,
        evaluated_rewards=[v for _, v in known] or None,
    )
    limited = ConcurrencyLimiter(search, max_concurrent=ledger.sweep.max_concurrent)
    return _fit(ledger, {}, left, None, limited, handle_signals)


def _start_ray() -> None:
    """Connect before Ray is imported: on import Ray reads whether to require a token and to listen on loopback only."""
    from diffscale.distributed.connect import connect  # import cost

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # our own table shows the trials
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # and our own files hold their history
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # Tune's thread would begin another cluster after `Stopped`
    connect()


def _fit(
    ledger: Ledger, space: dict[str, Any], samples: int, flops: float | None, search: Any, handle_signals: bool
) -> dict[str, str]:
    """Run one `Tuner.fit` and return the failed trials with their reasons.

    A run of one worker trains in its trial's process, which holds that worker's device: starting Ray Train's processes
    would take longer than a small trial. The driver of a run with several workers holds no CPU, because the drivers
    would take all CPUs and their workers would wait forever. It holds a small share of the head node, and
    `max_concurrent` limits the number of drivers.
    """
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # it misses the histories that are off
    from ray import tune  # import cost
    from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig  # import cost

    from diffscale.distributed.messages import STOP, Messages  # import cost
    from diffscale.training.numerics import uses_gpu  # import cost

    running: set[str] = set()

    class Running(Callback):
        """Keep `running` equal to the set of trials whose process is alive."""

        def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            running.add(trial.trial_id)

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            running.discard(trial.trial_id)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            running.discard(trial.trial_id)

    channel, here, common = Messages(uuid.uuid4().hex), ledger.one_worker, ledger.common
    resources = {"node:__internal_head__": 0.001}
    if here:
        resources = {"CPU": common.train.cpus_per_worker, "GPU": int(uses_gpu(common))}
    sweep_json, stop_with = ledger.sweep.model_dump_json(), channel.launch

    def trial(config: dict[str, Any]) -> None:
        run_trial(Sweep.model_validate_json(sweep_json), config, flops, stop_with, here)

    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space=space,
        tune_config=TuneConfig(
            metric="value",
            mode="max" if ledger.higher_is_better else "min",
            num_samples=1 if search is None else samples,
            search_alg=search,
            reuse_actors=True,  # the next trial in the same process: no imports again
            max_concurrent_trials=ledger.sweep.max_concurrent if search is None else None,
        ),
        run_config=RunConfig(
            name="trials",
            storage_path=tempfile.mkdtemp(prefix="diffscale-tune-"),
            failure_config=FailureConfig(max_failures=RESTARTS),
            callbacks=[Running()],
            verbose=0,
        ),
    )
    try:
        results = _until_done(tuner.fit, running, lambda: channel.put(STOP, {})) if handle_signals else tuner.fit()
    finally:
        channel.close()
    failed = {}
    for index in range(len(results)):
        result = results[index]
        reason = (result.metrics or {}).get("failed")
        if result.error is not None:
            reason = str(result.error).strip().splitlines()[-1]
        if reason:
            failed[point_id(point_of(ledger.sweep, result.config or {}))] = reason
    return failed


def _until_done(fit: Callable[[], Any], running: set[str], stop: Callable[[], None]) -> Any:
    """Run `fit` in a thread, where Ray Tune installs no signal handlers, and return its result.

    After a signal, wait until the running trials have stopped at a checkpoint, then raise Stopped.
    """
    done: list[Any] = []
    failed: list[BaseException] = []
    waiting_for: list[set[str]] = []

    def target() -> None:
        try:
            done.append(fit())
        except BaseException as error:
            failed.append(error)

    def on_signal() -> None:
        waiting_for.append(set(running))
        stop()

    thread = threading.Thread(target=target, daemon=True, name="tune")
    with on_signals(on_signal) as received:
        thread.start()
        while thread.is_alive() and not (waiting_for and not waiting_for[0] & running):
            thread.join(0.2)
    if waiting_for:
        raise Stopped(received)
    if failed:
        raise failed[0]
    return done[0]
