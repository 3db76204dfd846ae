"""Folders of Pascal VOC's xml: pairs, splits and objects. broken.py has more that are refused."""

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
    """data({name: text}) writes files, with pixels for an image, and returns the folder."""

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


def test_a_list_is_relative_to_the_folder_first(data, tmp_path, monkeypatch):
    folder = data(devkit(*"ab") | {"lists/x.txt": "a", "elsewhere/lists/x.txt": "b"})
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert files_of(folder, "lists/x.txt") == ["JPEGImages/a.jpg"]


def test_file_names_that_end_like_marks(data):
    files = {f"{name}.png": "" for name in ("img 1", "img", "x1", "y 01")}
    files |= {f"{name}.xml": xml(box(1, 1, 9, 9)) for name in ("img 1", "img", "x1", "y 01")}
    folder = data(files | {"train.txt": "img 1\nx1\ny 01"})
    assert files_of(folder, "train") == ["img 1.png", "x1.png", "y 01.png"]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@pytest.mark.parametrize("split", ["val", "valid", "validation"])
def test_validation_split_has_three_names(data, tmp_path, name, split):
    folder = data({f"{name}/a.jpg": "", f"{name}/a.xml": xml(), "b.jpg": "", "b.xml": xml()})
    assert files_of(folder, split) == [f"{name}/a.jpg"]
    data({f"ImageSets/Main/{name}.txt": "b"})
    assert files_of(folder, split) == ["b.jpg"]


def test_the_given_name_of_a_split_comes_first(data):
    folder = data(
        {f"{x}/{x}.jpg": "" for x in VALIDATION} | {f"{x}/{x}.xml": xml() for x in VALIDATION}
    )
    assert [files_of(folder, x) for x in VALIDATION] == [[f"{x}/{x}.jpg"] for x in VALIDATION]
    with pytest.raises(ValueError, match="it has no split 'test'; tried"):
        read_voc(folder, "test")


def test_a_backslash_in_a_file_name_is_kept(data):
    folder = data({r"x\b.jpg": "", r"x\b.xml": xml(), "train.txt": r"x\b.jpg"})
    assert files_of(folder, "train") == [r"x\b.jpg"]


def test_a_folder_with_xml_and_classes_txt_is_voc(data):
    """labelImg writes both formats into one folder."""
    files = {"a.png": "", "a.xml": xml(box(11, 21, 30, 40)), "a.txt": "0 .5 .5 .1 .1"}
    labels = read_labels(data(files | {"classes.txt": "dog"}), ".")
    assert [a["bbox"] for a in labels.content["annotations"]] == [[10, 20, 20, 20]]


def test_folders_without_xml_are_left_out(data):
    folder = data(devkit(*"ab") | {"JPEGImages/c.jpg": ""})
    names = ["JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c.jpg"]
    assert files_of(folder, ".") == names
    assert kinds_of(folder) == {
        "label_missing": ["JPEGImages/c.jpg"],
        "folder_without_labels": ["SegmentationClass (2 images)"],
    }


