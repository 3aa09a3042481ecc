"""Long work says how far it is: bars on a terminal, lines in a log."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from diffscale.core.progress import Bars, Lines, Work, clock, shown_by, working
from tests.support.commands import run_command


def write_pngs(folder: Path, n: int) -> Path:
    folder.mkdir()
    for i in range(n):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


def test_a_line_has_what_is_done_the_rate_and_the_time_left():
    work = Work("samples", 5_000, started=time.monotonic() - 100)
    work.advance(1_000)
    assert work.line() == "samples: 1,000 of 5,000 images  10 images/s  6:40 min left"
    assert work.summary() == "samples: 1,000 of 5,000 images in 1:40 min (10 images/s)"


def test_what_an_earlier_process_did_is_no_part_of_the_rate():
    work = Work("samples", 5_000, done=4_000, started=time.monotonic() - 100)
    work.advance(500)
    assert work.line() == "samples: 4,500 of 5,000 images  5.0 images/s  1:40 min left"


def test_work_that_is_all_done_and_has_not_ended_promises_no_end():
    """A run that has trained to its end still evaluates and saves."""
    work = Work("run", 100, started=time.monotonic() - 50)
    work.advance(100)
    assert work.line() == "run: 100 of 100 images  2.0 images/s  50 s so far"


def test_downloads_are_in_megabytes_and_work_without_a_count_says_how_long_it_takes():
    download = Work("weights", 100_000_000, "bytes", started=time.monotonic() - 10)
    download.advance(20_000_000)
    assert download.line() == "weights: 20.0 of 100.0 MB  2.0 MB/s  40 s left"
    assert Work("reading", unit="", started=time.monotonic() - 75).line() == "reading  1:15 min so far"


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (185, "3:05 min"), (7390, "2:03:10 h")])
def test_durations(seconds, text):
    assert clock(seconds) == text


def test_lines_come_in_time_and_the_last_one_has_the_whole(capsys):
    lines = Lines(seconds=0)
    with shown_by(lines), working("outer", 2, "runs") as outer:
        with working("inner", 10) as inner:
            inner.advance(4)
            time.sleep(1.2)
            inner.advance(6)
        outer.advance(2)
    printed = capsys.readouterr().err.splitlines()
    assert any(line.startswith("inner: 4 of 10 images") for line in printed)
    assert not any(line.startswith("outer: 0 of 2") for line in printed), "the inner work speaks for both"
    assert any(line.startswith("inner: 10 of 10 images in ") for line in printed)
    assert printed[-1].startswith("outer: 2 of 2 runs in ")


def test_failed_work_has_no_last_line(capsys):
    def fail() -> None:
        with shown_by(Lines()), working("samples", 10) as work:
            work.advance(5)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_nested_bars_which_vanish():
    screen = io.StringIO()
    with shown_by(Bars(Console(file=screen, force_terminal=True, width=120))):
        with working("outer", 2, "runs"), working("inner", 10) as inner:
            inner.advance(5)
            time.sleep(0.6)
        assert "outer: 0 of 2 runs" in screen.getvalue()
        assert "inner: 5 of 10 images" in screen.getvalue()
    assert "images" not in screen.getvalue().rpartition("\x1b[2K")[2], "the last line is erased"


def test_data_build_and_verify_say_how_many_images_are_done(tmp_path):
    source, dataset = write_pngs(tmp_path / "images", 12), str(tmp_path / "dataset")
    built = run_command("data", "build", str(source), dataset, "--resolution", "8", "--workers", "0")
    assert built.code == 0, built.err
    assert "preparing: 12 of 12 images in " in built.err
    assert "writing: 1 of 1 shards in " in built.err
    assert "12 of 12 images" in run_command("data", "verify", dataset).err
    assert "preparing" not in run_command("data", "build", str(source), dataset, "--resolution", "8").err


def test_a_command_on_a_terminal_shows_bars(tmp_path):
    source = write_pngs(tmp_path / "images", 12)
    command = [sys.executable, "-m", "diffscale.data", "build", str(source), str(tmp_path / "out"), "--resolution", "8"]
    ours, theirs = pty.openpty()
    with subprocess.Popen([*command, "--workers", "0"], stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the command has closed the terminal
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    assert b"\xe2\x94\x81" in shown, "a bar"
    assert b"preparing: 12 of 12 images in" not in shown, "no lines between the bars"
