"""The rating page in Debian's chromium: keys and clicks, two raters, a crash, a phone, and a page without a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffscale.core.errors import UserError
from diffscale.preference.export import export_page, import_votes
from diffscale.preference.study import Study
from tests.support.chromium_page import CHROMIUM, Page

from .conftest import make_study

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders of 20 images each."""
    root = tmp_path_factory.mktemp("images")
    for k, name in enumerate(("secret-a", "secret-b")):
        (root / name).mkdir()
        for i in range(20):
            pixels = np.random.default_rng([k, i]).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return [root / "secret-a", root / "secret-b"]


@contextmanager
def serving(folders: list[Path], storage: Path, end: signal.Signals = signal.SIGTERM) -> Iterator[str]:
    """Run the command and yield the raters' link."""
    command = [sys.executable, "-m", "diffscale.compare", *map(str, folders), "--storage", str(storage), "--goal", "20"]
    environment = os.environ | {"DIFFSCALE_CACHE": str(storage / "cache"), "COLUMNS": "200"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        link = next(line.split()[-1] for line in process.stdout if "rate at" in line)
        yield link
    finally:
        process.send_signal(end)
        process.wait(60)
        process.stdout.close()


def begin(page: Page, link: str, rater: str) -> None:
    page.send("Page.navigate", url=link)
    page.wait("document.readyState === 'complete' && document.getElementById('name')")
    page.evaluate(f"document.getElementById('name').value = {json.dumps(rater)}; document.forms[0].requestSubmit()")
    page.wait("document.body.dataset.number !== undefined && document.body.dataset.number !== ''")


def press(page: Page, key: str, number: int) -> None:
    page.send("Input.dispatchKeyEvent", type="keyDown", key=key)
    page.send("Input.dispatchKeyEvent", type="keyUp", key=key)
    page.wait(f"document.body.dataset.number === '{number}'")


def votes(storage: Path) -> dict[str, list[int]]:
    (folder,) = (storage / "preference").iterdir()
    lines = [json.loads(line) for file in (folder / "votes").iterdir() for line in file.read_text().splitlines()]
    rater, found = "", {}
    for line in lines:
        rater = line.get("rater", rater)
        found.setdefault(rater, []).extend([line["vote"]["answer"]] if "vote" in line else [])
    return found


def test_two_raters_vote_by_keys_and_clicks_and_go_on_after_a_crash(folders: list[Path], tmp_path: Path) -> None:
    with Page() as page:
        with serving(folders, tmp_path, signal.SIGKILL) as link:
            begin(page, link, "ann")
            assert "token" not in page.evaluate("location.href")
            press(page, "ArrowLeft", 1)
            press(page, "ArrowRight", 2)
            press(page, "ArrowDown", 3)
            press(page, "Backspace", 2)
            page.evaluate("document.getElementById('left').click()")
            page.wait("document.body.dataset.number === '3'")
            assert "3 of 20, 17 left" in page.evaluate("document.getElementById('progress').textContent")
            begin(page, link, "<img src=x onerror=alert(1)>")
            press(page, " ", 1)
        assert votes(tmp_path) == {"ann": [1, -1, 0, 1], "<img src=x onerror=alert(1)>": [0]}
        with serving(folders, tmp_path) as link:
            begin(page, link, "ann")
            assert page.evaluate("document.body.dataset.number") == "3"
        assert not page.messages
        assert not [url for url in page.requests if "secret" in url]


def test_a_phone_shows_both_pictures_enlarged_and_whole(folders: list[Path], tmp_path: Path) -> None:
    with serving(folders, tmp_path) as link, Page() as page:
        page.resize(360, 640, phone=True)
        begin(page, link, "ann")
        boxes = page.evaluate(
            "[...document.querySelectorAll('#pair img')].map((i) => i.getBoundingClientRect().toJSON())"
        )
        assert all(box["width"] >= 140 and box["left"] >= 0 and box["right"] <= 360 for box in boxes)
        assert all(box["bottom"] <= 640 for box in boxes)
        assert page.evaluate("getComputedStyle(document.querySelector('#pair img')).imageRendering") == "pixelated"
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_page_without_a_server_gives_votes_back(tmp_path: Path) -> None:
    study = make_study(tmp_path / "storage")
    file = tmp_path / "pairs.html"
    file.write_text(export_page(study, 12, seed=3), encoding="utf-8")
    assert not [name for name in study.names if name in file.read_text()]
    with Page() as page:
        page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        begin(page, file.as_uri(), "ann")
        for number in range(1, 13):
            press(page, "ArrowLeft", number)
        assert "save your votes" in page.evaluate("document.getElementById('question').textContent")
        page.evaluate("document.getElementById('save').click()")
        saved = tmp_path / f"votes-{study.study_id}.json"
        page.wait("true")
        for _ in range(100):
            if saved.exists() and saved.stat().st_size:
                break
            page.evaluate("new Promise((resolve) => setTimeout(resolve, 50))")
        assert not page.messages
    assert import_votes(study, saved) == ("ann", 12)
    assert [row.answer for row in study.book.read()["ann"]] == [1] * 12
    with pytest.raises(UserError, match="are there"):
        import_votes(study, saved)
    _refused(study, saved)


def _refused(study: Study, saved: Path) -> None:
    good = json.loads(saved.read_text()) | {"rater": "ben"}
    for change, match in (
        ({"study": "0" * 16}, "of study"),
        ({"count": 13}, "altered"),
        ({"votes": good["votes"][1:]}, "missing"),
        ({"votes": [good["votes"][0] | {"answer": 7}]}, "answer"),
        ({"extra": 1}, "extra"),
    ):
        saved.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=match):
            import_votes(study, saved)
    saved.write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="saved"):
        import_votes(study, saved)
    assert "ben" not in study.book.read()