def test_a_folder_is_a_split(data):
    """Roboflow's layout. Classes are those of all splits."""
    folder = data(
        {
            "train/a.jpg": "",
            "train/a.xml": xml(box(1, 1, 9, 9, name="dog")),
            "valid/a.jpg": "",
            "valid/a.xml": xml(box(1, 1, 8, 8)),
            "valid/deep/b.jpg": "",
            "valid/deep/b.xml": xml(),
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


def test_corresponding_folders_are_one_split(data):
    files = {f"images/{k}/{n}.png": "" for k in ("train", "valid") for n in "ab"}
    files |= {f"labels/{k}/a.xml": xml(box(1, 1, 9, 9)) for k in ("train", "valid")}
    folder = data(files)
    for split in ("labels/valid", "images/valid"):
        assert files_of(folder, split) == ["images/valid/a.png", "images/valid/b.png"]
        assert kinds_of(folder, split) == {"label_missing": ["images/valid/b.png"]}
    with pytest.raises(ValueError, match="its folder 'images/test' has no xml files"):
        read_voc(data({"images/test/a.png": ""}), "images/test")


def test_a_list_prefers_files_in_its_folder(data):
    files = {f"{k}/JPEGImages/a.jpg": "" for k in ("VOC2007", "VOC2012")}
    files |= {f"{k}/Annotations/a.xml": xml(box(1, 1, 9, 9)) for k in ("VOC2007", "VOC2012")}
    folder = data(files | {"VOC2012/ImageSets/Main/train.txt": "a", "all.txt": "a"})
    assert files_of(folder, "VOC2012/ImageSets/Main/train.txt") == ["VOC2012/JPEGImages/a.jpg"]
    assert kinds_of(folder, "all") == {
        "label_ambiguous": [
            "'a' in all.txt: VOC2007/Annotations/a.xml or VOC2012/Annotations/a.xml"
        ]
    }


def test_a_list_names_xml_files_or_images(data):
    files = {"photo.png": "", "x.xml": xml(box(1, 1, 9, 9), name="photo.png")}
    files |= {"b.jpg": "", "b.jpg.xml": xml(box(1, 1, 9, 9), name="b.jpg")}
    folder = data(files | {"train.txt": "photo\nphoto.png\nx\nb\nb.jpg"})
    assert files_of(folder, "train") == ["photo.png", "b.jpg"]
    assert len(boxes_of(folder, "train")) == 2


def test_a_cyclic_link_is_followed_once(data, tmp_path):
    folder = data({"a.png": "", "a.xml": xml(box(1, 1, 9, 9))})
    (tmp_path / "latest").symlink_to(tmp_path)
    assert files_of(folder, ".") == ["a.png"]


def test_a_link_to_a_folder_is_that_split(data, tmp_path):
    folder = data({"train/a.jpg": "", "train/a.xml": xml(), "far/b.jpg": "", "far/b.xml": xml()})
    (tmp_path / "current").symlink_to("train")
    (tmp_path / "train" / "more").symlink_to(tmp_path / "far")
    inner = f"{tmp_path}/train"
    for split in ("train", "current"):
        assert files_of(folder, split) == ["train/a.jpg"]
    assert files_of(inner, ".") == ["a.jpg", "more/b.jpg"]
    assert files_of(inner, "more") == ["more/b.jpg"]


# ------------------------------------------------------------------------------------------------
# Pairs of an xml and an image
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.png": ""}, "a.png"),
        ({"a.JPG": ""}, "a.JPG"),
        ({"images/a.png": "", "a.png": ""}, "a.png"),  # the same folder comes first
        ({"images/a.png": ""}, "images/a.png"),
        ({"x/a.png": "", "a.png": ""}, "a.png"),
        ({"a.jpg": "", "a.png": ""}, "a.png"),  # <filename> decides between equal stems
        ({"b.jpg": "", "a.jpg": ""}, "a.jpg"),  # the stem comes first
    ],
)
def test_image_of_the_same_stem(data, files, expected):
    folder = data(files | {"a.xml": xml(name="somewhere\\else\\a.png")})
    unlabelled = kinds_of(folder).get("label_missing", [])
    assert [file for file in files_of(folder, ".") if file not in unlabelled] == [expected]


@pytest.mark.parametrize("folders", ["annotations img", "annotation images", "label image"])
def test_corresponding_folders_have_usual_names(data, folders):
    labels, images = folders.split()
    folder = data({f"{labels}/a.xml": xml(), f"{images}/a.png": ""})
    assert files_of(folder, ".") == [f"{images}/a.png"]
    assert kinds_of(folder) == {}


def test_corresponding_folder_comes_before_the_folder_above(data):
    folder = data({"annotations/a.xml": xml(), "images/a.png": "", "a.png": ""})
    assert files_of(folder, ".") == ["images/a.png"]
    assert kinds_of(folder).keys() == {"folder_without_labels"}


def test_image_of_the_filename(data):
    folder = data({"a.xml": xml(name="photo.png"), "photo.png": ""})
    assert files_of(folder, ".") == ["photo.png"]
    assert kinds_of(folder) == {}


