from __future__ import annotations

import sys
import threading
import time
from itertools import pairwise

import numpy as np
import psutil
import pytest
import torch

from diffscale.core.errors import UserError
from diffscale.data import Loader, ShardError, even_share, open_dataset, positions_to_indices
from diffscale.data.loading.augment import is_mirrored, mirror_images
from tests.support.datasets import damage, pictures, write_dataset


def take(loader, n):
    with loader:
        return [batch for batch, _ in zip(loader, range(n), strict=False)]


SETTINGS = {"seed": 3, "global_batch": 24, "flip": True, "augment": 0.3}


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["rows", "blocks"])
def test_global_batches_are_identical_on_any_number_of_workers(dataset, world, order):
    settings = {**SETTINGS, "order": order, "block_rows": 10, "window": 3}
    alone = take(Loader(dataset, **settings), 12)  # nearly three epochs
    shares = [take(Loader(dataset, shard=even_share(24, r, world), **settings), 12) for r in range(world)]
    for k, whole in enumerate(alone):
        for name in ("images", "labels", "positions", "augment_label"):
            joined = torch.cat([getattr(share[k], name) for share in shares])
            assert torch.equal(joined, getattr(whole, name)), name


def test_uneven_and_empty_shares_are_allowed(dataset):
    cuts = [0, 1, 1, 20, 24]
    whole = take(Loader(dataset, **SETTINGS), 3)
    parts = [take(Loader(dataset, shard=cut, **SETTINGS), 3) for cut in pairwise(cuts)]
    assert [len(part[0]) for part in parts] == [1, 0, 19, 4]
    assert torch.equal(torch.cat([part[2].images for part in parts]), whole[2].images)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads as Linux shows them")
def test_it_starts_no_second_pool_of_threads(tmp_path):
    write_dataset(tmp_path, pictures(64, side=64))
    torch.randn(1 << 20).abs_()  # the pool of this thread
    before, threads = psutil.Process().num_threads(), torch.get_num_threads()
    with Loader(open_dataset(str(tmp_path)), global_batch=64, seed=0, flip=True) as loader:
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        assert psutil.Process().num_threads() <= before + 1
    assert torch.get_num_threads() == threads


def test_even_shares_cover_the_batch():
    for batch in (1, 7, 64):
        for world in range(1, 9):
            cuts = [even_share(batch, rank, world) for rank in range(world)]
            assert cuts[0][0] == 0
            assert cuts[-1][1] == batch
            assert all(a[1] == b[0] for a, b in pairwise(cuts))
            assert max(b - a for a, b in cuts) - min(b - a for a, b in cuts) <= 1


