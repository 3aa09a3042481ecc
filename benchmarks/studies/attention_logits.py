"""How sharp the attention of a RIN is in the course of training: `python -m benchmarks.studies.attention_logits RUN`.

Every stored checkpoint of a run denoises the same images of noise, at noise levels from almost none to almost pure
noise. For each kind of attention the largest logit over all blocks is written: at hundreds, a softmax picks one token.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, cast
from unittest.mock import patch

import pandas as pd
import torch
import typer
from torch import Tensor

from diffscale.core.app import command_app, run_app
from diffscale.models import rin
from diffscale.training.load import list_targets, load_trained, settings_of_run

KINDS = ("read", "self-attention", "write")
LOGSNR = (-4.0, 4.0)
IMAGES = 16

app = command_app()


@app.command()
def main(
    runs: Annotated[list[str], typer.Argument(help="folders of runs of a RIN")],
    out: Annotated[Path | None, typer.Option(help="CSV file to write")] = None,
) -> None:
    """Write the largest attention logits of every stored checkpoint of runs."""
    rows = []
    for run in runs:
        for checkpoint in list_targets(run, "all"):
            rows.append(measure(run, checkpoint))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(out, index=False, lineterminator="\n")


def measure(run: str, checkpoint: str) -> dict[str, object]:
    """Return a row: the run, its images so far, and the largest logit of each kind of attention."""
    settings = settings_of_run(run)
    trained = load_trained(checkpoint, "none", settings)
    found = largest_logits(cast("rin.RIN", trained.model).eval(), settings.data.resolution)
    columns = {"run": settings.name, "seed": settings.train.seed, "images_seen": trained.images_seen}
    return columns | {kind: round(value, 1) for kind, value in found.items()}


@torch.no_grad()
def largest_logits(model: rin.RIN, resolution: int) -> dict[str, float]:
    """Return the largest attention logit over all blocks, by kind of attention."""
    seen: list[float] = []
    attend = rin.multi_head_attention

    def observed(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        a, b = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
        seen.append((a @ b.mT / math.sqrt(a.shape[-1])).abs().max().item())
        return attend(q, k, v, heads)

    x = torch.randn(IMAGES, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    with patch.object(rin, "multi_head_attention", observed):
        model(x, torch.linspace(*LOGSNR, IMAGES))
    layers = len(seen) // len(model.blocks)  # a block reads, attends in each of its layers, and writes
    kinds = [KINDS[0], *[KINDS[1]] * (layers - 2), KINDS[2]]
    return {kind: max(v for i, v in enumerate(seen) if kinds[i % layers] == kind) for kind in KINDS}


if __name__ == "__main__":
    run_app(app)
