"""Containers of weights: what they hold is read, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffscale.core.errors import UserError
from diffscale.interchange.containers import read_source

from .authors import LAYOUTS, NVIDIA, module_tree, tensors_of

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Attack:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def nvidia_file(path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> Path:
    """Pickle as NVIDIA's code does, whose modules exist only meanwhile."""
    with monkeypatch.context() as patch:
        for name, module in NVIDIA.items():
            patch.setitem(sys.modules, name, module)
        path.write_bytes(pickle.dumps(content))
    return path


def test_each_container_gives_its_tensors(tmp_path: Path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    torch.save(TENSORS, tmp_path / "a.pt")
    torch.save({"ema": TENSORS, "model": {}, "args": Namespace(lr=1), "step": 3}, tmp_path / "b.pt")
    for name, container in (("a.safetensors", "safetensors"), ("a.pt", "torch"), ("b.pt", "torch")):
        source = read_source(tmp_path / name, ("ema", "model"))
        assert (source.container, len(source.sha256)) == (container, 64)
        assert source.tensors.keys() == TENSORS.keys()
        assert all(torch.equal(source.tensors[key], TENSORS[key]) for key in TENSORS)


def test_nvidias_pickle_gives_its_tensors_without_its_source_code(tmp_path: Path, monkeypatch):
    tensors = tensors_of(LAYOUTS["edm-ddpmpp"])
    content = {"ema": module_tree(tensors), "dataset_kwargs": NVIDIA["dnnlib.util"].EasyDict(path="x")}
    source = read_source(nvidia_file(tmp_path / "edm.pkl", monkeypatch, content), ())
    assert source.container == "pickle"
    assert list(source.tensors) == list(tensors)
    assert all(torch.equal(source.tensors[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("where", ["next to it", "inside", "as state"])
def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, monkeypatch, where: str):
    attack, target = Attack(tmp_path / "made"), tmp_path / "edm.pkl"
    network = module_tree(TENSORS)
    if where == "inside":
        network.state["_modules"]["bad"] = attack
    content: Any = {"ema": network, "loss_fn": attack} if where == "next to it" else {"ema": network}
    if where == "as state":
        content = {"ema": attack}
    nvidia_file(target, monkeypatch, content)
    with pytest.raises(UserError, match=r"names (posix|nt)\.mkdir"):
        read_source(target, ())
    assert not (tmp_path / "made").exists()


def test_names_that_lead_to_other_functions_are_refused(tmp_path: Path, monkeypatch):
    """Protocol 0 names globals in text: a dotted name and a builtin reach no further."""
    for text in (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", b"\x80\x02cbuiltins\neval\n(S'1'\ntR."):
        (tmp_path / "a.pkl").write_bytes(text)
        with pytest.raises(UserError, match="is not opened"):
            read_source(tmp_path / "a.pkl", ())


def test_a_torch_file_that_would_run_something_is_refused(tmp_path: Path):
    torch.save({"ema": Attack(tmp_path / "made")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="FILE"):
        read_source(tmp_path / "a.pt", ("ema",))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\x80\x04", b"PK\x03\x04nothing", b"\xff" * 8 + b"{}"])
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(UserError, match="undamaged file of weights"):
        read_source(tmp_path / "a.bin", ())


def test_a_cut_file_and_a_missing_one_are_refused(tmp_path: Path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    torch.save(TENSORS, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="undamaged"):
            read_source(tmp_path / name, ())
    with pytest.raises(UserError, match="No such file"):
        read_source(tmp_path / "none.pt", ())
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("readme", "no weights")
    with pytest.raises(UserError, match="undamaged"):
        read_source(tmp_path / "z.pt", ())


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path, monkeypatch):
    view = torch.zeros(4).as_strided((2,), (1,))
    content = {"ema": module_tree({"a.b": view})}
    path = nvidia_file(tmp_path / "edm.pkl", monkeypatch, content)
    data = path.read_bytes().replace(b"K\x02\x85", b"K\x63\x85", 1)  # size (2,) becomes (99,)
    path.write_bytes(data)
    with pytest.raises(UserError, match="outside of its storage"):
        read_source(path, ())