@pytest.mark.parametrize("start", [24, 48, 240, 7])
def test_a_run_resumes_from_one_integer(dataset, start):
    resumed = take(Loader(dataset, start=start, **SETTINGS), 4)
    rows = positions_to_indices(np.arange(start, start + 96), dataset.n, 3)
    assert torch.cat([b.positions for b in resumed]).tolist() == list(range(start, start + 96))
    assert torch.cat([b.labels for b in resumed]).tolist() == (rows % 4).tolist()
    if start % 24 == 0:
        whole = take(Loader(dataset, **SETTINGS), start // 24 + 4)[start // 24 :]
        assert all(torch.equal(a.images, b.images) for a, b in zip(resumed, whole, strict=True))


def test_an_epoch_has_every_image_once_and_images_are_scaled_to_one(dataset, images):
    batches = take(Loader(dataset, seed=0, global_batch=25), 4)
    pixels = torch.cat([b.images for b in batches])
    assert pixels.shape == (100, 3, 8, 8)
    assert pixels.dtype == torch.float32
    restored = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    order = positions_to_indices(np.arange(100), 100, 0)
    assert np.array_equal(restored, images[order])


def test_the_end_cuts_the_last_batch(dataset):
    loader = Loader(dataset, seed=0, global_batch=30, start=10, stop=75)
    assert [b.positions.tolist() for b in loader] == [[*range(10, 40)], [*range(40, 70)], [*range(70, 75)]]


def test_raw_batches_are_as_stored(dataset, images):
    batch = take(Loader(dataset, seed=0, global_batch=10, raw=True), 1)[0]
    assert batch.images.dtype == torch.uint8
    assert np.array_equal(batch.images.numpy(), images[positions_to_indices(np.arange(10), 100, 0)])


@pytest.mark.parametrize("augment", [0.0, 0.5])
def test_channels_last_batches_hold_the_same_images_in_their_stored_order(dataset, augment):
    """Stored images are (H, W, C): a network that wants this order needs no copy."""
    settings = {**SETTINGS, "augment": augment}
    plain, last = (take(Loader(dataset, channels_last=flag, **settings), 2)[1].images for flag in (False, True))
    assert torch.equal(plain, last)
    assert plain.is_contiguous()
    assert augment or last.is_contiguous(memory_format=torch.channels_last)


def test_flips_depend_on_the_position_alone_and_are_fair():
    x = torch.arange(4.0).expand(4000, 1, 2, 4)
    positions = torch.arange(4000)
    flipped = mirror_images(x, is_mirrored(1, positions))[:, 0, 0, 0] == 3
    assert abs(flipped.float().mean() - 0.5) < 4 * 0.5 / 4000**0.5  # 4 standard errors
    assert torch.equal(is_mirrored(1, positions[100:109]), flipped[100:109])


def test_numbers_of_many_batches_are_drawn_at_once_and_stay_with_their_positions(dataset):
    """Also where the run starts in the middle and the last batch is cut; the flips are those of the positions too."""
    calls = []

    def numbers(positions):
        calls.append(len(positions))
        return {"twice": positions * 2, "odd": positions % 2 == 1}

    whole = {"seed": 3, "global_batch": 24, "start": 10, "stop": 10 + 24 * 3 + 7}
    for shard in ((0, 24), (5, 17), (4, 4)):
        loader = Loader(dataset, flip=True, numbers=numbers, shard=shard, **whole)
        plain = Loader(dataset, shard=shard, **whole)
        for batch, unflipped in zip(take(loader, 10), take(plain, 10), strict=True):
            assert torch.equal(batch.numbers["twice"], batch.positions * 2)
            assert torch.equal(batch.numbers["odd"], batch.positions % 2 == 1)
            assert torch.equal(batch.images, mirror_images(unflipped.images, is_mirrored(3, batch.positions)))
    assert len(calls) == 3
    assert min(calls[:2]) > 1000


def test_latents_are_neither_flipped_nor_augmented(dataset, monkeypatch):
    monkeypatch.setattr(type(dataset), "is_latent", property(lambda self: True))
    with pytest.raises(UserError, match=r"data\.flip=false"):
        Loader(dataset, seed=0, global_batch=4, flip=True)


def test_impossible_shares_are_refused(dataset):
    for shard in ((-1, 3), (3, 2), (0, 25)):
        with pytest.raises(ValueError, match="shard"):
            Loader(dataset, seed=0, global_batch=24, shard=shard)


def test_a_damaged_shard_stops_the_run_and_names_the_position(dataset):
    """A flipped byte is found in the background, and before the first checkpoint counts as good."""
    damage(dataset.local_path(1), "flipped")
    loader = Loader(open_dataset(dataset.path), seed=3, global_batch=24)
    with pytest.raises(ShardError) as error:
        loader.wait_verified()
    rows = positions_to_indices(np.arange(100), 100, 3)
    inside = (rows >= dataset.starts[1]) & (rows < dataset.starts[2])
    assert error.value.position == int(np.flatnonzero(inside)[0])
    with pytest.raises(ShardError, match=r"train-00001"):
        take(loader, 10**6)


def test_checksums_are_compared_once_per_node_while_the_files_stay_the_same(dataset, monkeypatch):
    from diffscale.data.format import checksums

    read = []
    original = checksums.file_sha256
    monkeypatch.setattr(checksums, "file_sha256", lambda path: read.append(path) or original(path))
    for _ in range(3):
        Loader(open_dataset(dataset.path), seed=0, global_batch=4).wait_verified()
    assert len(read) == 3  # one for each shard
    damage(dataset.local_path(1), "flipped")
    with pytest.raises(ShardError):
        Loader(open_dataset(dataset.path), seed=0, global_batch=4).wait_verified()


def test_a_checkpoint_waits_for_the_checksums_of_the_shards_that_it_used(dataset, monkeypatch):
    """The first one waited for the whole dataset: 20 minutes for 1.2 TB, which a preemption before it would lose."""
    from diffscale.data.format import checksums

    read = []
    original = checksums.file_sha256
    monkeypatch.setattr(checksums, "file_sha256", lambda path: read.append(path) or original(path))
    damage(dataset.local_path(2), "flipped")
    opened = open_dataset(dataset.path)
    with Loader(opened, seed=0, global_batch=4, stop=24, order="blocks", window=1) as loader:
        list(loader)
        loader.wait_verified(everything=False)
        assert len(read) == 1
        assert dataset.local_path(2) not in read
        with pytest.raises(ShardError, match="train-00002"):
            loader.wait_verified()


def test_an_error_in_the_background_reaches_the_reader(dataset):
    loader = Loader(dataset, seed=0, global_batch=24, stop=2400, prefetch=1, verify=False)
    batches = iter(loader)
    next(batches)
    damage(dataset.local_path(1), "missing")
    with pytest.raises(ShardError, match="train-00001"):
        list(batches)


def test_closing_ends_the_threads(dataset):
    before = threading.active_count()
    for _ in range(5):
        loader = Loader(dataset, seed=0, global_batch=24, verify=False)
        next(iter(loader))
        loader.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
