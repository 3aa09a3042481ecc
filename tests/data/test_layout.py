"""What folders mean: splits and classes from the paths of a tree alone, or one question where there are two readings.

A tree is written as paths with the number of images in each folder. The expected values are what a person who knows
the layout would say; the layouts are those of public datasets and of reports on other tools.
"""

from __future__ import annotations

import pytest

from diffscale.core.errors import UserError
from diffscale.data.build.items import Reading
from diffscale.data.build.layout import Misplaced, find_layout
from diffscale.data.build.tree import class_names
from diffscale.data.format.split_names import read_split_names, split_of


def read(tree: str, labelled: bool = False, **choices: str) -> dict[str, str]:
    """Return {folder: "split class"} of a tree whose folders are divided by spaces; / is the source itself."""
    counts = {tuple(part for part in folder.split("/") if part): 4 for folder in tree.split()}
    layout = find_layout(counts, "/source", Reading(**choices), labelled)
    found = {}
    for folder in counts:
        try:
            split, label = layout.place(folder)
            found["/".join(folder)] = f"{split or '-'} {label or '-'}"
        except Misplaced:
            found["/".join(folder)] = "none"
    return found


PLAIN = {
    "no folders": ("/", "- -"),
    "classes": ("cat dog", "- cat|- dog"),
    "one class": ("cat", "- cat"),
    "one class in parts": ("cat cat/more", "- cat|- cat"),
    "parts of classes": ("cat/1 cat/2 dog/1", "- cat|- cat|- dog"),
    "a folder around classes": ("photos/cat photos/dog", "- cat|- dog"),
    "two folders around classes": ("a/photos/cat a/photos/dog", "- cat|- dog"),
    "one split": ("train/cat train/dog", "train cat|train dog"),
    "splits of classes": ("train/cat train/dog val/cat", "train cat|train dog|heldout cat"),
    "splits without classes": ("train test", "train -|heldout -"),
    "three splits": ("train/cat valid/cat test/cat", "train cat|heldout cat|heldout cat"),
    "capitals": ("Train/cat TEST/cat", "train cat|heldout cat"),
    "long names": ("training/cat Validation/cat", "train cat|heldout cat"),
    "years": ("train2017/cat val2017/cat", "train cat|heldout cat"),
    "sets": ("training_set/cat test_set/cat", "train cat|heldout cat"),
    "held out": ("train/cat held-out/cat", "train cat|heldout cat"),
    "evaluation": ("train/cat eval/cat dev/cat", "train cat|heldout cat|heldout cat"),
    "a folder around splits": ("data/train/cat data/val/cat", "train cat|heldout cat"),
    "folders around in splits": ("train/images/cat val/images/cat", "train cat|heldout cat"),
    "a split in itself": ("train/train/cat test/test/cat", "train cat|heldout cat"),
    "a split in itself without classes": ("train/train test/test", "train -|heldout -"),
    "classes of splits": ("cat/train cat/val dog/train dog/val", "train cat|heldout cat|train dog|heldout dog"),
    "classes of splits inside": ("x/cat/train x/dog/train x/dog/test", "train cat|train dog|heldout dog"),
    "one image next to classes": ("/ cat dog bird", "none|- cat|- dog|- bird"),
    "one image next to splits": ("/ train/a train/b val/a", "none|train a|train b|heldout a"),
    "an unlabelled split": ("train/cat train/dog test", "train cat|train dog|none"),
    "names with a word of a split in them": ("train_station trainers tests", "- train_station|- trainers|- tests"),
    "a class of trains inside": ("vehicles/train vehicles/bus animals/cat", "- vehicles|- vehicles|- animals"),
}


@pytest.mark.parametrize("tree", PLAIN)
def test_a_layout_with_one_reading_is_found(tree):
    folders, expected = PLAIN[tree]
    assert "|".join(read(folders).values()) == expected


TWO = {
    "other images next to splits": ("train/cat val/cat annotations/cat", "annotations"),
    "unlabelled images next to splits": ("train/cat test/cat unlabeled", "--split-names heldout=test,train=train"),
    "a class named train": ("train bus car", "--split-names none"),
    "a class named valid": ("valid invalid", "--split-names none"),
    "test images next to classes": ("cat dog test", "--split-names"),
    "held-out images alone": ("val/cat val/dog", "train=val"),
    "test images in one class": ("cat cat/test dog", "--folders class/split"),
    "words of splits in longer names": ("ILSVRC_img_train/cat ILSVRC_img_val/cat", "heldout=ILSVRC_img_val"),
    "splits at two levels": ("train/train train/val", "two levels"),
    "splits deep inside": ("a/x/train a/x/val b/x/train", "--folders"),
    "classes or kinds of defects": ("bottle/train/good bottle/test/bad cable/train/good", "--folders"),
    "pairs": ("images/a masks/a", "--folders images/class"),
    "images and folders in one folder": ("photos photos/cat photos/dog", "--folders"),
    "half of the images next to classes": ("/ cat", "next to"),
}


