"""YOLO's layout: read, registered, trained on. broken.py has the cases that are refused."""

import json
import re
from pathlib import Path

import check_dataset
import convert_dataset
import pytest
import torch
from conftest import ROOT, TINY, make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

import atss.engine.run as way_in
from atss.data.datasets import register
from atss.engine.evaluation import build_evaluator, build_test_loader
from atss.labels.formats import read_labels
from atss.labels.yolo import read_yolo
from atss_runner.images import SUFFIXES

WIDTH, HEIGHT = 100, 50
# The box [40, 15, 20, 10].
BOX = "0 0.5 0.4 0.2 0.2"
YAML = "{train: train/images, names: [cat, dog]}"


@pytest.fixture
def data(tmp_path):
    """data({name: text}) writes files, with pixels for an image, and returns the yaml."""

    def write(files, yaml=YAML):
        for name, text in {**files, "data.yaml": yaml}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() in SUFFIXES:
                Image.new("RGB", (WIDTH, HEIGHT)).save(path)
            else:
                path.write_bytes(text.encode())
        return str(tmp_path / "data.yaml")

    return write


@pytest.fixture
def registered():
    """register; the data sets are removed after the test."""
    names = set(DatasetCatalog.list())
    yield register
    for name in set(DatasetCatalog.list()) - names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def one(label):
    """Files of one image."""
    return {"train/images/a.png": "", "train/labels/a.txt": label}


def boxes_of(yaml_file, split="train"):
    return [(a["category_id"], a["bbox"]) for a in read_yolo(yaml_file, split)[0]["annotations"]]


def files_of(yaml_file, split="train"):
    return [image["file_name"] for image in read_yolo(yaml_file, split)[0]["images"]]


def kinds_of(yaml_file):
    return {f.kind: f for f in read_yolo(yaml_file, "train")[1]}


# ------------------------------------------------------------------------------------------------
# The yaml
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[cat, dog]", {0: "cat", 1: "dog"}),
        ("{0: cat, 1: dog}", {0: "cat", 1: "dog"}),
        ("{7: dog, 0: cat, 10: cow}", {0: "cat", 7: "dog", 10: "cow"}),
        ("{'0': cat, '1': dog}", {0: "cat", 1: "dog"}),
        ("[7, 8]", {0: "7", 1: "8"}),
    ],
)
def test_class_names(data, names, expected):
    content, _ = read_yolo(data(one(BOX), f"{{train: train, names: {names}}}"), "train")
    assert {c["id"]: c["name"] for c in content["categories"]} == expected
    assert list(expected) == [c["id"] for c in content["categories"]]


@pytest.mark.parametrize("key", ["val", "valid", "validation"])
@pytest.mark.parametrize("split", ["val", "valid", "validation"])
def test_validation_split_has_three_names(data, key, split):
    yaml_file = data(one(BOX), f"{{train: nowhere, {key}: train/images, names: [cat]}}")
    assert files_of(yaml_file, split) == ["train/images/a.png"]


def test_the_given_name_of_a_split_comes_first(data):
    files = one(BOX) | {"b/images/b.png": "", "b/labels/b.txt": ""}
    yaml_file = data(files, "{val: train, valid: b, extra: b, names: [cat]}")
    assert files_of(yaml_file, "valid") == files_of(yaml_file, "extra") == ["b/images/b.png"]


def test_missing_split_lists_the_choices(data):
    yaml = "{path: ., nc: 1, names: [cat], download: a, train: t, val: v, test: }"
    yaml_file = data({}, yaml)
    for split in ("test", "names", "download"):
        sentence = f"{yaml_file}: it has no split {split!r}: choose from ['train', 'val']"
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            read_yolo(yaml_file, split)
    with pytest.raises(ValueError, match=r"no split 'train': choose from \[\]"):
        read_yolo(data({}, "names: [cat]"), "train")


# ------------------------------------------------------------------------------------------------
# Where images and labels lie
# ------------------------------------------------------------------------------------------------


def test_images_are_found_in_subfolders_and_in_any_case(data):
    names = ("b/z.png", "b/c/A.JPG", "a.jpg")
    files = {f"train/images/{name}": "" for name in names}
    files |= {
        "train/images/notes.txt": "",
        "train/images/.hidden.png": "",
        "train/labels/a.txt": "",
    }
    assert files_of(data(files)) == [f"train/images/{n}" for n in ("a.jpg", "b/c/A.JPG", "b/z.png")]


