"""Registered data sets, and the numbers of their classes."""

import json

import pytest
from conftest import ROOT
from detections import truth_as_detections
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

import atss.engine.run as way_in
from atss.data import datasets


@pytest.fixture
def exchanged(squares, tmp_path):
    """The squares, with the ids of their categories exchanged."""
    content = json.loads((squares / "annotations.json").read_text())
    for entry in content["categories"]:
        entry["id"] = 11 - entry["id"]
    for entry in content["annotations"]:
        entry["category_id"] = 11 - entry["category_id"]
    path = tmp_path / "exchanged.json"
    path.write_text(json.dumps(content))
    yield path
    for name in ("plain", "exchanged"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def register(squares, exchanged) -> list[str]:
    return [
        f"plain={squares}/annotations.json:{squares}/images",
        f"exchanged={exchanged}:{squares}/images",
    ]


def arguments(squares, exchanged, *argv):
    specs = [x for spec in register(squares, exchanged) for x in ("--register", spec)]
    config = ["--config-file", str(ROOT / "configs/ATSS_R_18_FPN_small.yaml")]
    return way_in.make_parser().parse_args([*config, *specs, *argv])


def test_classes_in_another_order_keep_their_names(squares, exchanged, tmp_path):
    """With exchanged ids in the validation file, correct detections count."""
    sets = ("DATASETS.TRAIN", "('plain',)", "DATASETS.TEST", "('exchanged',)")
    options = (*sets, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run"))
    cfg = way_in.prepare(arguments(squares, exchanged, *options))
    assert cfg.MODEL.ATSS.CLASS_NAMES == ["blue", "orange"]
    ids = {
        DatasetCatalog.get(n)[0]["annotations"][0]["category_id"] for n in ("plain", "exchanged")
    }
    assert len(ids) == 1
    for only, aps in (("", (100, 100)), ("blue", (100, 0)), ("orange", (0, 100))):
        results = truth_as_detections("exchanged", ["blue", "orange"], tmp_path, only)
        assert (results["AP-blue"], results["AP-orange"]) == aps


def test_evaluation_uses_the_runs_names(squares, exchanged, tmp_path):
    sets = ("DATASETS.TRAIN", "('plain',)", "DATASETS.TEST", "('exchanged',)")
    options = (*sets, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run"))
    options = ("--eval-only", *options, "MODEL.ATSS.CLASS_NAMES", "['orange', 'blue']")
    cfg = way_in.prepare(arguments(squares, exchanged, *options))
    assert cfg.MODEL.ATSS.CLASS_NAMES == ["orange", "blue"]
    for name in ("plain", "exchanged"):
        assert MetadataCatalog.get(name).thing_classes == ["orange", "blue"]
        assert truth_as_detections(name, ["orange", "blue"], tmp_path)["AP"] == 100


def test_other_classes_are_refused(squares, exchanged, tmp_path):
    exchanged.write_text(exchanged.read_text().replace("orange", "red"))
    sets = ("DATASETS.TRAIN", "('plain',)", "DATASETS.TEST", "('exchanged',)")
    options = (*sets, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run"))
    sentence = "data set exchanged has the classes 'red', 'blue', but the other data sets or"
    with pytest.raises(ValueError, match=sentence):
        way_in.prepare(arguments(squares, exchanged, *options))


def test_names_may_differ_in_case(squares, exchanged):
    for spec in register(squares, exchanged):
        datasets.register(spec)
    datasets.follow("exchanged", ["Blue", "ORANGE "])
    assert MetadataCatalog.get("exchanged").thing_classes == ["Blue", "ORANGE "]
    with pytest.raises(ValueError, match="exchanged has the classes 'Blue', 'ORANGE ', but the"):
        datasets.follow("exchanged", ["blue"])


@pytest.mark.parametrize(
    ("names", "classes", "permutation"),
    [
        (["a", "b"], ["b", "a"], [1, 0]),
        (["a", "b", "A", "B"], ["A", "B", "a", "b"], [2, 3, 0, 1]),
        (["a", "B"], ["b", "A"], [1, 0]),
        (["a", "A"], ["A", "b"], None),
        (["a", "b"], ["a", "b", "c"], None),
        (["a", "a"], ["a", "b"], None),
    ],
)
def test_classes_match_by_name(names, classes, permutation):
    assert datasets._permutation(names, classes) == permutation


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({}, "has evaluator_type None in its metadata: choose from"),
        ({"evaluator_type": "coco"}, "has no thing_classes in its metadata: evaluation needs"),
    ],
)
def test_sets_that_cannot_be_evaluated_are_refused(
    squares, exchanged, tmp_path, metadata, sentence
):
    DatasetCatalog.register("foreign", lambda: [])
    MetadataCatalog.get("foreign").set(**metadata)
    sets = ("DATASETS.TRAIN", "('plain',)", "DATASETS.TEST", "('foreign',)")
    options = (*sets, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run"))
    try:
        with pytest.raises(ValueError, match=f"data set foreign of DATASETS.TEST {sentence}"):
            way_in.prepare(arguments(squares, exchanged, *options))
    finally:
        DatasetCatalog.remove("foreign")
        MetadataCatalog.remove("foreign")


def test_colon_in_a_folders_name(squares, tmp_path):
    """In that of the annotations or of the images."""
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "images:1").symlink_to(squares / "images")
    (folder / "some.json").symlink_to(squares / "annotations.json")
    datasets.register(f"colons={folder}/some.json:{folder}/images:1")
    try:
        assert MetadataCatalog.get("colons").image_root == f"{folder}/images:1"
    finally:
        DatasetCatalog.remove("colons")
        MetadataCatalog.remove("colons")
    with pytest.raises(ValueError, match=f"the image folder {folder}/images:2 does not exist"):
        datasets.register(f"colons={folder}/some.json:{folder}/images:2")


def test_sets_of_other_code_are_not_renumbered(squares):
    DatasetCatalog.register("foreign", lambda: [])
    MetadataCatalog.get("foreign").thing_classes = ["b", "a"]
    try:
        datasets.follow("foreign", ["b", "a"])
        with pytest.raises(ValueError, match=r"expected the order .*: register it by --register"):
            datasets.follow("foreign", ["a", "b"])
    finally:
        DatasetCatalog.remove("foreign")
        MetadataCatalog.remove("foreign")


@pytest.mark.parametrize("area", [None, 0, float("nan"), "large", ...])
def test_unusable_area_is_replaced_by_the_boxs(squares, tmp_path, area):
    """For one object, of 16 to 48 pixels a side; others keep their areas."""
    content = json.loads((squares / "annotations.json").read_text())
    first, *others = content["annotations"]
    for entry in others:
        entry["area"] = 7.0
    del first["area"]
    if area is not ...:
        first["area"] = area
    (tmp_path / "areas.json").write_text(json.dumps(content))
    datasets.register(f"areas={tmp_path}/areas.json:{squares}/images")
    try:
        metadata = MetadataCatalog.get("areas")
        assert "annotations without a positive area" in metadata.remarks["area_unusable"]
        results = truth_as_detections("areas", ["blue", "orange"], tmp_path)
        truth = COCO(metadata.json_file)
    finally:
        DatasetCatalog.remove("areas")
        MetadataCatalog.remove("areas")
    areas = [x["area"] for x in truth.anns.values()]
    assert areas == [first["bbox"][2] * first["bbox"][3]] + [7.0] * len(others)
    assert results["AP"] == results["APs"] == 100
