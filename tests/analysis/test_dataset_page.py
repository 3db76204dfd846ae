"""The page of a data set, as tools/check_dataset.py --pictures writes it, parsed."""

import html
import json
import re
from html.parser import HTMLParser

import broken
import check_dataset
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from atss.analysis.dataset_page import Part, part_of
from atss.analysis.thumbnails import thumbnail

CONFIG = str(ROOT / "configs" / "ATSS_R_18_FPN_small.yaml")


class Page(HTMLParser):
    """Figures (their texts, boxes and names), texts of table rows, and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.figures, self.rows, self.addresses, self.tags = [], [], [], []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.addresses += [values[x] for x in ("href", "src") if x in values]
        if tag == "figure":
            self.figures.append({"text": "", "boxes": [], "image": False})
            self.inside = tag
        if tag == "tr":
            self.rows.append("")
            self.inside = tag
        if tag == "image":
            self.figures[-1]["image"] = True
        if tag == "rect":
            self.figures[-1]["boxes"].append(values)

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, text):
        if self.inside == "figure":
            self.figures[-1]["text"] += text
        if self.inside == "tr":
            self.rows[-1] += f"{text.strip()} "

    def figure(self, part):
        """Return the first figure whose text contains a part."""
        return next(x for x in self.figures if part in x["text"])


def inspect(content, root, *options):
    """Return the exit status and the page of a data set in ``root``."""
    (root / "labels.json").write_text(json.dumps(content))
    source = f"{root / 'labels.json'}:{root / 'images'}"
    argv = [source, "--config-file", CONFIG, "--pictures", str(root / "look"), *options]
    status = check_dataset.main(argv)
    target = root / "look/index.html"
    return status, Page(target.read_text()) if target.is_file() else None


@pytest.fixture
def content(tmp_path):
    return broken.make_data(tmp_path)


def test_page_has_no_outside_address(content, tmp_path):
    status, page = inspect(content, tmp_path)
    assert status == 0
    assert {x.split(":")[0] for x in page.addresses if not x.startswith("#")} == {"data"}
    text = re.sub(r'"data:[^"]*"', "", (tmp_path / "look/index.html").read_text())
    assert not re.findall(r"https?://|url\(|@import", text)


def test_objects_left_out_are_dashed_and_listed(content, tmp_path):
    content["annotations"][4]["iscrowd"] = 1
    _, page = inspect(content, tmp_path)
    figure = page.figure("crowds (1 here)")
    assert "b.png" in figure["text"]
    assert "1 left out" in figure["text"]
    assert [x["class"].split()[1:] for x in figure["boxes"]] == [["odd", "out"], [], []]
    assert figure["boxes"][0]["x"] == "22.0"
    assert any("crowds annotation 5 of b.png" in " ".join(x.split()) for x in page.rows)


def test_smallest_object_is_enlarged(content, tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "images/a.png")
    content["images"][0] |= {"width": 640, "height": 480}
    for annotation, box in zip(
        content["annotations"], ([600, 400, 5, 4], [9, 9, 90, 90], [90, 9, 80, 90]), strict=False
    ):
        annotation["bbox"] = box
    _, page = inspect(content, tmp_path)
    figure = page.figure("smallest: cat of 5 x 4 pixels")
    assert "a.png, part of 64 x 64 pixels" in figure["text"]
    assert [x["x"] for x in figure["boxes"]] == ["600.0"]  # the others are outside the part


@pytest.mark.parametrize(
    ("middle", "expected"),
    [((5, 5), (0, 0)), ((600, 470), (568, 416)), ((300, 200), (268, 168)), ((900, -9), (576, 0))],
)
def test_part_stays_inside_the_image(middle, expected):
    box = np.array([[middle[0] - 2, middle[1] - 2, 4, 4]], dtype=float)
    assert part_of(640, 480, box) == Part(*expected, 64, 64)
    assert part_of(640, 480, np.repeat(box, 2, axis=0)) == Part(*expected, 64, 64)
    far = np.array([[-100, -100, 4, 4], [700, 700, 4, 4.0]])
    assert part_of(640, 480, far) == part_of(640, 480, far[:0]) == Part(0, 0, 640, 480)
    assert part_of(640, 480, box * [[1, 1, 99, 1]]) == Part(0, 0, 640, 480)


def test_classes_are_counted_by_size(content, tmp_path):
    content["annotations"][0]["bbox"] = [0, 0, 32, 32]
    content["annotations"][1]["iscrowd"] = 1
    _, page = inspect(content, tmp_path)
    rows = [x.split() for x in page.rows]
    assert ["cat", "8", "4", "7", "1", "0", "0"] in rows
    assert ["dog", "3", "3", "3", "0", "0", "1"] in rows


def test_objects_of_images_are_counted(content, tmp_path):
    """Bins at the end that are empty are left out."""
    del content["annotations"][:3]
    _, page = inspect(content, tmp_path)
    rows = [x.split() for x in page.rows]
    first = next(i for i, x in enumerate(rows) if x[:4] == ["objects", "of", "an", "image"])
    assert rows[first + 1 : first + 4] == [["0", "1"], ["1", "0"], ["2", "to", "3", "3"]]
    assert rows[first + 4][0] == "side"


def test_damaged_image_is_named_and_not_drawn(content, tmp_path):
    (tmp_path / "images/c.png").write_bytes(b"<html>404</html>")
    status, page = inspect(content, tmp_path)
    assert status == 1
    figure = page.figure("missing or unreadable images")
    assert "c.png" in figure["text"]
    assert "not drawn: cannot read the image" in figure["text"]
    assert not figure["image"]
    assert sum(x["image"] for x in page.figures) == 3


def test_names_are_escaped(content, tmp_path):
    name = "<script>alert('x')</script> Käfer"
    content["categories"][0]["name"] = name
    _, page = inspect(content, tmp_path)
    text = (tmp_path / "look/index.html").read_text()
    assert page.tags.count("script") == 1
    assert f">{html.escape(name)[:20]}" in text.replace("&#34;", "&quot;")
    assert "Käfer" in page.figures[0]["text"]


def test_rare_class_and_unusual_shape_are_shown(content, tmp_path):
    many = [
        {**x, "id": 100 + 12 * k + j}
        for k in range(4)
        for j, x in enumerate(content["annotations"])
    ]
    for i, annotation in enumerate(many):
        cat, dog = [i % 7, i % 5, 20 + i % 3, 21], [i % 7, 30, 50, 8]
        annotation["bbox"] = cat if annotation["category_id"] == 1 else dog
    content["categories"].append({"id": 3, "name": "newt"})
    many[5] |= {"category_id": 3}
    many[9]["bbox"] = [0, 30, 60, 6]
    content["annotations"] = many
    _, page = inspect(content, tmp_path)
    assert "b.png" in page.figure("rare class: newt, 1 objects on 1 images")["text"]
    figure = page.figure("unusual shape: cat of 60 x 6 pixels, width / height 10, the median")
    assert "d.png" in figure["text"]
    assert not any("unusual shape: dog" in x["text"] for x in page.figures)  # as all dogs


def test_page_without_countable_objects_has_findings(content, tmp_path):
    del content["annotations"][0]["bbox"]
    status, page = inspect(content, tmp_path)
    assert status == 1
    assert any("entries without a required field" in x for x in page.rows)
    assert not page.figures


@pytest.mark.filterwarnings("ignore")  # of overflow, in the check
def test_extreme_boxes_are_left_out_of_pictures(content, tmp_path):
    """Only finite boxes of the image are drawn, and no number is beyond their surroundings."""
    for annotation, box in zip(
        content["annotations"],
        ([0, 0, float("nan"), 5], [1e308, 0, 1e308, 5], [-1e9, -1e9, 2e9, 2e9], [9, 9, -5, 5]),
        strict=False,
    ):
        annotation["bbox"] = box
    _, page = inspect(content, tmp_path)
    boxes = [box for figure in page.figures for box in figure["boxes"]]
    assert len(boxes) == broken.OBJECTS - 2
    assert all(abs(float(box[key])) <= 200 for box in boxes for key in ("x", "width"))


def test_unwritable_folder_is_refused_first(content, tmp_path, capsys):
    (tmp_path / "look").write_text("a file")
    status, page = inspect(content, tmp_path)
    assert (status, page) == (2, None)
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: cannot write --pictures {tmp_path}/look/index.html")
    assert not captured.out


def test_many_images_give_few_pictures(content, tmp_path, monkeypatch):
    """With all groups full, at most 60 images are decoded, and the page has a limit."""
    from atss.analysis import dataset_page

    first, kinds = content["images"][0], range(1, 9)
    content["categories"] = [{"id": k, "name": f"class {k}"} for k in (*kinds, 9)]
    content["images"] = [
        {**first, "id": i, "file_name": f"{i}.png", "width": 64 + i % 40} for i in range(300)
    ]
    content["annotations"] = [
        {"id": 1 + 3 * i + j, "image_id": i, "category_id": 9, "iscrowd": 0, "area": 9.0}
        | {"bbox": [3 + j, 4, 8 + i % 9, 9 + (i == j) * 30]}
        for i in range(300)
        for j in range(3)
    ]
    for k in kinds:
        content["annotations"][20 * k]["category_id"] = k
    read = []

    def read_image(file_name):
        read.append(file_name)
        return np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)

    monkeypatch.setattr(dataset_page, "read_image", read_image)
    monkeypatch.setattr(dataset_page, "ROOM", 1_000_000)
    inspect(content, tmp_path)
    text = (tmp_path / "look/index.html").read_text()
    assert 10 < len(read) <= 60
    assert len(set(read)) == len(read)
    assert "not drawn: the page is full" in text
    assert len(text) < 1_500_000


@pytest.mark.parametrize("shape", [(1, 5000, 3), (5000, 1, 3), (1, 1, 3)])
def test_thin_image_has_a_thumbnail(shape):
    assert thumbnail(np.zeros(shape, dtype=np.uint8), ()).startswith("data:image/jpeg;base64,")