def test_lines_of_lists_are_relative_to_list_or_path(data, tmp_path):
    files = {f"set/images/{name}.png": "" for name in "abcd"}
    files |= {"set/labels/a.txt": BOX, "set/sub/e.png": "", "set/e.png": ""}
    lines = [
        "\ufeff./e.png",
        "",
        "images/b.png",
        f"{tmp_path}/set/images/a.png",
        " ./../images/c.png ",
    ]
    yaml_file = data(
        files | {"set/sub/list.txt": "\r\n".join(lines)},
        "{path: set, train: sub/list.txt, names: [cat]}",
    )
    expected = [*(f"set/images/{name}.png" for name in "abc"), "set/sub/e.png"]
    assert files_of(yaml_file) == expected


def test_an_image_of_several_entries_is_read_once(data):
    files = {f"train/images/{name}.png": "" for name in "ba"} | {"train/labels/b.txt": BOX}
    files |= {"list.txt": "./train/images/../images/a.png\n./train/images/a.png"}
    yaml_file = data(files, "{train: [list.txt, train/images, ./train/], names: [cat]}")
    assert files_of(yaml_file) == ["train/images/a.png", "train/images/b.png"]


@pytest.mark.parametrize(
    "yaml",
    [
        "{path: ., train: train/images}",
        "{path: ../{here}, train: train}",
        "{path: {root}, train: train}",
        "{train: '{root}/train'}",
        "{train: ../train/images}",
        "{path: /nowhere/of/a/colleague, train: train/images}",
    ],
)
def test_folders_are_found_with_wrong_paths(data, tmp_path, yaml):
    yaml = yaml.replace("{here}", tmp_path.name).replace("{root}", str(tmp_path))
    yaml_file = data(one(BOX), yaml.replace("}", ", names: [cat]}"))
    assert files_of(yaml_file) == ["train/images/a.png"]


def test_path_is_relative_to_the_yaml_first(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"set/train/a.png": "", "set/train/a.txt": "", "here/set/train/b.png": ""}
    data(
        files
        | {"here/set/train/b.txt": "", "here/data.yaml": "{path: set, train: train, names: [cat]}"}
    )
    assert files_of("here/data.yaml") == ["set/train/b.png"]
    (tmp_path / "here/set").rename(tmp_path / "here/moved")
    assert files_of("here/data.yaml") == [f"{tmp_path}/set/train/a.png"]


def test_missing_folder_lists_the_places_tried(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yaml_file = data(one(BOX), "{path: set, train: ../gone, names: [cat]}")
    tried = [f"{tmp_path}/gone", f"{tmp_path}/set/gone", f"{tmp_path.parent}/gone"]
    sentence = f"'../gone' of 'train' does not exist; tried {', '.join(tried)}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_yolo(yaml_file, "train")


@pytest.mark.parametrize("suffix", [".ppm", ".pgm", ".tga", ".jpe", ".qoi", ".j2k", ".PNG"])
def test_images_of_other_formats(data, suffix):
    files = {f"train/images/a{suffix}": "", "train/labels/a.txt": BOX}
    content, findings = read_yolo(data(files), "train")
    assert (len(content["images"]), len(content["annotations"]), findings) == (1, 1, [])


def test_a_cyclic_link_is_followed_once(data, tmp_path):
    yaml_file = data(one(BOX))
    (tmp_path / "train/images/latest").symlink_to(tmp_path / "train/images")
    assert files_of(yaml_file) == ["train/images/a.png"]


def test_a_name_too_long_for_a_file_is_reported(data):
    yaml_file = data(one(BOX) | {"list.txt": "x" * 300}, "{train: list.txt, names: [cat]}")
    assert kinds_of(yaml_file).keys() == {"file_unreadable"}


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/train/a.png", "labels/train/a.txt"),
        ("images/train/a.png", "images/train/a.txt"),
        ("images/x/images/a.b.png", "images/x/labels/a.b.txt"),
        ("myimages/a.png", "myimages/a.txt"),
        ("pictures/a.png", "pictures/a.txt"),
    ],
)
def test_label_folders(data, image, label):
    yaml = f"{{train: {image.rpartition('/')[0]}, names: [cat]}}"
    assert boxes_of(data({image: "", label: BOX}, yaml)) == [(0, [40, 15, 20, 10])]


