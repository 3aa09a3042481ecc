"""Sweeps on a real Ray cluster, from the file to the preset of the best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from diffscale.config.load import load_experiment
from diffscale.core.errors import UserError
from diffscale.sweep.ledger import Ledger, check_comparable
from diffscale.sweep.run import load_sweep, planned, trials_of
from diffscale.sweep.space import grid, point_id
from diffscale.sweep.table import SweepTable

from .small import TINY, ends, tune, write_sweep


def test_a_sweep_over_resolution_needs_a_common_one(tmp_path: Path) -> None:
    ledger = Ledger(load_sweep(str(write_sweep(tmp_path)), ["space.data.resolution=[8,16]"]))
    with pytest.raises(UserError, match="eval_resolution=16"):
        planned(ledger)
    ledger = Ledger(load_sweep(str(write_sweep(tmp_path)), ["space.data.resolution=[8,16]", "eval.eval_resolution=16"]))
    check_comparable(ledger.sweep, planned(ledger))


def test_overrides_reach_the_sweep_or_every_trial(tmp_path: Path) -> None:
    sweep = load_sweep(str(write_sweep(tmp_path)), ["max_concurrent=1", "optim.weight_decay=0.5", "search.seed=4"])
    assert (sweep.max_concurrent, sweep.search.seed) == (1, 4)
    assert all(t.experiments[0].optim.weight_decay == 0.5 for t in planned(Ledger(sweep)))


@pytest.mark.slow
@pytest.mark.gate
def test_halving_ends_with_a_preset_that_train_takes(tmp_path: Path) -> None:
    assert tune(write_sweep(tmp_path)).wait(timeout=280) == 0
    assert sorted(ends(tmp_path).values()) == ["finished", "stopped", "stopped"]
    folder = next(tmp_path.glob("storage/sweeps/tiny-*"))
    best = load_experiment(str(folder / "best.yaml"))
    assert ends(tmp_path)[str(best.optim.lr)] == "finished"
    assert (folder / "importance.csv").exists()


@pytest.mark.slow
def test_asha_stops_a_trial_that_is_worse_than_those_before_it(tmp_path: Path) -> None:
    scheduler = {"name": "asha", "rungs_flops": [2.0e9, 4.0e9], "reduction": 3}
    assert tune(write_sweep(tmp_path, scheduler=scheduler, max_concurrent=1)).wait(timeout=280) == 0
    ledger = Ledger(load_sweep(str(tmp_path / "sweep.yaml"), []))
    trials = planned(ledger)
    values = {t.id: ledger.value(t, 2.0e9) for t in trials}
    continues = {t.id: ledger.decisions.get(0, t.id) for t in trials}
    assert None not in values.values()
    assert None not in continues.values()
    best = min(values, key=lambda name: values[name])
    assert continues[best]  # the best was among the best third of those that had reached the rung, whenever it came
    for trial in trials:
        reached = ledger.records(trial)[-1].train_flops
        assert (ledger.ended(trial.id), reached >= 4.0e9) == (
            ("finished", True) if continues[trial.id] else ("stopped", False)
        )


@pytest.mark.slow
def test_tpe_suggests_the_requested_number_of_trials_within_their_bounds(tmp_path: Path) -> None:
    changes = {
        "space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "diffusion.prediction": {"choice": ["v", "eps"]}},
        "search": {"name": "tpe", "samples": 3},
        "scheduler": {"name": "none"},
        "max_concurrent": 1,
        "budget": {"trial": {"flops": 2.0e9}},
    }
    sweep = write_sweep(tmp_path, **changes)
    assert tune(sweep).wait(timeout=280) == 0
    ledger = Ledger(load_sweep(str(sweep), []))
    trials = planned(ledger)
    assert len(trials) == 3
    assert all(1e-4 <= t.point["optim.lr"] <= 1e-2 and ledger.ended(t.id) == "finished" for t in trials)
    assert load_experiment(f"{ledger.folder}/best.yaml").optim.lr in [t.point["optim.lr"] for t in trials]
    assert tune(sweep).wait(timeout=60) == 0  # nothing is left to suggest
    assert len(planned(ledger)) == 3


def test_the_progress_of_a_tpe_sweep_counts_the_trials_that_it_will_suggest(tmp_path: Path) -> None:
    """It said "0 of 0 trials" from the beginning to the end, and no trial had a line."""
    search = {"name": "tpe", "samples": 3}
    ledger = Ledger(load_sweep(str(write_sweep(tmp_path, search=search, scheduler={"name": "none"})), []))
    with SweepTable(ledger, []) as table:
        assert table.work is not None
        assert "0 of 3 trials" in table.work.line()
        for point in grid(ledger.sweep)[:2]:
            ledger.note_begun(point)
            ledger.note_ended(point_id(point), "finished")
    assert "2 of 3 trials" in table.work.line()


def test_a_trial_that_diverged_counts_as_the_worst_value(tmp_path: Path) -> None:
    ledger = Ledger(load_sweep(str(write_sweep(tmp_path)), []))
    first, second, third = trials_of(ledger)
    ledger.note_ended(first.id, "diverged")
    ledger.note_ended(second.id, "refused")
    values = [ledger.value(trial) for trial in (first, second)]
    assert all(value is not None and math.isnan(value) for value in values)
    assert ledger.value(third) is None
    assert ledger.best([first, second, third]) is None


def test_a_sweep_without_a_value_to_compare_is_refused(tmp_path: Path) -> None:
    for override in ("eval.metrics=[]", "eval.n_generated=0"):
        with pytest.raises(UserError, match=override.partition("=")[0]):
            Ledger(load_sweep(str(write_sweep(tmp_path)), [override]))


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_trial_that_diverges(tmp_path: Path) -> None:
    diverging = {"optim.name": "sgd", "optim.clip_grad_norm": None, "train.nonfinite_limit": 3}
    sweep = write_sweep(tmp_path, space={"optim.lr": [1e30, 1e-3]}, overrides=TINY | diverging)
    again = [f"storage={tmp_path / 'storage'}"]
    assert tune(sweep, *again).wait(timeout=280) == 0
    assert set(ends(tmp_path).values()) == {"diverged", "finished"}
    folder = next(tmp_path.glob("storage/sweeps/tiny-*"))
    assert load_experiment(str(folder / "best.yaml")).optim.lr == 1e-3
    assert tune(sweep, *again).wait(timeout=100) == 0  # and does not try it again
