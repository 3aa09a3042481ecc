"""How much a square of an image uses the others: `python -m benchmarks.studies.exchange RUN ... --out FILE.csv`.

Squares of 8 pixels are denoised twice, with the same noise: in their own image, and on a chequerboard whose other
squares come from another image. The rise of the loss is what the network had learned from the other squares. A network
that denoises each square alone has none.

The loss is that of EDM (Karras et al. 2022) on its own distribution of noise levels, for every run, so it also compares
runs that were trained on other noise levels. Each run is measured with the average of its weights that it evaluates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import pandas as pd
import torch
import typer
from torch import Tensor, nn

from diffscale.core.app import command_app, run_app
from diffscale.core.errors import UserError
from diffscale.core.keyed_random import Stream, normal
from diffscale.diffusion import Diffusion, create_diffusion
from diffscale.diffusion.denoiser import denoise
from diffscale.diffusion.interpolants import per_image
from diffscale.training.load import list_targets, load_trained, settings_of_run

SQUARE = 8
MEASURED = create_diffusion(schedule={"name": "edm_lognormal"}, prediction="F", weighting={"name": "edm"})

app = command_app()


class Exchange(NamedTuple):
    """Losses of each image, (B,): with its own surroundings, and with those of another image."""

    own: Tensor
    other: Tensor


@app.command()
def main(
    runs: Annotated[list[str], typer.Argument(help="folders of runs")],
    out: Annotated[Path | None, typer.Option(help="CSV file to write")] = None,
    images: Annotated[int, typer.Option(min=2, help="held-out images")] = 1024,
    batch: Annotated[int, typer.Option(min=2)] = 128,
) -> None:
    """Measure how much the networks of runs use the squares of an image for each other."""
    rows = []
    for run in runs:
        rows.append(measure(run, images, batch))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(out, index=False, lineterminator="\n")


def measure(run: str, images: int, batch: int) -> dict[str, object]:
    """Return a row: the run, its loss on held-out images, the rise of the loss and the rise's standard error."""
    checkpoint = list_targets(run)[0]
    settings = settings_of_run(checkpoint)
    trained = load_trained(checkpoint, settings.eval.ema, settings)
    held = trained.dataset.heldout
    if held is None:
        raise UserError(setting="RUN", value=run, expected="a run whose dataset has a held-out split")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, parts = trained.model.to(device), []
    for start in range(0, min(images, held.n) - batch + 1, batch):
        positions = torch.arange(start, start + batch)
        stored, labels = held.gather(positions.numpy())
        x = (stored.permute(0, 3, 1, 2).float() / 127.5 - 1).to(device)
        label = labels.to(device) if getattr(model, "num_classes", 0) else None
        with trained.numerics.autocast(device):
            parts.append(exchange(trained.diffusion, model, x, positions.to(device), label))
    own = torch.cat([part.own for part in parts]).double()
    rise = torch.cat([part.other for part in parts]).double() - own
    return {
        "run": trained.experiment.name,
        "seed": trained.experiment.train.seed,
        "train_flops": f"{trained.columns['flops_per_image'] * trained.images_seen:.4g}",
        "n": len(own),
        "loss": round(float(own.mean()), 5),
        "rise": round(float(rise.mean()), 5),
        "rise_error": round(float(rise.std() / len(rise) ** 0.5), 5),
    }


@torch.inference_mode()
def exchange(
    diffusion: Diffusion, model: nn.Module, images: Tensor, positions: Tensor, label: Tensor | None = None
) -> Exchange:
    """Return both losses of images (B, C, H, W) in [−1, 1], with noise keyed by positions (B,)."""
    u = ((positions * 0.6180339887498949) % 1).float().clamp(1e-4, 1 - 1e-4)  # spread evenly
    logsnr = MEASURED.schedule.logsnr(u)
    log_weight, log_gain = MEASURED.log_loss_weight(u, logsnr, *MEASURED.alpha_sigma(logsnr))
    weight = (log_weight - log_gain).exp() / diffusion.image_gain**2  # on the squared error of images in [−1, 1]
    noise = normal(0, Stream.VALIDATION, positions, tuple(images.shape[1:]))
    alpha, sigma = (per_image(c, images) for c in diffusion.alpha_sigma(logsnr))

    def error(mixed: Tensor) -> Tensor:
        """Squared error of each pixel as an estimate of `images`."""
        z = alpha * diffusion.scale_images(mixed) + sigma * noise
        estimate, state = denoise(diffusion, model, z, logsnr, label)
        if state is not None:
            estimate, _ = denoise(diffusion, model, z, logsnr, label, state)
        return (estimate - diffusion.scale_images(images)).square() * per_image(weight, images)

    board = chequerboard(*images.shape[2:]).to(images.device)
    another = images.roll(1, dims=0)
    own = error(images)
    first, second = error(torch.where(board, images, another)), error(torch.where(board, another, images))
    other = torch.where(board, first, second)
    return Exchange(own.flatten(1).mean(1), other.flatten(1).mean(1))


def chequerboard(height: int, width: int, square: int = SQUARE) -> Tensor:
    """(H, W) bool, true on every second square."""
    row, column = torch.arange(height)[:, None] // square, torch.arange(width) // square
    return (row + column) % 2 == 0


if __name__ == "__main__":
    run_app(app)