def test_captions_beside_images_are_ignored(data):
    """If some labels are in a labels folder. Equal labels may differ in blanks."""
    files = {"images/a.png": "", "images/a.txt": "a cat", "labels/a.txt": BOX}
    files |= {"images/b.png": "", "images/b.txt": "nothing here"}
    files |= {"images/c.png": "", "images/c.txt": f"{BOX} \n", "labels/c.txt": BOX}
    content, findings = read_yolo(data(files, "{train: images, names: [cat]}"), "train")
    assert [a["image_id"] for a in content["annotations"]] == [1, 3]
    assert {f.kind: f.examples() for f in findings} == {
        "label_missing": ["images/b.png"],
        "file_unused": ["images/a.txt", "images/b.txt"],
    }


def test_no_label_file_at_all_is_refused(data, tmp_path):
    files = {"images/a.png": "", "images/b.png": "", "annotations/a.txt": BOX}
    sentence = (
        "data.yaml: no image of 'train' has a label file: tried labels/a.txt and images/a.txt for "
        "images/a.png"
    )
    with pytest.raises(ValueError, match=f"{re.escape(sentence)}$"):
        read_yolo(data(files, "{train: images, names: [cat]}"), "train")


def test_images_without_objects_are_kept(data):
    files = one(BOX) | {"train/images/b.png": "", "train/images/c.png": ""}
    content, findings = read_yolo(data(files | {"train/labels/c.txt": ""}), "train")
    assert [image["file_name"][-5] for image in content["images"]] == ["a", "b", "c"]
    assert [a["image_id"] for a in content["annotations"]] == [1]
    assert [(f.kind, f.examples()) for f in findings] == [("label_missing", ["train/images/b.png"])]


def test_labels_without_an_image_and_other_texts(data):
    """A label without an image is an error; a list of names is not a label."""
    files = {"b/gone.txt": f"\n{BOX}", "empty.txt": "", "words.txt": "7\n8", "notes.json": "{}"}
    files |= {"classes.txt": "cat", ".cache": "", "list.txt": "a b c d e"}
    files = {f"train/labels/{name}": text for name, text in files.items()}
    kinds = kinds_of(data(one(BOX) | files | {"train/images/a.xcf": ""}))
    assert kinds["file_unreadable"].examples() == ["no image for train/labels/b/gone.txt"]
    unused = ["images/a.xcf", *(f"labels/{x}" for x in ("empty.txt", "list.txt", "notes.json"))]
    assert kinds["file_unused"].examples() == [f"train/{x}" for x in [*unused, "labels/words.txt"]]
    assert len(kinds) == 2


def test_files_that_a_list_does_not_name_are_ignored(data):
    files = one(BOX) | {"train/images/a.jpg": "", "train/labels/gone.txt": BOX, "list.txt": ""}
    yaml_file = data(files | {"list.txt": "train/images/a.png"}, "{train: list.txt, names: [cat]}")
    assert files_of(yaml_file) == ["train/images/a.png"]
    assert kinds_of(yaml_file) == {}


@pytest.mark.parametrize("label", ["train/labels/a.txt", "train/images/a.txt"])
def test_one_label_of_two_images_is_ambiguous(data, label):
    """Unless it has no objects; two equal labels of one image are accepted."""
    files = {"train/images/a.png": "", "train/images/a.jpg": "", "train/images/b.png": ""}
    files |= {"train/images/b.txt": BOX, "train/labels/b.txt": BOX}
    both = f"{label}: train/images/a.jpg or train/images/a.png"
    assert kinds_of(data(files | {label: BOX}))["label_ambiguous"].examples() == [both]
    assert kinds_of(data(files | {label: "\n"})) == {}


