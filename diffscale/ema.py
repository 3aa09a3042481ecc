"""`python -m diffscale.ema RUN --std 0.07`: averages of any length from a finished run (EDM2's post-hoc EMA).

RUN is the folder of a run that was trained with `train.ema.power` (two widths, 0.05 and 0.10, are enough). The result
is written into the checkpoint, where `sample` and `evaluate` find it: `eval.ema=0.07`. `--sweep` makes one average for
each width of a range, evaluates them all and prints the best.
"""

from __future__ import annotations

from typing import Annotated

import typer

from diffscale.core import storage
from diffscale.core.app import command_app, run_app
from diffscale.core.errors import UserError

app = command_app()


@app.command()
def main(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder")],
    std: Annotated[list[float] | None, typer.Option(help="relative width; may be given several times")] = None,
    images: Annotated[int | None, typer.Option(help="images seen of the checkpoint; default: the newest")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="evaluate widths 0.02 to 0.20 and print the best")] = False,
    workers: Annotated[int, typer.Option(help="Ray actors; 0: one for each GPU, or else CPU, of the cluster")] = 0,
) -> None:
    """Reconstruct averages of other lengths from the stored ones."""
    from diffscale.training import posthoc_ema  # import cost
    from diffscale.training.ema import profile_name  # import cost

    run = storage.resolve(run, "RUN")
    widths = list(std or (posthoc_ema.SWEEP_WIDTHS if sweep else []))
    if not widths:
        raise UserError(setting="--std", value=None, expected="at least one relative width, such as 0.07, or --sweep")
    checkpoint, residual = posthoc_ema.make(run, widths, images)
    for width in widths:
        name = profile_name(width)
        print(f"{name}: {checkpoint}/ema/{name}.safetensors  residual {residual[width]:.2%}")
    if sweep:
        best = posthoc_ema.sweep(
            checkpoint,
            widths,
            workers,
            on_record=lambda r: print(f"{r.ema}: {r.metric} {r.value:.4g}", flush=True),
        )
        print(f"best: {best.ema}  {best.metric} {best.value:.4g} with {best.n_generated} samples")


if __name__ == "__main__":
    run_app(app)
