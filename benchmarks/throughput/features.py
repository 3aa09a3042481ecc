"""Inception features against torch-fidelity's own extraction: `python -m benchmarks.throughput.features`.

The same CIFAR-10 images: torch-fidelity reads them as it does in its command (PNG files through its DataLoader), ours
come from an Arrow dataset. Also: what bfloat16, and TF32 in the convolutions, would do to the FID of the check value.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import get_featuresdict_from_dataset, prepare_input_from_id

from benchmarks.common.measure import race, write
from benchmarks.suites import cifar10
from diffscale.data import Dataset, open_dataset
from diffscale.evaluation.image_sources import DatasetSource
from diffscale.evaluation.metrics.distances import Root, frechet_of_features
from diffscale.evaluation.metrics.statistics import moments_of
from diffscale.evaluation.networks import inception
from diffscale.evaluation.networks.extractor import Extractor, create_extractor
from diffscale.evaluation.networks.fold_batch_norm import fold_batch_norms
from diffscale.evaluation.networks.weights import load_weights
from diffscale.evaluation.sample_writer import SampleWriter

CHECK_VALUE = 110.2808


def check_images(train: bool) -> np.ndarray:
    """Return the 256 images of torch-fidelity's test: its random state and its sorted choice."""
    images, _ = cifar10.load(train)
    return images[np.sort(np.random.RandomState(2020).choice(len(images), 256, replace=False))]


def arrow(images: np.ndarray, folder: Path) -> Dataset:
    """Write the images as an Arrow dataset."""
    writer = SampleWriter(folder, "arrow", (3, *images.shape[1:3]), [], {})
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    writer(0, {"images": flat, "labels": np.zeros(len(images), np.int64)})
    writer.close()
    return open_dataset(str(folder))


def theirs_loaded(folder: Path) -> FeatureExtractorInceptionV3:
    """torch-fidelity's network with the weights that ours has."""
    state = load_weights(inception.PUBLISHED)
    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)} | state
    path = folder / "weights.pth"
    torch.save(state, path)
    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))


def extract(extractor: Extractor, dataset: Dataset) -> np.ndarray:
    images, _ = DatasetSource(dataset, np.arange(dataset.n)).images(0, dataset.n)
    return extractor(images)["features"].numpy()


def as_tf32(x: Tensor) -> Tensor:
    """float32 rounded to the ten bits of mantissa that a GPU's TF32 convolutions read."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return rounded.view(torch.float32).to(memory_format=torch.channels_last)


def tf32_extractor() -> Extractor:
    """Return Inception with both operands of every convolution rounded to TF32."""
    network = inception.Inception()
    network.load(load_weights(inception.PUBLISHED))
    fold_batch_norms(network.eval().requires_grad_(False), torch.zeros(1, 3, inception.SIZE, inception.SIZE))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = as_tf32(module.weight)
            module.register_forward_pre_hook(lambda _, inputs: (as_tf32(inputs[0]),))
    return replace(create_extractor("inception"), forward=network)


def main(
    images: Annotated[int, typer.Option(help="images in one call")] = 32,
    pairs: Annotated[int, typer.Option(help="alternating pairs")] = 15,
    check: Annotated[bool, typer.Option(help="FID of the check value in float32 and bfloat16 too")] = False,
) -> None:
    torch.set_num_threads(2)
    extractor = create_extractor("inception")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        train = check_images(True)
        (place / "png").mkdir()
        for i, image in enumerate(train[:images]):
            Image.fromarray(image).save(place / "png" / f"{i:04d}.png")
        dataset = arrow(train[:images], place / "arrow")
        network = theirs_loaded(place)
        options = {"input1": str(place / "png"), "samples_find_deep": False, "verbose": False}

        def theirs() -> torch.Tensor:
            data = prepare_input_from_id(1, **options)
            return get_featuresdict_from_dataset(data, network, 64, False, True, False)["2048"]

        difference = float(np.abs(extract(extractor, dataset) - theirs().numpy()).max())
        row = {"images": images, "largest_feature_difference": difference}
        row |= race(lambda: extract(extractor, dataset), theirs, images, pairs)
        print(row, write("features", [row]))
        if check:
            others = arrow(check_images(False), place / "test")
            all_train = arrow(train, place / "train")
            rows = []
            low = replace(extractor, precision=torch.bfloat16)
            for precision, using in (("fp32", extractor), ("tf32", tf32_extractor()), ("bf16", low)):
                a, b = extract(using, all_train), extract(using, others)
                value = frechet_of_features(a, Root.of(moments_of(b)))
                rows.append({"convolutions": precision, "fid": value, "moved": value - CHECK_VALUE})
            print(rows, write("features_precision", rows))


if __name__ == "__main__":
    typer.run(main)