# ------------------------------------------------------------------------------------------------
# Lines
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (BOX, (0, [40, 15, 20, 10])),
        ("1.0 0.5 0.4 2e-1 .2", (1, [40, 15, 20, 10])),
        ("0 0.1 0.2 0.5 0.6 0.3 0.9", (0, [10, 10, 40, 35])),
        ("0 0.5 0.2 0.7 0.4 0.5 0.6 0.3 0.4", (0, [30, 10, 40, 20])),
        # Corners are clipped, not the centre and the size.
        ("0 0.05 0.5 0.2 1.2", (0, [0, 0, 15, 50])),
        ("0 1.1 1.0 0.4 0.2", (0, [90, 45, 10, 5])),
        ("0 -0.1 -0.1 0.5 1.2 1.3 0.5", (0, [0, 0, 100, 50])),
    ],
)
def test_box_of_a_line(data, line, expected):
    assert boxes_of(data(one(line))) == [expected]


@pytest.mark.parametrize("shape", [[2, 2], [2, 3], [3, 2], [1, 2]])
def test_declared_key_points_are_ignored(data, shape):
    """They may be NaN. A box may have none."""
    points = " nan" * (shape[0] * shape[1])
    yaml = f"{{train: train, kpt_shape: {shape}, names: [cat]}}"
    assert boxes_of(data(one(f"{BOX}{points}\n{BOX}"), yaml)) == [(0, [40, 15, 20, 10])] * 2
    assert "label_malformed" in kinds_of(data(one(f"{BOX}{points} 1 1"), yaml))


@pytest.mark.parametrize("shape", ["[17]", "[0, 3]", "[17, 4]", "{a: 1}", "['17', 3]", "[true, 2]"])
def test_invalid_kpt_shape_is_refused(data, shape):
    yaml_file = data(one(BOX), f"{{train: train, kpt_shape: {shape}, names: [cat]}}")
    with pytest.raises(ValueError, match=r"'kpt_shape' must be \[number of key points, 2 or 3\]"):
        read_yolo(yaml_file, "train")


def test_boxes_and_polygons_in_a_file_from_windows(data):
    """With a byte-order mark, blank lines and carriage returns."""
    polygon = "1 0.1 0.2 0.5 0.6 0.3 0.9"
    content, _ = read_yolo(data(one(f"\ufeff{BOX}\r\n\r\n  \r\n{polygon}\r\n{BOX}")), "train")
    first, second, third = content["annotations"]
    assert first == {
        "id": 1,
        "image_id": 1,
        "category_id": 0,
        "bbox": [40, 15, 20, 10],
        "area": 200,
        "iscrowd": 0,
        "label_line": 1,
    }
    assert (second["category_id"], second["bbox"]) == (1, [10, 10, 40, 35])
    assert (third["id"], third["bbox"], third["label_line"]) == (3, first["bbox"], 5)


def test_only_boxes_more_than_a_pixel_outside_are_reported(data):
    near, far = "0 0.95 0.5 0.110 0.2", "0 0.95 0.5 0.130 0.2"
    kinds = kinds_of(data(one(f"{near}\n{far}")))
    assert kinds["box_partly_outside"].examples() == ["train/labels/a.txt line 2"]


def test_coordinates_far_outside_are_in_pixels(data):
    near, far = "0 0.5 0.5 2.0 2.0", "0 0.5 0.5 2.1 1.0"
    assert "label_units" not in kinds_of(data(one(near)))
    assert kinds_of(data(one(far)))["label_units"].examples() == [
        "train/labels/a.txt line 1, 0.5 0.5 2.1 1.0"
    ]


def test_all_malformed_lines_are_reported_together(data):
    files = one(f"{BOX}\n0 1 2\n0 1 2\n7 0.5 0.4 0.2 0.2")
    files |= {"train/images/b.png": "", "train/labels/b.txt": "0 1 2\n0 1 2\n8 .1 .1 .1 .1"}
    with pytest.raises(ValueError, match=r"data\.yaml has invalid labels") as error:
        register(f"broken={data(files)}:train")
    assert "(4): train/labels/a.txt line 2 has 3 numbers, " in str(error.value)
    assert "train/labels/b.txt line 1 has" in str(error.value)
    assert str(error.value).endswith(", and 1 more")
    assert "broken" not in DatasetCatalog
    unknown = kinds_of(data(files))["label_class_unknown"].examples()
    assert unknown == ["train/labels/a.txt line 4, class 7", "train/labels/b.txt line 3, class 8"]


