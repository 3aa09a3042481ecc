"""The table of presets that a command writes into diffscale/models/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from diffscale import models
from diffscale.core.text import with_generated
from diffscale.models.__main__ import table
from diffscale.models.cost import count_cost
from tests.support.commands import run_command

BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"


def test_costs_are_those_published():
    # DiT-S/2: 6.056 GMAC (Peebles & Xie 2023, table 4). DDPM's CIFAR-10 network: 35.7 M parameters (Ho et al. 2020).
    assert "| 6.056 |" in table("dit-s-2")
    assert "| 35,746,307 |" in table("ddpm-cifar10")
    assert len(table("d*t-s-?").splitlines()) == 2 + 3


def test_a_depthwise_convolution_costs_twice_its_forward_pass_backward():
    """k²·C·H·W multiply-adds forward, as many for the gradients of input and weight each."""

    class Depthwise(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, 1)
            self.conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)

        def forward(self, x, logsnr, label=None, state=None):
            return self.conv(self.first(x)), None

    cost = count_cost(Depthwise, 4, 3, 0)
    first, depthwise = 3 * 8 * 16, 9 * 8 * 16
    assert cost.forward_macs == first + depthwise
    assert cost.flops_per_image == 2 * (2 * first + 3 * depthwise)  # the image needs no gradient


def committed() -> dict[str, str]:
    """The committed rows by preset."""
    text = (Path(models.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = text[text.index(BEGIN) : text.index(END)].splitlines()[3:]
    return {row.split("`")[1]: row for row in rows}


def test_the_committed_table_has_every_preset():
    assert list(committed()) == list(models.PRESETS)


@pytest.mark.parametrize(
    "pattern", ["*-tiny", "dit-s-?", pytest.param("*", marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_the_committed_table_is_current(pattern):
    found = {row.split("`")[1]: row for row in table(pattern).splitlines()[2:]}
    assert found == {name: row for name, row in committed().items() if name in found}


def test_only_what_is_between_the_markers_is_replaced():
    text = f"before\n{BEGIN}\nold\nrows\n{END}\nafter\n"
    once = with_generated(text, "models", "| new |")
    assert once == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"
    assert with_generated(once, "models", "| new |") == once


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_file_without_the_two_markers_is_refused(text):
    with pytest.raises(ValueError, match="models:begin"):
        with_generated(text, "models", "")


def test_the_command_writes_the_file_and_refuses_others(tmp_path):
    import typer

    from diffscale.models.__main__ import main

    app = typer.Typer()
    app.command()(main)
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    assert CliRunner().invoke(app, ["unet-tiny", "--write", str(page)]).exit_code == 0
    assert "`unet-tiny`" in page.read_text(encoding="utf-8")
    page.write_text("nothing", encoding="utf-8")
    assert CliRunner().invoke(app, ["unet-tiny", "--write", str(page)]).exit_code == 2
    assert page.read_text(encoding="utf-8") == "nothing"


def test_the_command_says_all_about_a_recipe():
    said = run_command("models", "edm-cifar10").out
    for part in (
        "Karras et al. 2022",
        "FID 1.97, Heun in 35 evaluations, n = 50,000",
        "2.54e+19 FLOPs = 23.8 hours of one H200 at an assumed MFU of 30%",
        "71.3 USD at an assumed 3 USD an hour",
        "Adam's eps",
        "| 200,000,000 |",
    ):
        assert part in said
