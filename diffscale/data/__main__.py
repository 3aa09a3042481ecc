"""The command `diffscale data`: build, inspect and verify datasets."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated, Literal, get_args

import typer
from rich.table import Table

from diffscale.core import hub, storage
from diffscale.core.app import command_app, run_app
from diffscale.core.console import make_console
from diffscale.core.errors import UserError
from diffscale.data.autoencoder import Autoencoder
from diffscale.data.build import hub_source
from diffscale.data.build.build import BuildOptions, build, examine
from diffscale.data.build.decode import Preparation
from diffscale.data.build.encode import EncodeOptions
from diffscale.data.build.encode import encode as encode_images
from diffscale.data.build.items import Kind
from diffscale.data.format.checksums import verify_dataset
from diffscale.data.format.dataset import available_resolutions
from diffscale.data.format.manifest import FILE, read_manifest
from diffscale.data.preview import write_grid

app = command_app(no_args_is_help=True, help="Arrow datasets of images.")
console = make_console()

Folder = Annotated[str, typer.Argument(help="dataset folder, or a URI")]


@app.command("build")
def build_command(
    source: Annotated[
        str,
        typer.Argument(
            help="folder, .zip, .tar, .parquet, .arrow, .npz, .npy or CIFAR-10; or a URI, as hf://OWNER/NAME[@REVISION]"
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="DATASET", help="folder to write, or a URI")],
    resolution: Annotated[
        list[int] | None, typer.Option(help="side in pixels; repeat it for several in one pass")
    ] = None,
    kind: Annotated[str, typer.Option(help="auto, folder, zip, tar, table, array or cifar10")] = "auto",
    crop: Annotated[
        str, typer.Option(help="center; adm, as ImageNet is prepared for ADM; or none, which rejects images not square")
    ] = "center",
    filter: Annotated[str, typer.Option(help="lanczos or box, both antialiased")] = "lanczos",
    background: Annotated[str, typer.Option(help="colour under transparent pixels: R,G,B")] = "255,255,255",
    channels: Annotated[int, typer.Option(help="3, or 1 for grey")] = 3,
    upsample: Annotated[bool, typer.Option(help="accept images smaller than the resolution")] = False,
    layout: Annotated[str, typer.Option(help="pixels, encoded, or auto (pixels up to 128)")] = "auto",
    encoding: Annotated[str, typer.Option(help="webp or png, both lossless, for large resized images")] = "webp",
    split: Annotated[float, typer.Option(help="share of images to hold out")] = 0.0,
    split_seed: Annotated[int, typer.Option(help="another choice of held-out images")] = 0,
    shuffle: Annotated[
        bool | None,
        typer.Option(
            help="store the rows in a random order; default: of folders and archives, not of tables and arrays"
        ),
    ] = None,
    labels: Annotated[str | None, typer.Option(help="CSV of files and labels instead of subfolders")] = None,
    image_column: Annotated[
        str | None, typer.Option(help="column of the images of a table; in WebDataset their extension, e.g. jpg")
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(help="column of the labels of a CSV or table; in WebDataset cls, txt or json.KEY; or none"),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="configuration of a Hugging Face dataset; '*' joins all of them")
    ] = None,
    split_names: Annotated[
        str | None, typer.Option(help="folders of the splits: train=NAME,heldout=NAME; or none, to have none")
    ] = None,
    folders: Annotated[
        str | None,
        typer.Option(help="what each level of folders is: split, class, * (no meaning) or a name; e.g. */split/class"),
    ] = None,
    max_pixels: Annotated[int, typer.Option(help="larger images are rejected as decompression bombs")] = 50_000_000,
    memory: Annotated[
        float | None, typer.Option(help="GB for all tasks together; default: half of the free memory")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="most tasks at once; 0: in this process, without Ray; default: all CPUs")
    ] = None,
    strict: Annotated[bool, typer.Option(help="stop at the first image that cannot be used")] = False,
    shard_megabytes: Annotated[int, typer.Option(help="size of a shard")] = 256,
    encode: Annotated[
        str | None,
        typer.Option(metavar="VAE", help="also store latents by this AutoencoderKL: a folder or owner/name[@revision]"),
    ] = None,
    latent_scale: Annotated[str, typer.Option(help="normalisation of latents: sd (0.18215), or edm2")] = "sd",
    mirror: Annotated[
        bool, typer.Option("--mirror", help="with --encode: also the latents of mirrored images, for data.flip")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what would be read, and what is left out and why; write nothing")
    ] = False,
) -> None:
    """Build a dataset. The same command continues after an interruption."""
    colour = tuple(int(c) for c in background.split(",") if c.strip().isdigit())
    choices: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("--kind", kind, get_args(Kind)),
        ("--crop", crop, ("center", "adm", "none")),
        ("--filter", filter, ("lanczos", "box")),
        ("--channels", channels, (1, 3)),
        ("--layout", layout, ("auto", "pixels", "encoded")),
        ("--encoding", encoding, ("webp", "png")),
        ("--latent-scale", latent_scale, ("sd", "edm2")),
    )
    for setting, value, valid in choices:
        if value not in valid:
            raise UserError(setting=setting, value=value, expected=f"one of {', '.join(map(str, valid))}")
    if len(colour) != 3 or max(colour) > 255:
        raise UserError(
            setting="--background", value=background, expected="R,G,B with 0 to 255 each, for example 255,255,255"
        )
    chosen = {
        "image_column": image_column,
        "label_column": label_column,
        "config": config,
        "split_names": split_names,
    }
    if source.startswith(hub.SCHEME):
        source, choices_of_source = hub_source.pin(source)
        chosen |= choices_of_source
    preparation = Preparation(crop, filter, colour, channels, upsample, max_pixels)  # type: ignore[arg-type]
    options = BuildOptions(
        source=storage.resolve(source, "SOURCE", written=False),
        target=storage.resolve(target, "DATASET"),
        resolutions=tuple(resolution or ()),
        kind=kind,  # type: ignore[arg-type]
        preparation=preparation,
        layout=layout,  # type: ignore[arg-type]
        encoding=encoding,  # type: ignore[arg-type]
        split=split,
        split_seed=split_seed,
        shuffle=shuffle,
        labels=labels and storage.resolve(labels, "--labels", written=False),
        folders=folders,
        memory=int(memory * 1e9) if memory else None,
        workers=workers,
        strict=strict,
        shard_bytes=shard_megabytes << 20,
        **chosen,  # type: ignore[arg-type]
    )
    latents = None
    if encode is not None:
        place = storage.resolve(encode, "--encode", written=False) if os.path.exists(encode) else encode
        latents = EncodeOptions(Autoencoder.open(place, "--encode"), latent_scale, mirror)  # type: ignore[arg-type]
        side = latents.check(options.resolutions, channels)
        options = replace(options, target=storage.join(options.target, str(options.resolutions[0])))
    elif mirror or latent_scale != "sd":
        given = "--mirror" if mirror else "--latent-scale"
        raise UserError(setting=given, value=mirror or latent_scale, expected="to be given with --encode VAE")
    if dry_run:
        console.print(examine(options), markup=False, highlight=False, soft_wrap=True)
        if latents is not None:
            shape = f"{latents.autoencoder.latent_channels} x {side} x {side}"
            console.print(f"latents     {shape} of each image, by {latents.autoencoder.name}", highlight=False)
        return
    built = build(options)
    if latents is not None:
        built.append(encode_images(built[0], storage.join(os.path.dirname(built[0]), str(side)), latents))
    for folder in built:
        _describe(folder)


@app.command("inspect")
def inspect_command(
    dataset: Folder,
    grid: Annotated[str | None, typer.Option(help="PNG to write a grid of images to")] = None,
    images: Annotated[int, typer.Option(help="images in the grid")] = 64,
    split: Annotated[Literal["train", "heldout"], typer.Option()] = "train",
) -> None:
    """Print the content of a dataset at all its resolutions, and write a grid of some of its images."""
    folder = storage.resolve(dataset, "DATASET", written=False)
    several = [] if storage.exists(storage.join(folder, FILE)) else available_resolutions(folder)
    for side in several:
        _describe(storage.join(folder, str(side)))
    if several:
        folder = storage.join(folder, str(several[-1]))
    else:
        _describe(folder)
    target = grid or f"{folder.rstrip('/').rsplit('/', 1)[-1]}-{split}.png"
    console.print(f"picture   {write_grid(folder, split, images, os.path.abspath(target))}")


@app.command("verify")
def verify_command(dataset: Folder) -> None:
    """Check every checksum and decode every image. The exit code is 1 if something is damaged."""
    problems = verify_dataset(storage.resolve(dataset, "DATASET", written=False))
    for problem in problems:
        console.print(problem, markup=False, highlight=False)
    if problems:
        raise typer.Exit(1)
    console.print("every checksum and every image is good")


def _describe(folder: str) -> None:
    manifest = read_manifest(folder)
    table = Table(show_header=False, box=None)
    side = manifest.resolution
    table.add_row("dataset", folder)
    table.add_row("images", f"{side} x {side} x {manifest.channels} {manifest.dtype}, {manifest.layout}")
    for name, split in manifest.splits.items():
        size = sum(s.bytes for s in split.shards) / 1e6
        table.add_row(
            name, f"{split.rows:,} images in {len(split.shards)} shards, {size:,.1f} MB, hash {split.content_hash}"
        )
        table.add_row("", f"mean {_numbers(split.mean)}   std {_numbers(split.std)}")
    names = manifest.class_names
    table.add_row(
        "classes", f"{len(names)}: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}" if names else "none"
    )
    table.add_row("source", str(manifest.source.get("path")))
    if (made := manifest.encoding) is not None:
        mirrored = ", also of mirrored images" if made.mirrored else ""
        how = f"from {made.image_resolution} pixels, scaled as {made.scale}{mirrored}"
        table.add_row("encoded", f"by {made.autoencoder} ({made.digest}) {how}")
    table.add_row("resize", ", ".join(f"{k} {v}" for k, v in manifest.resize.items()))
    lossy = f"{manifest.lossy_images:,} images were stored lossily, which limits FID" if manifest.lossy else "no"
    table.add_row("lossy", lossy)
    left_out = manifest.source.get("left_out", 0)
    other = f", and {left_out:,} other files left out" if left_out else ""
    table.add_row(
        "rejected", f"{manifest.rejected:,}{other}" + (" (rejected.csv)" if manifest.rejected or other else "")
    )
    console.print(table)


def _numbers(values: list[float]) -> str:
    return " ".join(f"{v:.2f}" for v in values)


if __name__ == "__main__":
    run_app(app)
