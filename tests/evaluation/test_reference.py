from __future__ import annotations

import multiprocessing
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from diffscale.core.errors import UserError
from diffscale.data import open_dataset
from diffscale.evaluation.distribute import View
from diffscale.evaluation.feature_store import FeatureStore, write_chunk
from diffscale.evaluation.image_sources import DatasetSource
from diffscale.evaluation.metrics.distances import frechet
from diffscale.evaluation.metrics.registry import parse_metric, per_class
from diffscale.evaluation.metrics.statistics import moments_of, save_moments
from diffscale.evaluation.reference import get_reference, reference_from_npz, reference_key, reference_rows

from .conftest import write_dataset

VIEW = View("pixels", 16)


def columns_of_pixels(source, view, todo):
    """A stand-in for a network that costs nothing: the mean colours."""
    for first, end in todo:
        images, labels = source.images(first, end)
        yield first, {view.column(): images.float().mean((2, 3)).numpy(), "labels": labels.numpy()}


def get(dataset, place: Path, n=None, compute=columns_of_pixels):
    return get_reference(dataset, VIEW, n_reference=n, place=place, compute=compute)


def build_slowly(folder: str, place: str, results) -> None:
    built = []

    def compute(source, view, todo):
        built.append(len(todo))
        time.sleep(0.5)
        yield from columns_of_pixels(source, view, todo)

    reference = get(open_dataset(folder), Path(place), compute=compute)
    results.put((len(built), float(reference.moments().mean.sum())))


def test_many_processes_that_ask_at_once_build_it_once(dataset, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (dataset.path, str(tmp_path / "references"), results)
    processes = [context.Process(target=build_slowly, args=arguments) for _ in range(4)]
    for p in processes:
        p.start()
    answers = [results.get(timeout=60) for _ in processes]
    for p in processes:
        p.join()
    assert sorted(n for n, _ in answers) == [0, 0, 0, 1]
    assert len({value for _, value in answers}) == 1


def test_it_is_the_same_statistics_as_those_of_all_features(dataset, tmp_path):
    reference = get(dataset, tmp_path)
    images, labels = dataset.gather(np.arange(dataset.n))
    expected = moments_of(images.float().mean((1, 2)).numpy())
    assert frechet(reference.moments(), expected) == pytest.approx(0, abs=1e-4)
    assert np.bincount(reference.labels()).tolist() == np.bincount(labels).tolist()
    rows = reference_rows(dataset.n, None)
    np.testing.assert_allclose(reference.features()[:], images.float().mean((1, 2)).numpy()[rows], rtol=1e-6)


def test_a_builder_that_died_is_continued(tmp_path):
    dataset = write_dataset(tmp_path / "data", 600, 16)
    seen = []

    def dies(source, view, todo):
        for first, columns in columns_of_pixels(source, view, todo):
            if first > 0:
                raise KeyboardInterrupt
            yield first, columns

    def records(source, view, todo):
        seen.extend(todo)
        yield from columns_of_pixels(source, view, todo)

    with pytest.raises(KeyboardInterrupt):
        get(dataset, tmp_path / "r", compute=dies)
    assert get(dataset, tmp_path / "r", compute=records).moments().n == 600
    assert seen == [(256, 512), (512, 600)]


def test_the_key_changes_with_content_network_resize_resolution_and_number(tmp_path):
    a, b = write_dataset(tmp_path / "a", 48, 16), write_dataset(tmp_path / "b", 48, 16, seed=1)
    same = write_dataset(tmp_path / "moved" / "a", 48, 16)
    assert reference_key(same, VIEW, None) == reference_key(a, VIEW, None) == reference_key(a, VIEW, 48)
    others = [
        reference_key(b, VIEW, None),
        reference_key(a, View("other", 16), None),
        reference_key(a, View("pixels", 32), None),
        reference_key(a, View("pixels", 16, "clean"), None),
        reference_key(a, VIEW, 40),
    ]
    assert len({reference_key(a, VIEW, None), *others}) == 6


def test_a_part_of_the_reference_is_a_fixed_random_one(dataset, tmp_path):
    assert get(dataset, tmp_path, n=10).n == 10
    assert reference_rows(48, 10).tolist() == reference_rows(48, None)[:10].tolist()


def test_sfid_of_a_class_compares_the_spatial_features_of_that_class(dataset, tmp_path):
    view = View("inception", 16, outputs=("features", "spatial"))

    def columns(source, view, todo):
        for first, end in todo:
            images, labels = source.images(first, end)
            small = torch.nn.functional.avg_pool2d(images.float(), 8).flatten(1)
            yield (
                first,
                {view.column(): small[:, :3].numpy(), view.column("spatial"): small.numpy(), "labels": labels.numpy()},
            )

    reference = get_reference(dataset, view, n_reference=None, place=tmp_path / "r", compute=columns)
    source = DatasetSource(dataset, np.arange(dataset.n))
    for first, chunk in columns(source, view, [(0, dataset.n)]):
        write_chunk(tmp_path / "generated", first, chunk)
    rows = per_class(parse_metric("sfid"), view, FeatureStore(tmp_path / "generated"), reference)
    assert [r.metric for r in rows] == ["sfid[0]", "sfid[1]", "sfid[2]"]
    assert [r.value for r in rows] == pytest.approx([0] * 3, abs=1e-3)
    assert [(r.n_generated, r.n_reference) for r in rows] == [(16, 16)] * 3


def test_statistics_from_a_file_have_no_neighbours(tmp_path):
    save_moments(tmp_path / "stats.npz", moments_of(np.random.default_rng(0).normal(size=(30, 4))))
    reference = reference_from_npz(tmp_path / "stats.npz", VIEW)
    assert (reference.n, len(reference.key)) == (30, 16)
    with pytest.raises(UserError, match="statistics has none"):
        reference.features()


def test_the_subset_of_a_large_reference_needs_no_array_of_its_rows():
    """A billion rows were 8 GB and a minute on every rank."""
    tracemalloc.start()
    rows = reference_rows(10**9, 50_000)
    first, some = rows[:1000], rows[np.array([7, 0, 49_999])]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(rows) == 50_000
    assert len(np.unique(rows[:])) == 50_000
    assert some[:2].tolist() == [first[7], first[0]]
    old = reference_rows(1000, 100)
    assert old.tolist() == np.random.RandomState(2020).permutation(1000)[:100].tolist()  # as records of old have it