def test_boxes_are_relative_to_the_rotated_image(data, tmp_path):
    yaml_file = data(one(BOX))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "train/images/a.png", "JPEG", exif=exif)
    content, _ = read_yolo(yaml_file, "train")
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (50, 100)
    assert content["annotations"][0]["bbox"] == [20, 30, 10, 20]


# ------------------------------------------------------------------------------------------------
# Exports of labelling tools
# ------------------------------------------------------------------------------------------------

CVAT = {
    "obj.data": "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\n"
    "names = data/obj.names\nbackup = backup/\n",
    "obj.names": "cat\ndog\n",
    "train.txt": "data/obj_train_data/a.png\n",
    "valid.txt": "data/obj_valid_data/b.png\n",
    "obj_train_data/a.png": "",
    "obj_train_data/a.txt": BOX,
    "obj_valid_data/b.png": "",
    "obj_valid_data/b.txt": BOX,
}
LABEL_STUDIO = {
    "classes.txt": "cat\ndog",
    "notes.json": "{}",
    "images/a.png": "",
    "labels/a.txt": BOX,
}
LABEL_IMG = {
    "train/a.png": "",
    "train/a.txt": BOX,
    "train/classes.txt": "cat\ndog\n",
    "valid/b.png": "",
    "valid/b.txt": BOX,
    "valid/classes.txt": "\ufeffcat\r\n",
}
ROBOFLOW = {
    "train/a.png": "",
    "train/a.txt": BOX,
    "train/_darknet.labels": "cat\ndog\n",
    "README.roboflow.txt": "Roboflow",
    "README.dataset.txt": "0 1",
}
ULTRALYTICS = {
    "classes.txt": "cat\ndog",
    "images/train/a.png": "",
    "labels/train/a.txt": BOX,
    "labels/train.cache": "",
}


