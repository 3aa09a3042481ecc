"""A whole training step against peers' own: `python -m benchmarks.throughput.trainers diffusers lucidrains`.

Two processes take turns on all cores of this machine; each trains a network with the same widths, depths, resolutions
and attention places on the same 32-pixel images with the same batch. Ours is a session (data, draws, step, averages,
history); the peers' are the step of diffusers' train_unconditional example through accelerate (with its average of the
weights), and denoising-diffusion-pytorch's Trainer, which decode the images' PNG files as they do. Ours computes as a
run would choose; the peer in the fastest of {fp32, bf16} × {contiguous, channels-last} × {eager, compile}, measured
first (bf16 only where the processor has it). The ratio is that of achieved FLOP/s. Results:
benchmarks/results/throughput/trainers_PEER.csv.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.multiprocessing as multiprocessing
import typer
from torch import nn

from benchmarks.common.contenders import RACES, training_flops
from benchmarks.common.measure import race, write
from benchmarks.throughput.training_step import fastest, modes_on, parse
from diffscale.config.load import load_experiment
from diffscale.models.cost import Cost, count_cost
from diffscale.training.numerics import Numerics

Steps = Callable[[int], None]
BATCH = 16
OURS = [
    "model=unet",
    "model.num_blocks=2",
    "model.model_channels=32",
    "model.channel_mult=[1,2,4]",
    "model.attn_resolutions=[8]",
    "model.resample=conv",
    "model.adaptive_scale=false",
    "data.resolution=32",
    "data.class_conditional=false",
    f"train.global_batch={BATCH}",
    "train.flops=null",
    "train.images=100000000",
    "train.compile=false",
    "train.workers=1",
    "train.trackers=[]",
    "eval.n_generated=0",
]
HEADS = {"diffusers": "model.channels_per_head=32", "lucidrains": "model.num_heads=4"}
NETWORKS = {"diffusers": "unet-small", "lucidrains": "unet-lucidrains"}  # in contenders.RACES


class Side(NamedTuple):
    """Who steps: "ours" or the peer, against which peer, on how many threads, in which folder."""

    who: str
    peer: str
    threads: int
    folder: Path


def our_steps(side: Side) -> tuple[Steps, float, Numerics]:
    """The training of a session, without Ray; what it costs, and how it chose to compute."""
    from diffscale.config.factory import build_model, open_training_data  # import cost
    from diffscale.training.parallel import World  # import cost
    from diffscale.training.trainer import Trainer  # import cost

    settings = [f"storage={side.folder}", "name=ours", f"train.cpus_per_worker={side.threads}", HEADS[side.peer]]
    experiment = load_experiment("quickstart-unet", [*OURS, *settings])
    dataset = open_training_data(experiment)
    cost = count_cost(lambda: build_model(experiment, dataset), dataset.resolution, dataset.channels, 0)
    session = Trainer(experiment, experiment.run_folder(dataset.content_hash), World(), Cost(*cost))
    session.loader().__enter__()

    def steps(count: int) -> None:
        for _ in range(count):
            session.advance()

    return steps, cost.flops_per_image, session.numerics


def diffusers_steps(network: nn.Module, mode: Numerics, folder: Path) -> Steps:
    """What train_unconditional does with a batch at its defaults and with --use_ema."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from PIL import Image  # import cost
    from torchvision import transforms  # import cost

    augment = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    files = sorted(folder.glob("*.png"))

    class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            return {"input": augment(Image.open(files[i]).convert("RGB"))}

    accelerator = Accelerator(mixed_precision="bf16" if mode.precision == "bf16" else "no")
    noising: Any = DDPMScheduler(num_train_timesteps=1000)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    loader = torch.utils.data.DataLoader(Images(), batch_size=BATCH, shuffle=True, drop_last=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    network, optimizer, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            for batch in loader:
                yield batch["input"]

    stream = batches()

    def steps(count: int) -> None:
        for _ in range(count):
            clean = next(stream)
            noise = torch.randn_like(clean)
            times = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
            noisy = noising.add_noise(clean, noise, times)
            if mode.channels_last:
                noisy = noisy.contiguous(memory_format=torch.channels_last)
            with accelerator.accumulate(network):
                prediction = network(noisy, times).sample
                loss = nn.functional.mse_loss(prediction.float(), noise.float())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            average.step(network.parameters())
            loss.detach().item()

    return steps


def lucidrains_steps(network: nn.Module, mode: Numerics, folder: Path) -> Steps:
    """Return its Trainer's loop; a call runs the given number of steps."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

    trainer = Trainer(
        GaussianDiffusion(network, image_size=32),
        str(folder),
        train_batch_size=BATCH,
        calculate_fid=False,
        save_and_sample_every=10**9,
        train_num_steps=0,
        amp=mode.precision == "bf16",
        mixed_precision_type="bf16",
        results_folder=str(folder / "results"),
    )

    def steps(count: int) -> None:
        trainer.train_num_steps = trainer.step + count
        trainer.train()

    return steps


PEERS: dict[str, Callable[[nn.Module, Numerics, Path], Steps]] = {
    "diffusers": diffusers_steps,
    "lucidrains": lucidrains_steps,
}


def worker(pipe: Any, side: Side, mode: Numerics | None) -> None:
    """Sends FLOPs per image and how it computes, then answers each number of steps when they are done."""
    torch.set_num_threads(side.threads)
    if mode is None:
        steps, flops, numerics = our_steps(side)
    else:
        build, numerics = RACES[NETWORKS[side.peer]].theirs, mode
        network = build().network
        assert isinstance(network, nn.Module)
        mode.prepare(network)
        flops = training_flops(build, 32)[1]
        steps = PEERS[side.peer](network, mode, side.folder / "images")
    steps(2)
    pipe.send((flops, numerics))
    while (count := pipe.recv()) is not None:
        steps(count)
        pipe.send(True)


class Contender:
    """A process that steps on request."""

    def __init__(self, side: Side, mode: Numerics | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, side, mode))
        self.process.start()
        theirs.close()
        self.flops, self.numerics = self.pipe.recv()

    def step(self, count: int) -> None:
        self.pipe.send(count)
        self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def write_images(folder: Path) -> None:
    """The emoji of 32 pixels as PNG files."""
    from PIL import Image  # import cost

    from diffscale.config.factory import open_training_data  # import cost

    settings = ["data.resolution=32", f"storage={folder}", "train.flops=1"]
    dataset = open_training_data(load_experiment("quickstart-unet", settings))
    (folder / "images").mkdir()
    images, _ = dataset.gather(torch.arange(dataset.n).numpy())
    for i, image in enumerate(images.numpy()):
        Image.fromarray(image).save(folder / "images" / f"{i:05d}.png")


def best_mode(side: Side, modes: list[Numerics]) -> Numerics:
    """The peer's fastest: each in a process of its own, median of three turns of two steps."""

    def seconds(mode: Numerics) -> float:
        contender, taken = Contender(side, mode), []
        for _ in range(3):
            started = time.perf_counter()
            contender.step(2)
            taken.append(time.perf_counter() - started)
        contender.close()
        typer.echo(f"{side.peer} {mode}: {statistics.median(taken) / 2:.3f} s")
        return statistics.median(taken) / 2

    return fastest(modes, seconds)


def main(
    peers: Annotated[list[str], typer.Argument(help="diffusers, lucidrains")],
    pairs: int = 15,
    steps: Annotated[int, typer.Option(help="in one turn")] = 4,
    threads: int = os.cpu_count() or 1,
    peer_mode: Annotated[str, typer.Option(help="precision,channels-last,compile: bf16,1,0; default: searched")] = "",
    peer_compile: Annotated[bool, typer.Option(help="search compiled modes too (minutes each)")] = True,
) -> None:
    """Race our training step against peers' trainers."""
    for peer in peers:
        if peer not in PEERS:
            raise typer.BadParameter(f"{peer}: expected one of {', '.join(PEERS)}")
        with tempfile.TemporaryDirectory(prefix="diffscale-trainers-") as folder:
            side = Side(peer, peer, threads, Path(folder))
            write_images(side.folder)
            mode = parse(peer_mode) if peer_mode else best_mode(side, modes_on("cpu", peer_compile))
            ours, theirs = Contender(side._replace(who="ours")), Contender(side, mode)
            row = race(lambda: ours.step(steps), lambda: theirs.step(steps), steps * BATCH, pairs)  # noqa: B023
            scale = ours.flops / theirs.flops
            row |= {name: round(row[name] * scale, 4) for name in ("ratio", "ratio_low", "ratio_high")}
            row |= {"threads": threads, "our_flops_per_image": ours.flops, "their_flops_per_image": theirs.flops}
            row |= {"ours": str(ours.numerics), "theirs": str(theirs.numerics)}
            ours.close()
            theirs.close()
            typer.echo(f"{peer}: {row}")
            typer.echo(write(f"trainers_{peer}", [{"peer": peer, "batch": BATCH, **row}]))


if __name__ == "__main__":
    typer.run(main)
