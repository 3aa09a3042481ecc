"""People's preference next to the metrics of the same checkpoints."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from diffscale.records.schema import Record
from diffscale.report.analysis import analyse
from diffscale.report.write import write_csvs

from .records import make_record

FIDS = {"unet": 20.0, "uvit": 30.0, "rin": 60.0, "dit": 25.0}


def preference(model: str, share: float, votes: int = 60) -> Record:
    return make_record(
        model=model,
        metric="preference",
        value=share,
        value_low=share - 0.01,
        value_high=share + 0.01,
        n_generated=votes,
        n_reference=2,
        reference="study",
        network="people",
        sampler='{"question": "real"}',
        record_id=f"{model}-{votes}",
    )


def test_orders_are_compared_with_better_first_in_both(tmp_path: Path) -> None:
    shares = {"unet": 0.8, "dit": 0.6, "uvit": 0.45, "rin": 0.1}  # FID's order
    records = [make_record(model=model, value=value) for model, value in FIDS.items()]
    records += [make_record(model=model, value=value / 100, metric="precision") for model, value in FIDS.items()]
    records += [preference(model, share) for model, share in shares.items()]
    records += [preference("rin", 0.9, votes=10)]  # earlier, with fewer votes
    analysis = analyse(records)
    table = analysis.agreement.set_index("metric")
    assert table.loc["fid", "tau"] == pytest.approx(1.0)
    assert table.loc["precision", "tau"] == pytest.approx(-1.0)  # of precision a higher value is better
    assert (table["checkpoints"] == 4).all()
    assert (table["votes"] == 60).all()
    assert table.loc["fid", "tau_low"] <= 1.0
    write_csvs(analysis, tmp_path)
    joined = pd.read_csv(tmp_path / "preference.csv")
    assert dict(zip(joined["run_id"], joined["preference"], strict=False))
    assert sorted(joined.query("metric == 'fid'")["preference"]) == sorted(shares.values())
    (text,) = [f["text"] for f in analysis.findings if f["kind"] == "preference"]
    assert "60 votes of 2 raters" in text
    assert "FID: Kendall's tau 1.00" in text


def test_no_votes_write_no_tables(tmp_path: Path) -> None:
    write_csvs(analyse([make_record()]), tmp_path)
    assert not (tmp_path / "preference.csv").exists()
