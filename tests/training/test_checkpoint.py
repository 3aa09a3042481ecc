from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data import Dataset
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint import saver as saving
from diffscale.training.checkpoint.restore import restore
from diffscale.training.checkpoint.tensors import CheckpointDamaged, read_group, write_group

from .small import BATCH, experiment
from .test_learner import batches, learner, steps, weights

STATE: dict[str, Any] = {"record": {}, "data": {"resolution": 8, "channels": 3, "num_classes": 10}}


def save(of: Any, folder: Path, finished: Any = lambda _: None) -> str:
    settings = ck.save_settings(of.experiment)
    saver = saving.Saver(str(folder), 0, 1, "test", settings, finished)
    saver.save(saving.snapshot(of, STATE, 0))
    saver.wait()
    return ck.folder_of(str(folder), of.images_seen)


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "adan", "sgd"])
def test_resume_is_bit_identical(shared_storage: Path, dataset: Dataset, tmp_path: Path, name: str) -> None:
    data = batches(dataset, 6)
    optim = {"name": name, "lr": 1e-3}
    straight, first = (learner(shared_storage, dataset, optim=optim) for _ in range(2))
    steps(straight, data)
    steps(first, data[:3])
    place = save(first, tmp_path)
    second = learner(shared_storage, dataset, optim=optim, train={"seed": 1})
    second.experiment = first.experiment
    restore(second, place)
    assert second.images_seen == 3 * BATCH
    steps(second, data[3:])
    assert torch.equal(weights(second), weights(straight))
    for key, average in straight.ema.averages.items():
        assert all(torch.equal(average[n], second.ema.averages[key][n]) for n in average), key


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    shared_storage: Path, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of = learner(shared_storage, dataset)
    places = []
    for batch in batches(dataset, 3):
        of.step(batch)
        places.append(save(of, tmp_path))
    file = Path(places[2]) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (Path(places[1]) / "ema" / "halflife.safetensors").unlink()
    assert ck.newest_good(str(tmp_path)) == places[0]
    assert places[2] in caplog.text
    assert places[1] in caplog.text


