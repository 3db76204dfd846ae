"""Registered data sets, and the numbers of their classes."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

import atss.engine.run as way_in
from atss.data import datasets


@pytest.fixture
def exchanged(squares, tmp_path):
    """The squares, whose categories have exchanged their ids."""
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


def truth_as_detections(name: str, classes: list[str], folder: str | None = None) -> dict:
    """The evaluator's results of perfect detections by a model whose classes are these."""
    names = MetadataCatalog.get(name).thing_classes
    evaluator = COCOEvaluator(name, ("bbox",), output_dir=folder, allow_cached_coco=False)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        found = Instances((record["height"], record["width"]))
        boxes = np.array([x["bbox"] for x in record["annotations"]], dtype=np.float32)
        boxes = boxes.reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(torch.from_numpy(boxes))
        found.scores = torch.ones(len(boxes))
        said = [names[x["category_id"]] for x in record["annotations"]]
        found.pred_classes = torch.tensor([classes.index(x) for x in said], dtype=torch.long)
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


def test_classes_in_another_order_keep_their_names(squares, exchanged, tmp_path):
    """Of a validation file with exchanged ids, what is right counts as right."""
    sets = ("DATASETS.TRAIN", "('plain',)", "DATASETS.TEST", "('exchanged',)")
    options = (*sets, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run"))
    cfg = way_in.prepare(arguments(squares, exchanged, *options))
    assert cfg.MODEL.ATSS.CLASS_NAMES == ["blue", "orange"]
    ids = {
        DatasetCatalog.get(n)[0]["annotations"][0]["category_id"] for n in ("plain", "exchanged")
    }
    assert len(ids) == 1
    assert truth_as_detections("exchanged", ["blue", "orange"])["AP"] == 100


def test_a_runs_own_names_count_in_evaluation(squares, exchanged, tmp_path):
    sets = ("DATASETS.TRAIN", "('plain',)", "DATASETS.TEST", "('exchanged',)")
    options = (*sets, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run"))
    options = ("--eval-only", *options, "MODEL.ATSS.CLASS_NAMES", "['orange', 'blue']")
    cfg = way_in.prepare(arguments(squares, exchanged, *options))
    assert cfg.MODEL.ATSS.CLASS_NAMES == ["orange", "blue"]
    for name in ("plain", "exchanged"):
        assert MetadataCatalog.get(name).thing_classes == ["orange", "blue"]
        assert truth_as_detections(name, ["orange", "blue"])["AP"] == 100


def test_other_classes_are_refused(squares, exchanged, tmp_path):
    exchanged.write_text(exchanged.read_text().replace("orange", "red"))
    sets = ("DATASETS.TRAIN", "('plain',)", "DATASETS.TEST", "('exchanged',)")
    options = (*sets, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run"))
    sentence = "class 0 of data set exchanged is 'red', but 'blue' of the data set"
    with pytest.raises(ValueError, match=sentence):
        way_in.prepare(arguments(squares, exchanged, *options))


def test_names_may_differ_in_case(squares, exchanged):
    for spec in register(squares, exchanged):
        datasets.register(spec)
    datasets.follow("exchanged", ["Blue", "ORANGE "])
    assert MetadataCatalog.get("exchanged").thing_classes == ["Blue", "ORANGE "]


def test_sets_that_others_registered_are_not_renumbered(squares):
    DatasetCatalog.register("foreign", lambda: [])
    MetadataCatalog.get("foreign").thing_classes = ["b", "a"]
    try:
        datasets.follow("foreign", ["b", "a"])
        with pytest.raises(ValueError, match="in another order: register it by --register"):
            datasets.follow("foreign", ["a", "b"])
    finally:
        DatasetCatalog.remove("foreign")
        MetadataCatalog.remove("foreign")


@pytest.mark.parametrize("area", [None, 0, float("nan"), "large", ...])
def test_where_an_area_cannot_be_used_that_of_the_box_is(squares, tmp_path, area):
    """Of an object of 16 to 48 pixels a side; of no area it would count as small, or crash."""
    content = json.loads((squares / "annotations.json").read_text())
    sides = [x["bbox"][2] for x in content["annotations"]]
    for entry in content["annotations"]:
        del entry["area"]
        if area is not ...:
            entry["area"] = area
    (tmp_path / "areas.json").write_text(json.dumps(content))
    datasets.register(f"areas={tmp_path}/areas.json:{squares}/images")
    try:
        remarks = MetadataCatalog.get("areas").remarks
        assert "annotations whose area is missing, or no positive" in remarks["area_unusable"]
        results = truth_as_detections("areas", ["blue", "orange"], str(tmp_path))
    finally:
        DatasetCatalog.remove("areas")
        MetadataCatalog.remove("areas")
    assert min(sides) < 32 < max(sides)
    assert results["AP"] == results["APs"] == results["APm"] == 100