# Layouts that exporters write: {file: text}, split -> image.
LABEL_IMG = {"a.jpg": "", "a.xml": xml(name="a.jpg"), "b.PNG": "", "b.xml": xml(name="b.PNG")}
CVAT = {"Annotations/set/a.xml": xml(), "JPEGImages/set/a.jpg": ""}
CVAT |= {"ImageSets/Main/default.txt": "set/a", "labelmap.txt": "# label:color_rgb:parts:actions"}
LABEL_STUDIO = {"Annotations/a.xml": xml(name="a"), "images/a.jpg": ""}
ROBOFLOW = {"train/a_jpg.rf.1f.jpg": "", "train/a_jpg.rf.1f.xml": xml(name="a_jpg.rf.1f.jpg")}
ROBOFLOW |= {"valid/b.jpg": "", "valid/b.xml": xml(), "README.dataset.txt": ""}
OXFORD_PETS = {"annotations/xmls/a.xml": xml(), "images/a.jpg": "", "annotations/trimaps/a.png": ""}


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (LABEL_IMG, ".", ["a.jpg", "b.PNG"]),
        (CVAT, "default", ["JPEGImages/set/a.jpg"]),
        (LABEL_STUDIO, ".", ["images/a.jpg"]),
        (ROBOFLOW, "train", ["train/a_jpg.rf.1f.jpg"]),
        (ROBOFLOW, "val", ["valid/b.jpg"]),
        (OXFORD_PETS, ".", ["images/a.jpg"]),
    ],
)
def test_layouts_of_exporters_are_read(data, files, split, expected):
    folder = data(files)
    assert files_of(folder, split) == expected
    assert kinds_of(folder, split).keys() <= {"folder_without_labels"}


MOVE = "move {} beside it, or images into JPEGImages and xml files into Annotations"


@pytest.mark.parametrize(
    ("files", "refusal"),
    [
        # No image at all.
        ({"a.xml": xml()}, "no image a.* for a.xml"),
        ({"a.xml": xml(name="x.png")}, "no image a.* or 'x.png' for a.xml"),
        # Folders of other names.
        (
            {"marks/a.xml": xml(), "pics/a.png": ""},
            f"no image a.* for marks/a.xml in its folder: {MOVE.format('pics/a.png')}",
        ),
        (
            {"marks/a.xml": xml(name="x.png"), "pics/x.png": ""},
            f"no image a.* or 'x.png' for marks/a.xml in its folder: {MOVE.format('pics/x.png')}",
        ),
        # Subfolders on one side.
        (
            {"labels/a.xml": xml(), "images/new/a.png": ""},
            f"no image a.* for labels/a.xml in its folder: {MOVE.format('images/new/a.png')}",
        ),
        # An image of the same name in another split.
        (
            {"train/a.png": "", "train/a.xml": xml(), "valid/a.xml": xml()},
            f"no image a.* for valid/a.xml in its folder: {MOVE.format('train/a.png')}",
        ),
        # The suffix of the image in the name of the xml, without <filename>.
        ({"a.jpg.xml": xml(), "a.jpg": ""}, f"{MOVE.format('a.jpg')}"),
    ],
)
def test_xml_without_an_image_is_refused(data, files, refusal):
    folder = data(files)
    (place,) = kinds_of(folder)["file_unreadable"]
    assert place.endswith(refusal)
    labelled = {x for x in files if x.endswith(".xml") and f" for {x}" not in place}
    assert files_of(folder, ".") == [x.replace(".xml", ".png") for x in sorted(labelled)]


