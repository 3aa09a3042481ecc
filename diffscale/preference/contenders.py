"""The contenders of a study: samples of runs at the same seeds and classes, folders of images, and real images."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffscale.core.errors import UserError
from diffscale.evaluation.image_sources import Images, open_images, select_images, unpacked
from diffscale.preference.study import REAL, Contender, hash_of_images
from diffscale.training.draw_samples import DrawOptions, draw_samples, sampling_of
from diffscale.training.load import is_run, list_targets, load_trained, settings_of_run


def contender(target: str, n: int, resolution: int | None = None) -> Contender:
    """Return the first n samples of a run or checkpoint, or the first n images of a folder, .npz or dataset.

    Image i of every run comes from seed i and class i modulo the number of classes.

    resolution: side in pixels to which images on disk are cropped and resized; None: they are square and of one size
    """
    return _of_run(target, n) if is_run(target) else _of_images(target, n, resolution)


def real_images(place: str, n: int, labels: tuple[str, ...], resolution: int | None = None, seed: int = 0) -> Contender:
    """Return n images of a dataset or folder in a random order; of a dataset with classes, of the labels' classes.

    labels: class of each position; empty without classes
    resolution: side in pixels to which images on disk are cropped and resized; None: they are square and of one size
    """
    with unpacked() as work:
        return _real_images(open_images(place, work, resolution=resolution), place, n, labels, seed)


def _real_images(images: Images, place: str, n: int, labels: tuple[str, ...], seed: int) -> Contender:
    classes = list(getattr(images, "class_names", []) or [])
    rng = np.random.default_rng(seed)
    order = rng.permutation(images.n)
    if not labels or not classes:
        rows = np.resize(order, n)
        return _contender(REAL, images, rows, place)
    numbers = np.asarray(images.gather(order)[1])  # type: ignore[union-attr]
    queues = {name: list(order[numbers == k]) for k, name in enumerate(classes)}
    missing = next((name for name in labels[:n] if not queues.get(name)), None)
    if missing is not None:
        raise UserError(
            setting="--real", value=place, expected=f"images of class {missing!r}", reason="the contenders show it"
        )
    rows = np.array([queues[name][i % len(queues[name])] for i, name in enumerate(labels[:n])])
    return _contender(REAL, images, rows, place, labels[:n])


def _of_run(target: str, n: int) -> Contender:
    (checkpoint,) = list_targets(target)
    experiment = settings_of_run(checkpoint)
    trained = load_trained(checkpoint, experiment.eval.ema, experiment)
    conditional = getattr(trained.model, "num_classes", 0) > 0
    names = trained.dataset.class_names
    options = DrawOptions(n, labels="balanced")
    with tempfile.TemporaryDirectory(prefix="diffscale-compare-") as folder:
        draw_samples(trained, Path(folder) / "samples", options)
        files = sorted((Path(folder) / "samples").glob("*.png"))
        images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files[:n]])
    sampler = sampling_of(trained, options).canonical()
    origin = f"{trained.columns['run_id']}/{trained.images_seen}/{trained.ema}/{sampler}"
    labels = tuple(names[i % len(names)] for i in range(n)) if conditional and names else ()
    return Contender(trained.label, images, labels, origin, trained.run_folder)


def _of_images(place: str, n: int, resolution: int | None) -> Contender:
    with unpacked() as work:
        images = open_images(place, work, resolution=resolution)
        return _contender(Path(place.rstrip("/")).name, images, np.arange(min(n, images.n)), place)


def _contender(name: str, images: Images, rows: NDArray, place: str, labels: tuple[str, ...] = ()) -> Contender:
    pixels, _ = select_images(images, rows).images(0, len(rows))
    array = pixels.permute(0, 2, 3, 1).numpy()
    if array.dtype != np.uint8:
        raise UserError(setting="FOLDER", value=place, expected="images", reason="it holds latents")
    return Contender(name, array, labels, hash_of_images(array))