@pytest.mark.parametrize("cut", ["state.json", "model.safetensors", "COMPLETE", "optimizer/state.safetensors"])
def test_any_truncated_file_is_noticed(shared_storage: Path, dataset: Dataset, tmp_path: Path, cut: str) -> None:
    place = Path(save(learner(shared_storage, dataset), tmp_path))
    with open(place / cut, "r+b") as file:
        file.truncate((place / cut).stat().st_size // 2)
    with pytest.raises(CheckpointDamaged, match=cut):
        ck.verify(str(place))


def test_a_folder_without_the_mark_does_not_exist(shared_storage: Path, dataset: Dataset, tmp_path: Path) -> None:
    place = Path(save(learner(shared_storage, dataset), tmp_path))
    (place / ck.COMPLETE).unlink()
    assert ck.list_checkpoints(str(tmp_path)) == []
    save(learner(shared_storage, dataset), tmp_path)
    assert len(ck.list_checkpoints(str(tmp_path))) == 1


def test_a_full_disk_is_retried_then_stops_without_touching_earlier_checkpoints(
    shared_storage: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real full file system where this machine allows a mount; else a file-size limit gives the same OSError."""
    import resource
    import signal

    monkeypatch.setattr(saving, "RETRY_SECONDS", (0.01, 0.01))
    of = learner(shared_storage, dataset)
    first = save(of, tmp_path)
    of.step(batches(dataset, 1)[0])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(saving.StorageFailed, match=f"{errno.EFBIG}|large"):
            save(of, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ck.list_checkpoints(str(tmp_path)) == [first]
    ck.verify(first)
    assert not os.path.exists(ck.folder_of(str(tmp_path), of.images_seen))


def test_rotation_keeps_the_newest_whole_and_the_points_weights(
    shared_storage: Path, dataset: Dataset, tmp_path: Path
) -> None:
    of = learner(shared_storage, dataset)
    for batch in batches(dataset, 4):
        of.step(batch)
        save(of, tmp_path)
    ck.rotate(str(tmp_path), ck.RetentionPolicy(whole={4 * BATCH}, weights={2 * BATCH}, averages=False))
    assert [ck.images_of(c) for c in ck.list_checkpoints(str(tmp_path))] == [2 * BATCH, 4 * BATCH]
    thin = ck.folder_of(str(tmp_path), 2 * BATCH)
    ck.verify(thin)
    assert not any(n.startswith("optimizer") for n in ck.files_of(thin))
    assert ck.newest_good(str(tmp_path), until=3 * BATCH) is None
    assert ck.newest_good(str(tmp_path), for_resuming=False, until=3 * BATCH) == thin


def test_a_checkpoint_that_is_thinned_while_it_is_read_is_not_damaged(
    shared_storage: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training rotates checkpoints while a separate evaluation task reads them."""
    place = save(learner(shared_storage, dataset), tmp_path)
    digest_of = ck.digest_of

    def rotated_first(uri: str) -> Any:
        ck.rotate(str(tmp_path), ck.RetentionPolicy(whole=set(), weights={0}, averages=False))
        return digest_of(uri)

    monkeypatch.setattr(ck, "digest_of", rotated_first)
    ck.verify(place)
    assert not any(name.startswith("optimizer") for name in ck.files_of(place))


def test_post_hoc_averages_come_from_thinned_checkpoints(
    shared_storage: Path, dataset: Dataset, tmp_path: Path
) -> None:
    from diffscale.training.posthoc_ema import make

    of = learner(shared_storage, dataset)
    for batch in batches(dataset, 4):
        of.step(batch)
        save(of, tmp_path)
    ck.rotate(str(tmp_path), ck.RetentionPolicy(whole={4 * BATCH}, weights=set(), averages=True))
    assert len(ck.list_checkpoints(str(tmp_path))) == 4
    place, residuals = make(str(tmp_path), [0.07, 0.1])
    ck.verify(place)
    assert residuals[0.1] == pytest.approx(0, abs=1e-6)
    assert residuals[0.07] < 0.1
    made = read_group(place, "ema/std0.070")
    for name, low in of.ema.averages["std0.050"].items():
        high = of.ema.averages["std0.100"][name]
        assert made[name].shape == low.shape == high.shape
    with pytest.raises(UserError, match="above 0"):
        make(str(tmp_path), [0.5])


def test_weights_for_sampling(shared_storage: Path, dataset: Dataset, tmp_path: Path) -> None:
    of = learner(shared_storage, dataset)
    steps(of, batches(dataset, 2))
    place = save(of, tmp_path)
    classes = STATE | {"data": {"resolution": 8, "channels": 3, "num_classes": dataset.num_classes}}
    assert classes
    tensors = ck.read_weights(place, "0.05")
    average = of.ema.averages["std0.050"]
    assert all(torch.equal(tensors[n], average[n]) for n in average)
    with pytest.raises(UserError, match="halflife"):
        ck.read_weights(place, "0.2")


def test_slices_of_any_world_size_are_one_tensor(tmp_path: Path) -> None:
    from diffscale.training.checkpoint.state import Slice

    whole = {"w": torch.randn(7, 3), "b": torch.randn(2), "n": torch.tensor(5, dtype=torch.int64)}
    for rank in range(3):
        rows = whole["w"][rank * 3 : rank * 3 + 3]
        mine = {"w": rows, "b": whole["b"], "n": whole["n"]}
        write_group(str(tmp_path), "optimizer/state", mine, {"w": Slice(rank * 3, 7)}, rank, 3)
    assert len(list((tmp_path / "optimizer").iterdir())) == 3
    found = read_group(str(tmp_path), "optimizer/state")
    assert all(torch.equal(found[n], whole[n]) for n in whole)
    for first, last in [(0, 7), (2, 5), (4, 4), (6, 7)]:
        found = read_group(
            str(tmp_path), "optimizer/state", lambda n, _, rows=(first, last): rows if n == "w" else None
        )
        assert torch.equal(found["w"], whole["w"][first:last])
        assert torch.equal(found["b"], whole["b"])


def test_the_same_tensors_in_another_order_are_the_same_file(tmp_path: Path) -> None:
    """Restored optimizer state is in the order of its file: a resumed run's last checkpoint had other bytes."""
    from diffscale.training.checkpoint.state import Slice

    tensors = {"b": torch.ones(2), "a": torch.zeros(2)}
    for name, of in (("one", tensors), ("other", dict(reversed(tensors.items())))):
        write_group(str(tmp_path / name), "state", of, dict.fromkeys(of, Slice(0, 4)), 0, 2)
    one, other = (next((tmp_path / name).iterdir()).read_bytes() for name in ("one", "other"))
    assert one == other


def test_a_rank_reads_its_rows_of_a_remote_file_and_no_others(tmp_path: Path, bucket: str) -> None:
    from diffscale.training.checkpoint import tensors as tensor_files

    whole = {"w": torch.randn(1000, 1000), "n": torch.tensor(5, dtype=torch.int64), "empty": torch.zeros(0, 4)}
    write_group(bucket, "slices/model", whole, {}, 0, 1)
    fetched = 0

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file, self.size = file, file.size

        def read_at(self, count: int, offset: int) -> bytes:
            nonlocal fetched
            fetched += count
            return self.file.read_at(count, offset)

    with tensor_files._reader(f"{bucket}/slices/model.safetensors") as remote:
        counted = tensor_files._Remote(Counting(remote.file))
        assert torch.equal(counted.get_slice("w")[250:500], whole["w"][250:500])
    assert 250 * 1000 * 4 < fetched < 251 * 1000 * 4
    found = read_group(bucket, "slices/model", lambda n, _: (250, 500) if n == "w" else None)
    assert torch.equal(found["w"], whole["w"][250:500])
    assert found["n"] == 5
    assert found["empty"].shape == (0, 4)


def test_files_are_what_safetensors_reads_and_writes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "bf16": torch.randn(3, 2).bfloat16(),
        "f64": torch.randn(2).double(),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.randn(4, 3).t(),
    }
    write_group(str(tmp_path), "model", tensors, {}, 0, 1)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)