@pytest.mark.parametrize(
    ("files", "source", "split", "expected"),
    [
        (CVAT, "obj.data", "train", "obj_train_data/a.png"),
        (CVAT, "obj.data", "val", "obj_valid_data/b.png"),
        (CVAT, ".", "validation", "obj_valid_data/b.png"),
        (CVAT, ".", "obj_train_data", "obj_train_data/a.png"),
        (LABEL_STUDIO, ".", "images", "images/a.png"),
        (LABEL_IMG, ".", "train", "train/a.png"),
        (LABEL_IMG, ".", "val", "valid/b.png"),
        (LABEL_IMG, "train", ".", "a.png"),
        (ROBOFLOW, ".", "train", "train/a.png"),
        (ULTRALYTICS, ".", "train", "images/train/a.png"),
    ],
)
def test_exports_without_a_yaml_are_read(data, tmp_path, files, source, split, expected):
    data(files)
    (tmp_path / "data.yaml").unlink()
    labels = read_labels(str(tmp_path / source), split)
    assert [image["file_name"] for image in labels.content["images"]] == [expected]
    assert [a["bbox"] for a in labels.content["annotations"]] == [[40, 15, 20, 10]]
    assert labels.content["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    assert labels.findings == []
    assert (Path(labels.image_dir) / expected).is_file()


@pytest.mark.parametrize(
    ("files", "source", "split", "sentence"),
    [
        (CVAT | {"obj.data": "train = train.txt"}, "obj.data", "train", "it has no 'names'"),
        (
            CVAT | {"obj.names": "cat"},
            "obj.data",
            "train",
            "'classes' is 2, but data/obj.names has 1",
        ),
        (CVAT | {"obj.names": " \n"}, "obj.data", "train", "'classes' is 2, but"),
        (CVAT, "obj.data", "test", "no split 'test': choose from ['train', 'valid']"),
        (
            CVAT | {"obj.data": "names = x.names"},
            "obj.data",
            "train",
            "'x.names' of 'names' does not exist",
        ),
        (LABEL_STUDIO, ".", "train", "it has no split 'train'; tried"),
        (LABEL_STUDIO | {"classes.txt": " \n"}, ".", ".", "'names' is empty"),
        (
            LABEL_IMG | {"valid/classes.txt": "dog\n"},
            ".",
            "train",
            "valid/classes.txt and train/classes.txt have different class names",
        ),
        (one(BOX), ".", "train", "and none of classes.txt, obj.names, _darknet.labels of YOLO's"),
    ],
)
def test_invalid_exports_are_refused(data, tmp_path, files, source, split, sentence):
    data(files)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_labels(str(tmp_path / source), split)


@pytest.mark.parametrize("line", ["data/images/a.png", r"images\a.png", r".\images\a.png"])
def test_lines_of_lists_from_cvat_and_windows(data, line):
    files = {"images/a.png": "", "labels/a.txt": BOX, "train.txt": line}
    yaml_file = data(files, "{path: ./, train: train.txt, names: {0: cat}}")
    assert files_of(yaml_file) == ["images/a.png"]


def test_a_backslash_in_a_file_name_is_kept(data):
    files = {r"images\a.png": "", r"images\a.txt": BOX, "images/a.png": ""}
    yaml_file = data(files | {"train.txt": r"images\a.png"}, "{train: train.txt, names: [cat]}")
    assert files_of(yaml_file) == [r"images\a.png"]


@pytest.mark.parametrize(
    ("folder", "train"),
    [(r"c:\Dev\set", ".\\images\\"), (r"set\deep", "images"), ("", r"..\images")],
)
def test_folders_from_windows(data, folder, train):
    inside = "set/deep/" if "deep" in folder else ""
    files = {f"{inside}images/a.png": "", f"{inside}labels/a.txt": BOX}
    yaml_file = data(files, json.dumps({"path": folder, "train": train, "names": ["cat"]}))
    assert files_of(yaml_file) == [f"{inside}images/a.png"]


# ------------------------------------------------------------------------------------------------
# Registered
# ------------------------------------------------------------------------------------------------


def three_images(data):
    """Images with two objects, none and one; class ids have a gap."""
    files = {f"train/images/{name}.png": "" for name in "abc"}
    files |= {
        "train/labels/a.txt": f"{BOX}\n5 0.2 0.5 0.1 0.4",
        "train/labels/c.txt": "9 .6 .5 .3 .9",
    }
    return data(files, "{train: train, names: {9: cow, 5: dog, 0: cat}}")


def test_records_of_a_registered_set(data, registered, tmp_path):
    name = registered(f"pets={three_images(data)}:train")
    a, b, c = DatasetCatalog.get(name)
    assert a["file_name"] == str(tmp_path / "train/images/a.png")
    assert (a["width"], a["height"], a["image_id"]) == (WIDTH, HEIGHT, 1)
    assert a["annotations"][1] == {
        "bbox": [15, 15, 10, 20],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 1,
        "iscrowd": 0,
    }
    assert b["annotations"] == []
    assert c["annotations"][0]["category_id"] == 2
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog", "cow"]
    assert metadata.to_learn > 0
    assert list(metadata.remarks) == ["label_missing"]
    a["annotations"].clear()
    assert len(DatasetCatalog.get(name)[0]["annotations"]) == 2


def test_relative_paths_start_in_the_working_directory(data, registered, tmp_path, monkeypatch):
    three_images(data)
    monkeypatch.chdir(tmp_path)
    registered("pets=data.yaml:train")
    assert DatasetCatalog.get("pets")[0]["file_name"] == "train/images/a.png"


def test_a_name_is_registered_once(data, registered):
    yaml_file = three_images(data)
    for _ in range(2):
        assert registered(f"pets={yaml_file}:train") == "pets"
    with pytest.raises(ValueError, match="a data set called pets is registered already"):
        registered(f"pets={yaml_file}:val")


def ground_truth(record):
    """The objects as detections."""
    instances = Instances((record["height"], record["width"]))
    boxes = [
        BoxMode.convert(a["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        for a in record["annotations"]
    ]
    instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.scores = torch.ones(len(boxes))
    instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]]).long()
    return {"instances": instances}


def evaluate(name, output_dir):
    cfg = make_cfg("OUTPUT_DIR", str(output_dir), "DATALOADER.NUM_WORKERS", 0)
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    records = DatasetCatalog.get(name)
    evaluator.process(records, [ground_truth(r) for r in records])
    return evaluator, evaluator.evaluate()["bbox"]


