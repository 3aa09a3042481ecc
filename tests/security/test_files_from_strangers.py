"""Every format that diffscale reads, with a malicious or damaged file: no code runs, and the error is one screen."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffscale.config import load as cli
from diffscale.core.errors import UserError
from diffscale.evaluation.metrics.statistics import load_moments
from diffscale.evaluation.networks.weights import read_safetensors
from diffscale.records import store as records


def test_the_trap_would_be_noticed(tmp_path, trap, mark):
    """The other tests mean something only if this one creates the mark."""
    pickle.loads(pickle.dumps(trap))
    assert mark.exists()
    mark.rmdir()


# ---- records, settings


def write(path, content: bytes | str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04.",
        b"[" * 100_000,
        b'{"schema_version": 1e999}',
        b'{"schema_version": 1, "class": "os.system"}',
        b"\xff\xfe",
        b"null",
        b'"x"',
        b"{" * 10_000,
    ],
)
def test_a_damaged_record_is_named(tmp_path, content):
    with pytest.raises(UserError) as error:
        records.read_record(write(tmp_path / "records" / "a.json", content))
    assert "a.json" in str(error.value)


def test_a_pickled_record_is_refused(tmp_path, trap):
    with pytest.raises(UserError):
        records.read_record(write(tmp_path / "records" / "a.json", pickle.dumps(trap)))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [MARK]",
        "name: !!python/object/new:os.mkdir [MARK]",
        "name: !!python/name:os.system",
        "model: {name: !!python/object/apply:os.mkdir [MARK]}",
    ],
)
def test_yaml_tags_make_no_objects(tmp_path, mark, text):
    with pytest.raises(UserError):
        cli.load_tree(write(tmp_path / "settings.yaml", text.replace("MARK", str(mark))))


@pytest.mark.parametrize(
    "text",
    [
        "name: ${oc.env:DIFFSCALE_TEST_SECRET}",
        "name: ${oc.decode:1}${oc.env:DIFFSCALE_TEST_SECRET}",
        "a: ${oc.create:{b: 1}}\nname: ${oc.env:DIFFSCALE_TEST_SECRET,none}",
    ],
)
def test_settings_cannot_read_the_environment(tmp_path, monkeypatch, text):
    """Settings are saved with checkpoints and in records: a secret must not get into them."""
    monkeypatch.setenv("DIFFSCALE_TEST_SECRET", "hunter2")
    with pytest.raises(UserError) as error:
        cli.load_tree(write(tmp_path / "settings.yaml", text))
    assert "hunter2" not in str(error.value)


def test_a_billion_laughs_is_refused_or_small(tmp_path):
    """Ten levels of ten-fold aliases would be 10^10 nodes when expanded."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UserError):
        cli.load_experiment(write(tmp_path / "laughs.yaml", "\n".join(lines)))


# ---- arrays and weights


def npz(path, **members: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_reference_statistics_with_pickled_arrays_are_refused(tmp_path, trap):
    path = npz(tmp_path / "ref.npz", mu=npy(np.array([trap], dtype=object)), sigma=npy(np.eye(1)))
    with pytest.raises(UserError):
        load_moments(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04."])
def test_damaged_statistics_are_named(tmp_path, content):
    path = tmp_path / "ref.npz"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_moments(path)
    assert "ref.npz" in str(error.value)


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 99)], ids=["encrypted", "unknown compression"])
def test_statistics_in_an_archive_that_cannot_be_unpacked_are_named(tmp_path, offset, value):
    """Found by fuzzing: zipfile raises RuntimeError and NotImplementedError for these two fields of its directory."""
    path = tmp_path / "ref.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + offset] = value
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        load_moments(path)
    assert "ref.npz" in str(error.value)


def test_a_pickled_checkpoint_of_weights_is_never_opened(tmp_path, trap):
    path = tmp_path / "model.pt"
    torch.save({"weights": trap}, path)
    with pytest.raises(UserError):
        read_safetensors(path)
    path.rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError):
        read_safetensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"{}" * 10,
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99999999]}}',
        b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}',
        b"\x80\x04.",
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(UserError):
        read_safetensors(path)


def test_nothing_in_the_package_unpickles():
    """Every call that could unpickle is either absent or says that it does not."""
    import ast
    from pathlib import Path

    import diffscale

    dangerous = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    package = Path(diffscale.__file__).parent
    restricted = package / "interchange" / "pickles.py"  # its reader has a list of names: see the next test
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported = {a.name.split(".")[0] for a in node.names} & dangerous
                assert not imported or (path == restricted and imported == {"pickle"}), path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in dangerous, path
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in ("torch.load",):
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
            if name in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle") == "False", f"{path}:{node.lineno}"
            if name in ("pd.read_pickle", "pandas.read_pickle", "eval", "exec", "yaml.load", "yaml.unsafe_load"):
                raise AssertionError(f"{path}:{node.lineno} calls {name}")
            assert name not in ("Tuner.restore", "tune.Tuner.restore"), f"{path}:{node.lineno} calls {name}"
            if name.endswith(".extractall"):
                assert keywords.get("filter") == "'data'", f"{path}:{node.lineno} calls {name}"


def test_the_one_reader_of_pickles_decides_itself_what_every_name_means() -> None:
    """pickle is used as the base of a reader that overrides the look-up of names, and in no other way."""
    import ast
    from pathlib import Path

    from diffscale.interchange import pickles

    tree = ast.parse(Path(pickles.__file__).read_text())
    uses = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert [use for use in uses if use.startswith("pickle.")] == ["pickle.Unpickler"]
    (reader,) = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases)
    ]
    assert {"find_class", "persistent_load"} <= {f.name for f in reader.body if isinstance(f, ast.FunctionDef)}


# ---- images


def bomb_png(width: int, height: int) -> bytes:
    """A valid PNG of a few hundred kilobytes at most that claims width x height pixels."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def folder_with(tmp_path, data: bytes):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "b.png").write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "data", [bomb_png(100_000, 100_000), bomb_png(13_000, 13_000), b"", b"\x89PNG\r\n\x1a\n", b"GIF89a"]
)
def test_image_bombs_and_damaged_images_in_a_folder_are_named(tmp_path, data):
    from diffscale.evaluation.image_sources import open_images

    def read() -> None:
        source = open_images(str(folder_with(tmp_path, data)), tmp_path / "work")
        source.images(0, source.n)

    with pytest.raises(UserError) as error:
        read()
    assert "b.png" in str(error.value)


def test_a_folder_archive_with_pickled_or_wrong_arrays_is_refused(tmp_path, trap):
    from diffscale.evaluation.image_sources import open_images

    for array in (np.array([trap], dtype=object), np.zeros(3), np.zeros((2, 4, 4, 3))):
        with pytest.raises(UserError):
            open_images(str(npz(tmp_path / "samples.npz", arr_0=npy(array))), tmp_path / "work")
    (tmp_path / "samples.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(UserError):
        open_images(str(tmp_path / "samples.npz"), tmp_path / "work")


# ---- secrets


def test_a_storage_uri_with_credentials_is_refused():
    """It would stand in every record and in the run's settings."""
    with pytest.raises(UserError) as error:
        cli.load_experiment("quickstart-unet", ["storage=s3://KEY:hunter2@bucket/runs"])
    assert "hunter2" not in str(error.value)


def test_json_of_settings_holds_no_environment(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    experiment = cli.load_experiment("quickstart-unet", ["storage=/tmp/x"])
    assert "hunter2" not in json.dumps(experiment.dotted())