@pytest.mark.parametrize(
    ("files", "places"),
    [
        # Two images of one xml.
        ({"a.xml": xml(), "a.jpg": "", "a.png": ""}, ["a.xml: a.jpg or a.png"]),
        (
            {"labels/a.xml": xml(), "images/a.png": "", "JPEGImages/a.png": ""},
            ["labels/a.xml: JPEGImages/a.png or images/a.png"],
        ),
        # Two xml files of one image.
        (
            {"a.xml": xml(name="c.png"), "b.xml": xml(name="c.png"), "c.png": ""},
            ["a.xml and b.xml: c.png"] * 2,
        ),
        (
            {"a.xml": xml(), "z.xml": xml(name="a.png"), "a.png": ""},
            ["a.xml and z.xml: a.png"] * 2,
        ),
    ],
)
def test_ambiguous_pairs_are_refused(data, files, places):
    assert kinds_of(data(files))["label_ambiguous"] == places


def test_filename_of_another_image_is_reported(data):
    files = {"train/a.png": "", "train/b.png": "", "train/b.xml": xml()}
    folder = data(files | {"train/a.xml": xml(name="b.png")})
    assert files_of(folder, "train") == ["train/a.png", "train/b.png"]
    assert kinds_of(folder) == {"label_of_another_image": ["train/a.xml: b.png"]}


def test_stems_with_a_dot(data):
    label = xml(box(1, 1, 9, 9), name="photo.jpg.png")
    folder = data({"photo.jpg.png": "", "photo.png": "", "photo.jpg.xml": label})
    assert files_of(folder, ".") == ["photo.jpg.png", "photo.png"]
    assert kinds_of(folder) == {"label_missing": ["photo.png"]}


def test_corresponding_folders_of_two_devkits(data):
    files = {f"{k}/JPEGImages/a.jpg": "" for k in ("VOC2007", "VOC2012")}
    files |= {f"{k}/Annotations/a.xml": xml(box(1, 1, 9, 9)) for k in ("VOC2007", "VOC2012")}
    assert files_of(data(files), ".") == ["VOC2007/JPEGImages/a.jpg", "VOC2012/JPEGImages/a.jpg"]


def test_a_missing_size_is_that_of_the_image(data):
    for size in ("", "<width>0</width><height>0</height>", "<width>x</width><height>7</height>"):
        content, findings = read_voc(data(ONE | {"a.xml": xml(box(1, 1, 9, 9), size=size)}), ".")
        assert (content["images"][0]["width"], content["images"][0]["height"]) == (WIDTH, HEIGHT)
        assert not findings


# ------------------------------------------------------------------------------------------------
# Objects
# ------------------------------------------------------------------------------------------------


def test_first_pixel_1_and_0(data):
    folder = data(ONE | {"a.xml": xml(box(11, 21, 30, 40))})
    assert boxes_of(folder) == [[10, 20, 20, 20]]
    assert boxes_of(folder, first_pixel=0) == [[11, 21, 19, 19]]


def test_a_box_at_pixel_0_is_reported(data):
    folder = data(ONE | {"a.xml": xml(box(0, 21, 30, 40), box(1, 1, 2, 2))})
    assert kinds_of(folder) == {"box_at_pixel_zero": ["a.xml, object 1 (cat)"]}
    assert read_voc(folder, ".", first_pixel=0)[1] == []


def test_parts_of_objects_are_ignored(data):
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
def test_the_box_of_a_polygon_is_its_extent(data, polygon):
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
    """The data of broken.py with boxes at random whole pixels, some at the border."""
    content = broken.make_data(root)
    generator = np.random.default_rng(0)
    for annotation in content["annotations"]:
        x, y = (int(generator.integers(0, side - 1)) for side in (broken.WIDTH, broken.HEIGHT))
        w = int(generator.integers(1, broken.WIDTH - x + 1))
        h = int(generator.integers(1, broken.HEIGHT - y + 1))
        annotation |= {"bbox": [x, y, w, h], "area": w * h}
    return content


def plain(labels):
    """Return {image: [(class, box)]}, sizes and class names, without ids."""
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


def test_every_format_gives_the_same_content(tmp_path):
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
        for image, pairs in objects.items():
            assert [name for name, _ in pairs] == [name for name, _ in expected[image]]
            boxes, expected_boxes = ([box for _, box in x] for x in (pairs, expected[image]))
            np.testing.assert_allclose(boxes, expected_boxes, atol=0.01)
