"""A sweep compares values of one group: those of its trials' own evaluation settings; a diverged trial is the worst."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from diffscale.config.experiment import Experiment
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.records.store import write_record
from diffscale.sweep.ledger import Ledger, Trial
from diffscale.sweep.results import write_results
from diffscale.sweep.run import load_sweep, planned
from diffscale.sweep.settings import Budget
from diffscale.sweep.table import print_summary
from tests.support.run_records import own_record

from .small import write_sweep

NONE = {"scheduler": {"name": "none"}, "budget": {"trial": {"images": 96}}}
LATER: dict[str, dict[str, Any]] = {
    "another number of samples": {"n_generated": 300},
    "another sampler": {"sampler": '{"solver":{"name":"heun","steps":4}}'},
    "another average": {"ema": "none"},
    "another seed of the samples": {"sample_seed": 1},
    "another reference": {"reference": "other", "reference_file": "published.npz"},
    "another resolution": {"eval_resolution": 64},
    "another resize": {"resize": "clean"},
}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(load_sweep(str(write_sweep(tmp_path, **NONE)), []))


def record(trial: Trial, value: float, **changes: object) -> None:
    (folder,) = trial.folders
    write_record(folder, own_record(trial.experiments[0], value, **changes))


@pytest.mark.parametrize("later", LATER.values(), ids=LATER.keys())
def test_a_later_evaluation_of_a_trial_does_not_change_the_best(ledger: Ledger, later: dict[str, Any]) -> None:
    first, second, third = planned(ledger)
    for trial, value in ((first, 12.0), (second, 10.0), (third, 11.0)):
        record(trial, value)
    record(first, 1.0, **later)
    assert [ledger.value(trial) for trial in (first, second, third)] == [12.0, 10.0, 11.0]
    assert ledger.best([first, second, third]) is second
    assert [r.value for r in ledger.records(first)] == [12.0]


def test_what_a_larger_budget_adds_to_a_run_is_not_the_trials(ledger: Ledger) -> None:
    """Trials of 96 images. A command with a larger budget has continued the run of the first one."""
    first, second, _ = planned(ledger)
    for trial, value in ((first, 12.0), (second, 10.0)):
        record(trial, value, images_seen=96, train_flops=96e6)
    record(first, 5.0, images_seen=960, train_flops=960e6)
    assert [ledger.value(first), ledger.value(second)] == [12.0, 10.0]
    assert ledger.best([first, second]) is second
    assert ledger.spent([first, second])["images"] == 2 * 96


def test_a_diverged_trial_is_the_worst_and_breaks_nothing(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trials = first, second, third = planned(ledger)
    for trial, value in ((first, math.nan), (second, 10.0), (third, 11.0)):
        record(trial, value)
    best = ledger.best(trials)
    assert best is second
    write_results(ledger, trials, best)
    table = pd.read_csv(f"{ledger.folder}/trials.csv", dtype=str, keep_default_na=False)
    assert list(table[ledger.metric]) == ["nan", "10.0", "11.0"]
    print_summary(ledger, trials, best, {})
    rows = [line for line in capsys.readouterr().out.splitlines() if "lr=" in line and "best:" not in line]
    assert len(rows) == 3
    assert "nan" in rows[-1]
    assert ledger.known_values(trials) == {first.id: 11.0, second.id: 10.0, third.id: 11.0}


def test_a_sweep_that_diverged_everywhere_has_no_best(ledger: Ledger) -> None:
    trials = planned(ledger)
    for trial in trials:
        record(trial, math.nan)
    assert ledger.best(trials) is None
    assert ledger.known_values(trials) == {}
    write_results(ledger, trials, None)


def test_a_mean_over_replicates_is_nan_if_one_diverged(tmp_path: Path) -> None:
    ledger = Ledger(load_sweep(str(write_sweep(tmp_path, **NONE, replicates=2)), []))
    trial = planned(ledger)[0]
    for folder, experiment, value in zip(trial.folders, trial.experiments, (5.0, math.nan), strict=True):
        write_record(folder, own_record(experiment, value))
    assert math.isnan(ledger.value(trial) or 0.0)
    assert ledger.best([trial]) is None


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["eval.metrics=[inception_score]"], "is"),
        (["eval.resize=clean"], "fd_efficientnet_lite0_clean"),
        (["eval.metrics=[f_score]", "eval.resize=tf1"], "f_score_tf1"),
    ],
)
def test_the_metric_has_the_name_under_which_it_is_recorded(tmp_path: Path, settings: list[str], name: str) -> None:
    """Else no record of such a sweep would be found."""
    ledger = Ledger(load_sweep(str(write_sweep(tmp_path, **NONE)), settings))
    trial = planned(ledger)[0]
    record(trial, 3.0)
    assert ledger.metric == name
    assert ledger.value(trial) == 3.0


def test_a_restart_checks_and_reads_little_of_what_earlier_launches_did(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network of each of 1,000 trials was built again, and each trial that began read the records of all others."""
    trials = first, *_ = planned(ledger)
    for trial in trials:
        ledger.note_begun(trial.point)
        record(trial, 1.0)
    ledger.note_ended(first.id, "finished")
    assert ledger.begun_ids() == {trial.id for trial in trials}
    assert ledger.ended_ids() == {first.id}
    checked: list[Experiment] = []
    monkeypatch.setattr("diffscale.sweep.run.check_settings", checked.append)
    assert [trial.id for trial in planned(ledger)] == [trial.id for trial in trials]
    assert checked == [ledger.common]
    read: list[str] = []
    original = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: read.append(uri) or original(uri))
    assert ledger.over_budget() is None
    assert read == []
    assert [ledger.ended(first.id) for _ in range(3)] == ["finished"] * 3
    assert len(read) == 1


def test_a_total_budget_counts_every_trial(ledger: Ledger) -> None:
    limits = ledger.sweep.budget.model_copy(update={"total": Budget(images=40)})
    limited = Ledger(ledger.sweep.model_copy(update={"budget": limits}))
    first, second, _ = planned(limited)
    for trial in (first, second):
        limited.note_begun(trial.point)
        assert limited.over_budget() is None
        record(trial, 1.0, images_seen=20)
    assert limited.over_budget() == "budget.total.images = 40 is used up (40)"


@pytest.mark.parametrize(
    ("varied", "setting"),
    [
        ("space.eval.n_generated=[16,32]", r"eval\.n_generated"),
        ("space.eval.n_reference=[16,32]", r"eval\.n_reference"),
        ("space.eval.solver.steps=[2,4]", r"eval\.solver"),
        ("space.eval.guidance_scale=[1.0,2.0]", r"eval\.guidance_scale"),
        ("space.eval.resize=[default,clean]", r"eval\.resize"),
    ],
)
def test_a_sweep_whose_trials_are_of_several_groups_is_refused(tmp_path: Path, varied: str, setting: str) -> None:
    ledger = Ledger(load_sweep(str(write_sweep(tmp_path, **NONE)), [varied]))
    with pytest.raises(UserError, match=setting):
        planned(ledger)


def test_a_sweep_with_an_average_that_no_trial_tracks_is_refused_before_it_starts(tmp_path: Path) -> None:
    ledger = Ledger(load_sweep(str(write_sweep(tmp_path, **NONE)), ["eval.ema=std0.05"]))
    with pytest.raises(UserError, match=r"eval\.ema"):
        planned(ledger)


def test_a_sweep_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.metrics = \[\]"):
        Ledger(load_sweep(str(write_sweep(tmp_path, **NONE)), ["eval.metrics=[]"]))
