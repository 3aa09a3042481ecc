"""A dataset folder that a stranger made: Arrow files that lie about themselves, or would run code when read."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pytest

from diffscale.core.errors import UserError
from diffscale.data.build.build import BuildOptions, build
from diffscale.data.format.open import open_dataset
from diffscale.data.format.shard import make_batch, write_shard
from tests.support.crafted import ROWS, arrow_file, crafted, make_dataset, pixels_batch, read_everything
from tests.support.datasets import pictures, png
from tests.support.sources import add_file


def test_the_unharmed_dataset_is_read(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    read_everything(make_dataset(folder, write_shard(str(folder), "train-00000.arrow", pixels_batch())))


@pytest.mark.parametrize(
    "file", ["../../etc/passwd.arrow", "/etc/passwd.arrow", "a/b.arrow", ".hidden.arrow", "x.arrow\n"]
)
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path, file):
    path = make_dataset(tmp_path / "data", crafted(tmp_path / "data", arrow_file(pixels_batch())))
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = file
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        open_dataset(path)


@pytest.mark.parametrize("column", ["image", "label", "name"])
@pytest.mark.parametrize(
    "extension",
    [
        "ray.data.arrow_pickled_object",
        "ray.data.arrow_tensor_v2",
        "ray.data.arrow_variable_shaped_tensor",
        "arrow.py_extension_type",
    ],
)
def test_columns_of_python_objects_are_refused(tmp_path, trap, column, extension):
    """Ray Data registers Arrow types that unpickle; a worker may have it imported."""
    import ray.data.extensions  # noqa: F401

    good = pixels_batch()
    fields, arrays = [], []
    for field, array in zip(good.schema, good.columns, strict=True):
        if field.name == column:
            metadata = {"ARROW:extension:name": extension, "ARROW:extension:metadata": pickle.dumps(trap)}
            field = pa.field(column, pa.large_binary(), metadata=metadata)
            array = pa.array([pickle.dumps(trap)] * ROWS, pa.large_binary())
        fields.append(field)
        arrays.append(array)
    sink = io.BytesIO()
    batch = pa.RecordBatch.from_arrays(arrays, names=good.schema.names)
    schema = pa.schema([pa.field(f.name, a.type, metadata=f.metadata) for f, a in zip(fields, arrays, strict=True)])
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
    path = make_dataset(tmp_path / "data", crafted(tmp_path / "data", sink.getvalue()))
    with pytest.raises(UserError):
        read_everything(path)


def lying_offsets(offsets: list[int]) -> bytes:
    """A shard of encoded images whose offsets were overwritten after it was made."""
    data = arrow_file(make_batch([b"x" * 21, b"x" * 21, b"x" * 22], [0] * ROWS, ["a", "b", "c"]))
    true = np.array([0, 21, 42, 64], np.int64).tobytes()
    assert data.count(true) == 1
    return data.replace(true, np.array(offsets, np.int64).tobytes())


@pytest.mark.parametrize(
    "offsets", [[0, 10, 2**40, 2**41], [0, -(2**40), 5, 6], [0, 10, 5, 64], [2**60, 2**61, 2**62, 2**62 + 1]]
)
def test_offsets_outside_the_file_are_an_error_and_not_a_crash(tmp_path, offsets):
    """Runs in a separate process: an unchecked offset is a segmentation fault."""
    path = make_dataset(tmp_path / "data", crafted(tmp_path / "data", lying_offsets(offsets)), layout="encoded")
    code = (
        "import sys, numpy as np\n"
        "from diffscale.data.format.open import open_dataset\n"
        "from diffscale.core.errors import UserError\n"
        "try:\n"
        "    d = open_dataset(sys.argv[1]); d.gather(np.arange(d.n))\n"
        "except UserError as e:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-500:]}"
    assert done.stdout.strip() == "refused"


@pytest.mark.parametrize("choice", [None, "pyd"])
def test_members_of_a_tar_are_not_unpickled(tmp_path, trap, choice):
    """The library `webdataset` unpickles .pyd, .pickle and .pth."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(4):
            add_file(archive, f"{i}.png", png(pictures(4)[i]))
            for suffix in ("pyd", "pickle", "pkl", "pth"):
                add_file(archive, f"{i}.{suffix}", pickle.dumps(trap))
            add_file(archive, f"{i}.cls", b"0")
    options = BuildOptions(str(tmp_path / "a.tar"), str(tmp_path / "out"), (8,), workers=0, label_column=choice)
    try:
        build(options, show=False)
    except UserError:
        assert choice is not None


def test_an_image_that_claims_to_be_huge_is_refused(tmp_path):
    from tests.security.test_files_from_strangers import bomb_png

    bombs = [bomb_png(60_000, 60_000)] * ROWS
    batch = make_batch(bombs, [0] * ROWS, ["a", "b", "c"])
    path = make_dataset(tmp_path / "data", crafted(tmp_path / "data", arrow_file(batch)), layout="encoded")
    with pytest.raises(UserError) as error:
        read_everything(path)
    assert "train-00000.arrow" in str(error.value)
