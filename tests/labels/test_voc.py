"""Folders of Pascal VOC's xml: read, and equal to the other formats. What is refused: broken.py."""

import json
from pathlib import Path

import broken
import numpy as np
import pytest
from PIL import Image

from atss.labels.folders import VALIDATION
from atss.labels.formats import read_labels
from atss.labels.voc import read_voc

WIDTH, HEIGHT = 100, 50


def xml(*objects, name="", size=f"<width>{WIDTH}</width><height>{HEIGHT}</height>"):
    filename = f"<filename>{name}</filename>" if name else ""
    return f"<annotation>{filename}<size>{size}</size>{''.join(objects)}</annotation>"


def box(*corners, name="cat", more=""):
    keys = ("xmin", "ymin", "xmax", "ymax")
    inside = "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, corners, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{inside}</bndbox></object>"


@pytest.fixture
def data(tmp_path):
    """Writes files: data({name: text}), where the text of an image may be empty; gives the
    folder."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() in (".png", ".jpg"):
                Image.new("RGB", (WIDTH, HEIGHT)).save(path)
            else:
                path.write_text(text)
        return str(tmp_path)

    return write


def files_of(folder, split):
    return [image["file_name"] for image in read_voc(folder, split)[0]["images"]]


def boxes_of(folder, split=".", **options):
    return [a["bbox"] for a in read_voc(folder, split, **options)[0]["annotations"]]


def kinds_of(folder, split="."):
    return {f.kind: f.examples() for f in read_voc(folder, split)[1]}


ONE = {"a.png": ""}

# ------------------------------------------------------------------------------------------------
# Splits
# ------------------------------------------------------------------------------------------------


def devkit(*names):
    files = {f"JPEGImages/{name}.jpg": "" for name in names}
    files |= {f"SegmentationClass/{name}.png": "" for name in names}
    return files | {f"Annotations/{name}.xml": xml(box(1, 1, 9, 9)) for name in names}


@pytest.mark.parametrize(
    "content",
    [
        "b\nd\n",
        "b -1\nd  1",
        "b.jpg\nd.jpg",
        "JPEGImages/b.jpg\n\n d\r\nd",
        "\ufeffb\nd",
        "Annotations/b.xml 0\nd 1",
        r"JPEGImages\b.jpg" "\n" r"Annotations\d.xml 1",
    ],
)
@pytest.mark.parametrize("list_file", ["ImageSets/Main/train.txt", "train.txt"])
def test_a_list_names_a_split(data, list_file, content):
    folder = data(devkit(*"abcd") | {list_file: content})
    assert files_of(folder, "train") == ["JPEGImages/b.jpg", "JPEGImages/d.jpg"]
    assert kinds_of(folder, "train") == {}


def test_a_list_of_another_name_lies_in_the_folder(data, tmp_path, monkeypatch):
    """Not where the command was given, where another may lie."""
    folder = data(devkit(*"ab") | {"lists/x.txt": "a", "elsewhere/lists/x.txt": "b"})
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert files_of(folder, "lists/x.txt") == ["JPEGImages/a.jpg"]


def test_names_that_end_like_marks(data):
    files = {f"{name}.png": "" for name in ("img 1", "img", "x1", "y 01")}
    files |= {f"{name}.xml": xml(box(1, 1, 9, 9)) for name in ("img 1", "img", "x1", "y 01")}
    folder = data(files | {"train.txt": "img 1\nx1\ny 01"})
    assert files_of(folder, "train") == ["img 1.png", "x1.png", "y 01.png"]


@pytest.mark.parametrize("there", ["val", "valid", "validation"])
@pytest.mark.parametrize("asked", ["val", "valid", "validation"])
def test_the_validation_split_by_any_of_its_names(data, tmp_path, there, asked):
    folder = data({f"{there}/a.jpg": "", f"{there}/a.xml": xml(), "b.jpg": "", "b.xml": xml()})
    assert files_of(folder, asked) == [f"{there}/a.jpg"]
    data({f"ImageSets/Main/{there}.txt": "b"})
    assert files_of(folder, asked) == ["b.jpg"]


def test_a_split_that_is_asked_for_by_its_own_name(data):
    folder = data(
        {f"{x}/{x}.jpg": "" for x in VALIDATION} | {f"{x}/{x}.xml": xml() for x in VALIDATION}
    )
    assert [files_of(folder, x) for x in VALIDATION] == [[f"{x}/{x}.jpg"] for x in VALIDATION]
    with pytest.raises(ValueError, match="it has no split 'test'; tried"):
        read_voc(folder, "test")


def test_a_file_with_a_backslash_in_its_name(data):
    folder = data({r"x\b.jpg": "", r"x\b.xml": xml(), "train.txt": r"x\b.jpg"})
    assert files_of(folder, "train") == [r"x\b.jpg"]


def test_a_folder_with_xml_is_pascal_vocs(data):
    """Whatever lists of classes it has besides: labelImg writes both formats into one folder."""
    files = {"a.png": "", "a.xml": xml(box(11, 21, 30, 40)), "a.txt": "0 .5 .5 .1 .1"}
    labels = read_labels(data(files | {"classes.txt": "dog"}), ".")
    assert [a["bbox"] for a in labels.content["annotations"]] == [[10, 20, 20, 20]]


def test_masks_are_no_images(data):
    folder = data(devkit(*"ab") | {"JPEGImages/c.jpg": ""})
    names = ["JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c.jpg"]
    assert files_of(folder, ".") == names
    assert kinds_of(folder) == {
        "label_missing": ["JPEGImages/c.jpg"],
        "folder_without_labels": ["SegmentationClass (2 images)"],
    }


def test_a_folder_is_a_split(data):
    """As Roboflow writes them; classes are those of all splits."""
    folder = data(
        {
            **{"train/a.jpg": "", "train/a.xml": xml(box(1, 1, 9, 9, name="dog"))},
            **{"valid/a.jpg": "", "valid/a.xml": xml(box(1, 1, 8, 8))},
            **{"valid/deep/b.jpg": "", "valid/deep/b.xml": xml()},
        }
    )
    content, findings = read_voc(folder, "valid")
    assert files_of(folder, "valid") == ["valid/a.jpg", "valid/deep/b.jpg"]
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    assert [a["category_id"] for a in content["annotations"]] == [1]
    assert not findings
    assert len(files_of(folder, ".")) == 3
    for outside in ("../valid", "/", "nowhere"):
        with pytest.raises(ValueError, match="it has no split"):
            read_voc(folder + "/train", outside)


def test_a_folder_of_labels_and_the_images_that_correspond(data):
    files = {f"images/{k}/{n}.png": "" for k in ("train", "valid") for n in "ab"}
    files |= {f"labels/{k}/a.xml": xml(box(1, 1, 9, 9)) for k in ("train", "valid")}
    folder = data(files)
    for split in ("labels/valid", "images/valid"):
        assert files_of(folder, split) == ["images/valid/a.png", "images/valid/b.png"]
        assert kinds_of(folder, split) == {"label_missing": ["images/valid/b.png"]}
    with pytest.raises(ValueError, match="its folder 'images/test' has no xml files"):
        read_voc(data({"images/test/a.png": ""}), "images/test")


def test_a_list_means_what_lies_beside_it(data):
    files = {f"{k}/JPEGImages/a.jpg": "" for k in ("VOC2007", "VOC2012")}
    files |= {f"{k}/Annotations/a.xml": xml(box(1, 1, 9, 9)) for k in ("VOC2007", "VOC2012")}
    folder = data(files | {"VOC2012/ImageSets/Main/train.txt": "a", "all.txt": "a"})
    assert files_of(folder, "VOC2012/ImageSets/Main/train.txt") == ["VOC2012/JPEGImages/a.jpg"]
    assert kinds_of(folder, "all") == {
        "label_ambiguous": [
            "'a' in all.txt: VOC2007/Annotations/a.xml or VOC2012/Annotations/a.xml"
        ]
    }


def test_a_list_names_labels_or_images(data):
    """Whatever the label is called, and each image once."""
    files = {"photo.png": "", "x.xml": xml(box(1, 1, 9, 9), name="photo.png")}
    files |= {"b.jpg": "", "b.jpg.xml": xml(box(1, 1, 9, 9))}
    folder = data(files | {"train.txt": "photo\nphoto.png\nx\nb\nb.jpg"})
    assert files_of(folder, "train") == ["photo.png", "b.jpg"]
    assert len(boxes_of(folder, "train")) == 2


def test_a_link_that_leads_back_is_no_second_folder(data, tmp_path):
    folder = data({"a.png": "", "a.xml": xml(box(1, 1, 9, 9))})
    (tmp_path / "latest").symlink_to(tmp_path)
    assert files_of(folder, ".") == ["a.png"]


def test_a_link_to_a_split_is_that_split(data, tmp_path):
    folder = data({"train/a.jpg": "", "train/a.xml": xml(), "far/b.jpg": "", "far/b.xml": xml()})
    (tmp_path / "current").symlink_to("train")
    (tmp_path / "train" / "more").symlink_to(tmp_path / "far")
    inner = f"{tmp_path}/train"
    for split in ("train", "current"):
        assert files_of(folder, split) == ["train/a.jpg"]
    assert files_of(inner, ".") == ["a.jpg", "more/b.jpg"]
    assert files_of(inner, "more") == ["more/b.jpg"]


# ------------------------------------------------------------------------------------------------
# The image of a label
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.png": ""}, "a.png"),
        ({"a.JPG": ""}, "a.JPG"),
        ({"images/a.png": "", "a.png": ""}, "a.png"),
        ({"images/a.png": ""}, "images/a.png"),
        ({"x/a.png": "", "a.png": ""}, "a.png"),  # beside it
        ({"a.jpg": "", "a.png": ""}, "a.png"),  # the one that is named
        ({"b.png": "", "c.png": ""}, None),
    ],
)
def test_the_image_of_a_label(data, files, expected):
    folder = data(files | {"a.xml": xml(name="somewhere\\else\\a.png")})
    without = kinds_of(folder).get("label_missing", [])
    labelled = [file for file in files_of(folder, ".") if file not in without]
    assert labelled == [expected] * (expected is not None)


def test_the_image_that_a_label_names(data):
    folder = data({"a.xml": xml(name="photo.png"), "photo.png": ""})
    assert files_of(folder, ".") == ["photo.png"]
    assert kinds_of(folder) == {}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # An image of the same name in another split is no other split's label's.
        ({"train/a.jpg": "", "train/a.xml": xml(), "valid/a.xml": xml()}, None),
        # Nor the one that the label names, where it has one of its own name.
        (
            {"train/a.jpg": "", "valid/a.png": "", "valid/a.xml": xml(name="a.jpg")},
            "valid/a.png",
        ),
        # Nor one without a label, if its own folder has others with theirs.
        (
            {"valid/b.jpg": "", "valid/b.xml": xml(), "valid/a.xml": xml(name="a.jpg")}
            | {"train/a.jpg": ""},
            "valid/b.jpg",
        ),
        # Nor one that is another label's by name.
        (
            {"valid/a.xml": xml(name="b.png"), "valid/b.xml": xml(), "valid/b.png": ""},
            "valid/b.png",
        ),
    ],
)
def test_no_image_of_another_label(data, files, expected):
    files = {"train/z.jpg": "", "train/z.xml": xml()} | files
    folder = data(files)
    assert files_of(folder, "valid") == [expected] * (expected is not None)
    kinds = kinds_of(folder, "valid")
    missing = kinds.get("file_unreadable", []) + kinds.get("label_ambiguous", [])
    labels = sum(x.startswith("valid") and x.endswith("xml") for x in files)
    assert len(missing) == labels - (expected is not None)


def test_two_labels_of_one_image(data):
    folder = data({"a.xml": xml(name="c.png"), "b.xml": xml(name="c.png"), "c.png": ""})
    kinds = kinds_of(folder)
    assert kinds["label_ambiguous"] == ["a.xml and b.xml: c.png"] * 2


def test_labels_and_images_in_folders_of_any_name(data):
    """Some by their own names, some by those that they say."""
    files = {"pics/a.png": "", "pics/b.png": "", "marks/a.xml": xml()}
    folder = data(files | {"marks/z.xml": xml(name="b.png")})
    assert files_of(folder, "marks") == ["pics/a.png", "pics/b.png"]
    elsewhere = ["marks/a.xml: pics/a.png", "marks/z.xml: pics/b.png"]
    assert kinds_of(folder, "marks") == {"image_elsewhere": elsewhere}


def test_an_image_that_a_second_label_names(data):
    folder = data({"a.xml": xml(), "z.xml": xml(name="a.png"), "a.png": ""})
    assert kinds_of(folder) == {"label_ambiguous": ["a.xml and z.xml: a.png"]}


def test_names_with_two_suffixes(data):
    label = xml(box(1, 1, 9, 9), name="photo.jpg.png")
    folder = data({"photo.jpg.png": "", "photo.png": "", "photo.jpg.xml": label})
    assert files_of(folder, ".") == ["photo.jpg.png", "photo.png"]
    assert kinds_of(folder) == {"label_missing": ["photo.png"]}


def test_the_folder_that_corresponds(data):
    files = {f"{k}/JPEGImages/a.jpg": "" for k in ("VOC2007", "VOC2012")}
    files |= {f"{k}/Annotations/a.xml": xml(box(1, 1, 9, 9)) for k in ("VOC2007", "VOC2012")}
    assert files_of(data(files), ".") == ["VOC2007/JPEGImages/a.jpg", "VOC2012/JPEGImages/a.jpg"]


def test_a_label_without_a_size_asks_the_image(data):
    for size in ("", "<width>0</width><height>0</height>", "<width>x</width><height>7</height>"):
        content, findings = read_voc(data(ONE | {"a.xml": xml(box(1, 1, 9, 9), size=size)}), ".")
        assert (content["images"][0]["width"], content["images"][0]["height"]) == (WIDTH, HEIGHT)
        assert not findings


# ------------------------------------------------------------------------------------------------
# Objects
# ------------------------------------------------------------------------------------------------


def test_pixels_are_counted_from_1_or_corners_from_0(data):
    folder = data(ONE | {"a.xml": xml(box(11, 21, 30, 40))})
    assert boxes_of(folder) == [[10, 20, 20, 20]]
    assert boxes_of(folder, first_pixel=0) == [[11, 21, 19, 19]]


def test_a_box_at_pixel_0_is_odd_where_pixels_begin_at_1(data):
    folder = data(ONE | {"a.xml": xml(box(0, 21, 30, 40), box(1, 1, 2, 2))})
    assert kinds_of(folder) == {"box_at_pixel_zero": ["a.xml, object 1 (cat)"]}
    assert read_voc(folder, ".", first_pixel=0)[1] == []


def test_parts_are_no_objects(data):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    content, findings = read_voc(data(ONE | {"a.xml": xml(box(11, 21, 30, 40, more=part))}), ".")
    assert [a["bbox"] for a in content["annotations"]] == [[10, 20, 20, 20]]
    assert [c["name"] for c in content["categories"]] == ["cat"]
    assert not findings


@pytest.mark.parametrize(
    "polygon",
    [
        "<x1>12</x1><y1>5</y1><x2>3</x2><y2>8</y2><x3>7.5</x3><y3>30</y3>",
        "<pt><x>12</x><y>5</y></pt><pt><x>3</x><y>8</y></pt><pt><x>7.5</x><y>30</y></pt>",
    ],
)
def test_a_polygon_is_its_extent(data, polygon):
    shape = f"<object><name>cat</name><polygon>{polygon}</polygon></object>"
    folder = data(ONE | {"a.xml": xml(shape)})
    assert boxes_of(folder) == [[2, 4, 10, 26]]
    assert boxes_of(folder, first_pixel=0) == [[3, 5, 9, 25]]


def test_difficult_is_kept(data):
    hard = box(1, 1, 9, 9, more="<difficult>1</difficult>")
    content, _ = read_voc(data(ONE | {"a.xml": xml(hard, box(1, 1, 5, 5))}), ".")
    assert [a.get("difficult") for a in content["annotations"]] == [1, None]


def test_an_external_entity_is_not_read(data, tmp_path):
    (tmp_path / "secret").write_text("secret")
    text = xml(box(1, 1, 9, 9, name="&e;"))
    doctype = f'<!DOCTYPE a [<!ENTITY e SYSTEM "file://{tmp_path}/secret">]>'
    content, findings = read_voc(data(ONE | {"a.xml": doctype + text}), ".")
    assert "secret" not in json.dumps(content)
    assert [f.kind for f in findings] == ["label_malformed"]


# ------------------------------------------------------------------------------------------------
# One data set in every format
# ------------------------------------------------------------------------------------------------


def random_data(root):
    """Like that of broken.py, with boxes at random whole pixels, some at the border."""
    content = broken.make_data(root)
    generator = np.random.default_rng(0)
    for annotation in content["annotations"]:
        x, y = (int(generator.integers(0, side - 1)) for side in (broken.WIDTH, broken.HEIGHT))
        w = int(generator.integers(1, broken.WIDTH - x + 1))
        h = int(generator.integers(1, broken.HEIGHT - y + 1))
        annotation |= {"bbox": [x, y, w, h], "area": w * h}
    return content


def plain(labels):
    """{image: [(class, box)]}, and sizes, whatever the ids."""
    content = labels.content
    names = {c["id"]: c["name"] for c in content["categories"]}
    objects = {
        Path(image["file_name"]).name: [
            (names[a["category_id"]], a["bbox"])
            for a in content["annotations"]
            if a["image_id"] == image["id"]
        ]
        for image in content["images"]
    }
    sizes = [(image["width"], image["height"]) for image in content["images"]]
    return objects, sizes, list(names.values())


def test_every_format_says_the_same(tmp_path):
    content = random_data(tmp_path)
    yaml = broken.write_yolo(content, tmp_path)
    folder = broken.write_voc(content, tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(content))
    expected, sizes, names = plain(read_labels(f"{tmp_path}/a.json", f"{tmp_path}/images"))
    broken.to_lvis(content)
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    others = [
        read_labels(str(yaml), "train"),
        read_labels(str(folder), "train"),
        read_labels(f"{tmp_path}/lvis.json", str(tmp_path)),
    ]
    assert sum(map(len, expected.values())) == broken.OBJECTS
    for labels in others:
        assert not labels.findings
        objects, same_sizes, same_names = plain(labels)
        assert (same_sizes, same_names) == (sizes, names)
        assert objects.keys() == expected.keys()
        for image, found in objects.items():
            assert [name for name, _ in found] == [name for name, _ in expected[image]]
            ours, theirs = ([box for _, box in x] for x in (found, expected[image]))
            np.testing.assert_allclose(ours, theirs, atol=0.01)