@pytest.mark.parametrize("tree", TWO)
def test_a_layout_with_two_readings_is_one_question(tree):
    folders, named = TWO[tree]
    with pytest.raises(UserError) as error:
        read(folders)
    assert named in error.value.text()
    assert "expected: one reading of its folders" in error.value.text()
    assert error.value.fix


@pytest.mark.parametrize(
    ("folders", "choices", "expected"),
    [
        ("train bus car", {"split_names": "none"}, "- train|- bus|- car"),
        ("train/cat val/cat annotations/cat", {"split_names": "train=train,heldout=val"}, "train cat|heldout cat|none"),
        ("a/cat b/cat c/cat", {"split_names": "train=a,train=b,heldout=c"}, "train cat|train cat|heldout cat"),
        ("x/mine/cat x/other/cat", {"split_names": "train=mine,heldout=other"}, "train cat|heldout cat"),
        ("cat/mine dog/mine dog/other", {"split_names": "train=mine,heldout=other"}, "train cat|train dog|heldout dog"),
        ("val/cat val/dog", {"split_names": "train=val"}, "train cat|train dog"),
        ("images/a images/b masks/a", {"folders": "images/class"}, "- a|- b|none"),
        ("images/train/a images/val/a masks/train/a", {"folders": "images/split/class"}, "train a|heldout a|none"),
        ("animals/cat vehicles/bus", {"folders": "*/class"}, "- cat|- bus"),
        ("00000 01000", {"folders": "*"}, "- -|- -"),
        ("/ cat", {"folders": "*"}, "- -|- -"),
        ("bottle/train/good bottle/test/bad", {"folders": "*/split/class"}, "train good|heldout bad"),
        ("bottle/train/good bottle/test/bad", {"folders": "class/split"}, "train bottle|heldout bottle"),
        ("a/x b/x", {"folders": "split/class", "split_names": "train=a,heldout=b"}, "train x|heldout x"),
    ],
)
def test_a_choice_decides(folders, choices, expected):
    assert "|".join(read(folders, **choices).values()) == expected


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"split_names": "train=nothing"}, "train, val"),
        ({"split_names": "heldout=val"}, "no name is for train"),
        ({"split_names": "train"}, "train=NAME"),
        ({"split_names": "test=val"}, "neither"),
        ({"split_names": "train=a,heldout=a"}, "both"),
        ({"folders": "split/split"}, "once"),
        ({"folders": "a//b"}, "levels"),
        ({"folders": "*/*/*/class"}, "4 levels"),
        ({"folders": "*/split"}, "--split-names"),
        ({"folders": "photos/class"}, "train, val"),
    ],
)
def test_a_choice_that_does_not_fit_says_what_is_there(choices, named):
    with pytest.raises(UserError) as error:
        read("train/cat val/cat", **choices)
    assert named in error.value.text()


def test_a_list_of_labels_leaves_only_the_splits_to_the_folders():
    assert read("train/00000 val/00000", labelled=True) == {"train/00000": "train -", "val/00000": "heldout -"}
    assert read("00000 00001", labelled=True) == {"00000": "- -", "00001": "- -"}
    for tree in ("/ more", "photos photos/cat photos/dog", "images/a masks/a"):
        assert set(read(tree, labelled=True).values()) == {"- -"}
    assert read("a/train/x a/test/y", labelled=True) == {"a/train/x": "train -", "a/test/y": "heldout -"}
    with pytest.raises(UserError, match="--split-names"):
        read("a b test", labelled=True)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"1990", "2005"}, ["1990", "2005"]),
        ({"1", "2", "3"}, ["1", "2", "3"]),
        ({"2", "01", "1"}, ["01", "1", "2"]),
        ({"10", "9", "0"}, ["0", "9", "10"]),
        ({"-1", "1"}, ["-1", "1"]),
        ({"1", "cat"}, ["1", "cat"]),
        ({"²", "1"}, ["1", "²"]),
        ({"9" * 5000, "1"}, ["1", "9" * 5000]),
        ({None}, []),
    ],
)
def test_numbers_as_labels_are_names_in_the_order_of_their_values(labels, expected):
    """There are as many classes as labels, whatever their values; 01 and 1 are two, in an order that hashes not."""
    assert class_names(labels) == expected


def test_names_of_splits_are_words_and_nothing_else():
    heldout = ["val", "Valid", "VALIDATION", "dev", "test", "testing", "eval", "heldout", "held_out", "hold-out"]
    assert {split_of(name) for name in [*heldout, "val2017", "test_images", "img_val", "testset"]} == {"heldout"}
    assert {split_of(name) for name in ["train", "Training", "train-512", "trainset", "images_train"]} == {"train"}
    assert {split_of(name) for name in ["cat", "images", "2017", "", "trained", "latest", "train_cat"]} == {None}
    assert read_split_names(" none ") == {}
    assert read_split_names(None) is None