def test_checkpoints_on_s3_are_saved_verified_rotated_and_resumed(
    shared_storage: Path, dataset: Dataset, bucket: str
) -> None:
    data = batches(dataset, 4)
    of = learner(shared_storage, dataset)
    places = []
    for batch in data[:2]:
        of.step(batch)
        places.append(save(of, bucket))  # type: ignore[arg-type]
    assert ck.list_checkpoints(bucket) == places
    uri = storage.join(places[1], "model.safetensors")
    good = storage.read_bytes(uri)
    storage.write_bytes(uri, good[:-1] + b"x")
    assert ck.newest_good(bucket) == places[0]
    storage.write_bytes(uri, good)
    other = learner(shared_storage, dataset)
    restore(other, str(ck.newest_good(bucket)))
    steps(of, data[2:])
    steps(other, data[2:])
    assert torch.equal(weights(of), weights(other))
    ck.rotate(bucket, ck.RetentionPolicy(whole={2 * BATCH}, weights=set(), averages=False))
    assert ck.list_checkpoints(bucket) == places[1:]


def test_an_unreachable_store_is_retried_then_stops_without_touching_earlier_checkpoints(
    shared_storage: Path, dataset: Dataset, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, of = f"{bucket}/unreachable", learner(shared_storage, dataset)
    first = save(of, place)  # type: ignore[arg-type]
    of.step(batches(dataset, 1)[0])
    monkeypatch.setattr(saving, "RETRY_SECONDS", (0.01,))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
        with pytest.raises(saving.StorageFailed, match="connect"):
            save(of, place)  # type: ignore[arg-type]
    assert ck.list_checkpoints(place) == [first]
    ck.verify(first)
    second = save(of, place)  # type: ignore[arg-type]
    assert ck.newest_good(place) == second


def test_settings_are_saved_in_every_checkpoint(shared_storage: Path, dataset: Dataset, tmp_path: Path) -> None:
    place = save(learner(shared_storage, dataset), tmp_path)
    assert ck.read_experiment(place) == experiment(shared_storage)
