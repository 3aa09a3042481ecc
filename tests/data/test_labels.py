"""CSV files of labels: which columns are meant, and one message for each that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffscale.core.errors import UserError
from diffscale.data.build.labels import read_labels
from diffscale.data.build.layout import Misplaced
from tests.data.test_understood import PNG, listed
from tests.support.sources import write_folder


def labels_of(tmp_path: Path, text: str | bytes, column: str | None = None) -> dict[str, str] | None:
    (tmp_path / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_labels(str(tmp_path / "labels.csv"), column).labels


EXPECTED = {"0.png": "cat", "1.png": "dog"}


@pytest.mark.parametrize(
    "text",
    [
        "0.png,cat\n1.png,dog\n",
        "file,label\n0.png,cat\n1.png,dog\n",
        "label,file\ncat,0.png\ndog,1.png\n",
        "filename,species\n0.png,cat\n1.png,dog\n",
        "File Name,Class\r\n0.png,cat\r\n1.png,dog\r\n",
        "filename;label\n0.png;cat\n1.png;dog\n",
        "filename\tlabel\n0.png\tcat\n1.png\tdog\n",
        "\ufefffile,label\n0.png,cat\n1.png,dog\n",
        "file,width,height,label\n0.png,32,32,cat\n1.png,32,32,dog\n",
        "filename,split,label\n0.png,train,cat\n1.png,train,dog\n",
        "id,filename,category\n7,0.png,cat\n8,1.png,dog\n",
        'file,label\n"0.png","cat"\n\n./1.png, dog \n',
        "file,label\n0.png,cat\n0.png,cat\n1.png,dog",
    ],
)
def test_the_columns_are_found_by_their_names(tmp_path, text):
    assert labels_of(tmp_path, text) == EXPECTED


def test_the_column_of_labels_can_be_named(tmp_path):
    text = "file,breed,label,Label Two\n0.png,x,cat,a\n1.png,y,dog,b\n"
    assert labels_of(tmp_path, text, "breed") == {"0.png": "x", "1.png": "y"}
    assert labels_of(tmp_path, text, "label two") == {"0.png": "a", "1.png": "b"}
    with pytest.raises(UserError, match="file, breed, label, Label Two"):
        labels_of(tmp_path, text, "nothing")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("file,label,class\n0.png,cat,1\n", "several columns are named label, class or the like (label, class)"),
        ("file,label,label\n0.png,cat,1\n", "--label-column"),
        ("file,width,height\n0.png,32,32\n", "--label-column NAME"),
        ("0.png,train,cat\n", "a first line with the names of the columns"),
        ("a,b,label\n1,2,cat\n", "one column of files"),
        ('file,label\n"0.png,cat\n' + "1.png,dog\n" * 20000, "line 2"),
        ('file,label\n"0.png,cat\n1.png,dog\n', "every quote is closed"),
        ("file,label\n0.png,cat,small\n", "line 2 has 3"),
        ("file,label\n0.png\n", "line 2 has 1"),
        ("file,label\n0.png,cat\n0.png,dog\n", "0.png has two, in line 2 and line 3"),
        ("file,split,label\n0.png,train,cat\n1.png,other,cat\n", "names of splits"),
        ("file,label\n,cat\n", "a file in every line"),
        ("file\n0.png\n", "two columns"),
        ("", "empty"),
        (b"file,label\n0.png,caf\xe9\n", "UTF-8"),
        ("file,label\n0.png,cat\n".encode("utf-16"), "UTF-8"),
    ],
)
def test_a_csv_with_two_readings_or_none_is_one_message(tmp_path, text, named):
    with pytest.raises(UserError) as error:
        labels_of(tmp_path, text)
    assert named in error.value.text()
    assert len(error.value.text()) < 1500


@pytest.mark.parametrize("what", ["a folder", "nothing"])
def test_a_folder_or_nothing_as_csv_is_one_message(tmp_path, what):
    with pytest.raises(UserError, match="--labels"):
        read_labels(str(tmp_path if what == "a folder" else tmp_path / "none.csv"))


def test_a_column_of_splits_holds_images_out(tmp_path):
    source = write_folder(tmp_path, {f"{i}.png": PNG[i] for i in range(4)})
    rows = ["0.png,train,cat", "1.png,Train,dog", "2.png,val,cat", "3.png,train,dog"]
    (tmp_path / "split.csv").write_text("\n".join(["filename,split,label", *rows]))
    found, _ = listed(source, labels=str(tmp_path / "split.csv"))
    assert found == {
        "0.png": ("train", "cat"),
        "1.png": ("train", "dog"),
        "2.png": ("heldout", "cat"),
        "3.png": ("train", "dog"),
    }


def test_a_split_that_is_not_that_of_the_folder_is_refused(tmp_path):
    source = write_folder(tmp_path, {"train/0.png": PNG[0], "train/1.png": PNG[1]})
    (tmp_path / "split.csv").write_text("file,split,label\n0.png,train,cat\n1.png,val,cat\n")
    with pytest.raises(UserError, match=r"1\.png is in a folder of train"):
        listed(source, labels=str(tmp_path / "split.csv"))


def test_entries_are_paths_names_or_names_without_extension(tmp_path):
    source = write_folder(tmp_path, {f"a/{i}.png": PNG[i] for i in range(4)} | {"b/x.png": PNG[5]})
    (tmp_path / "l.csv").write_text("id,breed\na\\0.png,x\n./a/1.png,y\n2.png,z\n3,w\n9.png,v\n")
    found, opened = listed(source, labels=str(tmp_path / "l.csv"))
    assert {name: label for name, (_, label) in found.items()} == {
        "a/0.png": "x",
        "a/1.png": "y",
        "a/2.png": "z",
        "a/3.png": "w",
    }
    assert opened.refused == [("b/x.png", "it is not in the list of labels")]
    assert any("1 files of that list are not in the source (9.png)" in note for note in opened.notes)


def test_a_name_that_stands_for_two_files_is_refused(tmp_path):
    source = write_folder(tmp_path, {"a/0.png": PNG[0], "b/0.png": PNG[1]})
    (tmp_path / "l.csv").write_text("file,label\n0.png,cat\n")
    with pytest.raises(UserError, match=r"a/0\.png and b/0\.png"):
        listed(source, labels=str(tmp_path / "l.csv"))


def test_a_list_that_names_no_file_of_the_source_shows_one_of_each(tmp_path):
    source = write_folder(tmp_path, {"0.png": PNG[0]})
    (tmp_path / "l.csv").write_text("file,label\nimages/00.png,cat\n")
    with pytest.raises(UserError, match=r"it has images/00\.png, and .* has 0\.png"):
        listed(source, labels=str(tmp_path / "l.csv"))


def test_a_file_without_a_label_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\n0.png,\n")
    with pytest.raises(Misplaced, match="no label"):
        read_labels(str(tmp_path / "labels.csv")).find(("0.png",), None)