def test_ground_truth_has_an_ap_of_100(data, registered, tmp_path):
    """Results of an earlier run in the folder are ignored; images without objects count."""
    old = tmp_path / "out/inference/pets/pets_coco_format.json"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    registered(f"pets={three_images(data)}:train")
    evaluator, result = evaluate("pets", tmp_path / "out")
    assert result["AP"] == pytest.approx(100)
    assert result["AP-dog"] == pytest.approx(100)
    assert len(evaluator.truth.image_numbers) == 3
    written = json.loads((old.parent / "coco_instances_results.json").read_text())
    assert [r["category_id"] for r in written] == [0, 5, 9]  # the yaml's
    loader = build_test_loader(make_cfg("DATALOADER.NUM_WORKERS", 0), "pets")
    assert sum(len(batch) for batch in loader) == 3


def test_training_and_evaluation(data, registered, tmp_path):
    register_train = f"--register=pets={three_images(data)}:train"
    options = {
        "DATASETS.TRAIN": ("pets",),
        "DATASETS.TEST": ("pets",),
        "MODEL.WEIGHTS": "",
        **TINY | {"DATALOADER.NUM_WORKERS": 0},
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 2,
        "MODEL.ATSS.SCORE_THRESH_TEST": 0.0,
        "OUTPUT_DIR": tmp_path / "out",
    }

    def run(*arguments, **opts):
        flat = [str(x) for item in (options | opts).items() for x in item]
        config = str(ROOT / "configs/ATSS_R_18_FPN_small.yaml")
        argv = ["--config-file", config, register_train, *arguments, *flat]
        args = way_in.make_parser().parse_args(argv)
        return way_in.run(args, way_in.prepare(args))

    run()
    config = (tmp_path / "out/config.yaml").read_text()
    assert re.search(r"CLASS_NAMES:\s+- cat\s+- dog\s+- cow\n", config)
    log = (tmp_path / "out/log.txt").read_text()
    assert (
        "Data set pets has images without a label file, used as images without objects (1)" in log
    )
    results = run("--eval-only", **{"MODEL.WEIGHTS": tmp_path / "out/model_final.pth"})
    assert set(results["bbox"]) >= {"AP", "AP-cat", "AP-dog", "AP-cow"}


# ------------------------------------------------------------------------------------------------
# Real data
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "images", "objects"), [("train", 448, 3324), ("val", 127, 909), ("test", 63, 584)]
)
def test_aquarium_is_read(real_data, split, images, objects):
    content, findings = read_yolo(str(real_data / "aquarium/data.yaml"), split)
    assert (len(content["images"]), len(content["annotations"])) == (images, objects)
    names = [c["name"] for c in content["categories"]]
    assert names == ["fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray"]
    assert not findings
    if split == "val":
        image = next(i for i in content["images"] if i["file_name"] == "valid/images/IMG_2277.jpg")
        boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]]
        assert (image["width"], image["height"]) == (480, 640)
        # By hand from 0.578125 0.392578 0.072917 0.253906 and 0.190755 0.102051 0.381510 0.170898.
        assert boxes[0] == pytest.approx([260, 170, 35, 162.5], abs=1e-3)
        assert boxes[1] == pytest.approx([0, 10.62528, 183.1248, 109.37472], abs=1e-3)


def test_aquarium_is_checked(real_data, tmp_path, capsys):
    report = tmp_path / "report.json"
    argv = [str(real_data / "aquarium/data.yaml"), "test", "--json", str(report)]
    assert check_dataset.main(argv) == 0
    content = json.loads(report.read_text())
    assert (content["images"], content["annotations"]) == (63, 584)
    assert {f["kind"]: f["count"] for f in content["findings"]}["box_empty"] == 2
    assert "63 images, 584 annotations" in capsys.readouterr().out


def test_the_check_names_the_line_of_a_label(data, tmp_path, capsys):
    """Not in a json, whose annotations have ids."""
    source = data(one(f"1 0.1 0.1 0.1 0.1\n\n{BOX}\n{BOX}")) + ":train"
    check_dataset.main([source, "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    (twice,) = (x for x in report["findings"] if x["kind"] == "object_twice")
    assert twice["where"] == ["a.txt, line 4, bbox [40.0, 15.0, 20.0, 10.0]"]
    convert_dataset.main([source, "--output", str(tmp_path / "all.json")])
    annotations = json.loads((tmp_path / "all.json").read_text())["annotations"]
    assert len(annotations) == 3
    assert not any("label_line" in x for x in annotations)
