"""What the votes say, and the record that the report shows next to FID."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffscale.preference.pairs import NOISE, Ask
from diffscale.preference.result import result, write_result
from diffscale.preference.study import Contender, Study
from diffscale.preference.votes import new_row
from diffscale.records.store import read_records, write_record
from tests.report.records import make_record

from .conftest import make_study, pictures

ROOT = Path(__file__).parents[2]


def vote(study: Study, rater: str, *answers: tuple[Ask, int]) -> None:
    start = len(study.book.read().get(rater, []))
    for number, (ask, answer) in enumerate(answers, start):
        study.book.add(rater, new_row(number, ask, answer, 1.0))


def test_preference_is_said_where_the_interval_says_it(study: Study) -> None:
    vote(study, "ann", *[(Ask(1, 0, i), 1) for i in range(12)], *[(Ask(0, 2, i), i % 2 * 2 - 1) for i in range(12)])
    found = result(study)
    assert found.contenders["contender"].iloc[0] == "secret-dit"
    pairs = found.pairs.set_index(["a", "b"])
    assert pairs.loc[("secret-unet", "secret-dit"), "preferred"] == "secret-dit"
    assert pairs.loc[("secret-unet", "secret-rin"), "preferred"] == ""
    assert pairs.loc[("secret-unet", "secret-rin"), "votes"] == 12


def test_careless_raters_are_marked_and_kept(study: Study) -> None:
    checks = [(Ask(0, NOISE, 0, "check"), 1), (Ask(NOISE, 0, 1, "check"), -1)]
    wrong = [(ask, -answer) for ask, answer in checks]
    vote(study, "ann", *checks, (Ask(0, 1, 3), 1), (Ask(1, 0, 3, "repeat"), -1))
    vote(study, "ben", *wrong, (Ask(1, 0, 3), -1), (Ask(0, 1, 3, "repeat"), -1))
    found = result(study)
    raters = found.raters.set_index("rater")
    assert raters["inattentive"].to_dict() == {"ann": False, "ben": True}
    assert raters["consistency"].to_dict() == {"ann": 1.0, "ben": 0.0}
    assert found.agreement == (1.0, 1)
    assert found.contenders["votes"].sum() == 8  # 4 answers, each about two contenders
    assert result(study, ("ben",)).contenders["votes"].sum() == 4


def test_a_run_gets_a_record_that_says_how_many_voted(tmp_path: Path) -> None:
    contenders = []
    for k, model in enumerate(("unet", "dit")):
        record = make_record(model=model)
        folder = str(tmp_path / "runs" / model)
        write_record(folder, record)
        origin = f"{record.run_id}/{record.images_seen}/{record.ema}/sampler"
        contenders.append(Contender(model, pictures(k), (), origin, folder))
    study = Study(contenders, Contender("real images", pictures(9), (), "r"), place=str(tmp_path))
    assert write_result(study, result(study)) == []  # without votes there is nothing to record
    vote(study, "ann", *[(Ask(0, 1, i), 1) for i in range(8)], *[(Ask(2, 0, i), 1) for i in range(8)])
    records = write_result(study, result(study))
    assert sorted(r.run_name.split("-")[0] for r in records) == ["dit", "unet"]
    written = {r.model: r for r in read_records([str(tmp_path / "runs")]) if r.metric == "preference"}
    assert (written["unet"].n_generated, written["unet"].n_reference) == (16, 1)
    assert written["unet"].reference == study.study_id
    assert 0 < written["dit"].value < written["unet"].value < 1
    assert written["unet"].value_low < written["unet"].value < written["unet"].value_high
    vote(study, "ben", (Ask(0, 1, 3), -1))
    assert write_result(study, result(study))[0].record_id not in {r.record_id for r in records}


def test_the_command_prints_the_result_and_refuses_in_one_screen(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "diffscale.compare", *arguments, "--storage", str(tmp_path / "s")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    from PIL import Image

    for k, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for i, pixels in enumerate(pictures(k, 4)):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    done = run(a, b, "--result")
    assert done.returncode == 0, done.stderr
    assert "points against the average" in done.stdout
    for arguments, said in (((a,), "at least two"), ((a, a), "each once"), ((a, b, "--layout", "grid"), "at least 16")):
        refused = run(*arguments, "--result")
        assert refused.returncode == 2
        assert said in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("answer", [1, 0, -1])
def test_the_order_of_sides_is_nothing(tmp_path: Path, answer: int) -> None:
    one, other = make_study(tmp_path / "one"), make_study(tmp_path / "other")
    vote(one, "ann", (Ask(0, 1, 0), answer))
    vote(other, "ann", (Ask(1, 0, 0), -answer))
    assert result(one).strengths.theta == pytest.approx(result(other).strengths.theta)
