"""LVIS's json: registered and evaluated. broken.py has the cases that are refused."""

import json
import sys

import broken
import pytest
import torch
from detections import truth_as_detections
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from atss.data.datasets import register
from atss.engine.evaluation import build_evaluator, provide_lvis


@pytest.fixture
def content(tmp_path):
    content = broken.make_data(tmp_path)
    broken.to_lvis(content)
    yield content
    if "pets" in DatasetCatalog:
        DatasetCatalog.remove("pets")
        MetadataCatalog.remove("pets")


def registered(content, root):
    (root / "lvis.json").write_text(json.dumps(content))
    return register(f"pets={root}/lvis.json:{root}")


def test_file_names_are_the_ends_of_urls(content, tmp_path):
    registered(content, tmp_path)
    records = DatasetCatalog.get("pets")
    assert [r["file_name"] for r in records] == [f"{tmp_path}/images/{x}.png" for x in "abcd"]
    assert MetadataCatalog.get("pets").evaluator_type == "lvis"


def test_ap_of_rare_and_frequent_classes(content, tmp_path):
    content["categories"][0]["frequency"] = "f"
    registered(content, tmp_path)
    whole = truth_as_detections("pets", ["cat", "dog"], tmp_path)
    assert {key: whole[key] for key in ("AP", "APr", "APf")} == {"AP": 100, "APr": 100, "APf": 100}
    cats = truth_as_detections("pets", ["cat", "dog"], tmp_path, only="cat")
    assert (cats["AP"], cats["APr"], cats["APf"]) == pytest.approx((50, 0, 100))


@pytest.mark.parametrize(("absent", "ap"), [([2], 75), ([], 100)])
def test_false_positives_count_only_for_absent_classes(content, tmp_path, absent, ap):
    """A detected dog is ignored if dogs are neither marked nor known to be absent."""
    for annotation in content["annotations"]:
        annotation["category_id"] = 1 if annotation["image_id"] < 4 else 2
    for image in content["images"]:
        image["not_exhaustive_category_ids"] = []
        image["neg_category_ids"] = absent if image["id"] == 1 else []
    registered(content, tmp_path)
    number = MetadataCatalog.get("pets").thing_classes.index("dog")
    load = DatasetCatalog.get("pets")
    dogs = [a for record in load for a in record["annotations"] if a["category_id"] == number]
    assert len(dogs) == 3
    # Three wrong dogs before three right ones: a precision of 1/2 at every recall.
    assert evaluate_with_more_dogs(load, tmp_path)["AP"] == pytest.approx(ap)


def evaluate_with_more_dogs(records, folder):
    """Evaluate perfect detections, and three dogs of higher score on the first image."""
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(folder)
    evaluator = build_evaluator(cfg, "pets")
    evaluator.reset()
    for record in records:
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]]).float()
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        scores = torch.full((len(boxes),), 0.5)
        if record["image_id"] == 1:
            boxes, classes = torch.cat([boxes, boxes]), torch.cat([classes, torch.ones(3).long()])
            scores = torch.cat([scores, torch.full((3,), 0.9)])
        detections = Instances((record["height"], record["width"]))
        detections.pred_boxes, detections.pred_classes = Boxes(boxes), classes
        detections.scores = scores
        evaluator.process([record], [{"instances": detections}])
    return evaluator.evaluate()["bbox"]


def test_missing_hotcoco_gives_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ValueError, match=r"needs hotcoco .*: pip install hotcoco$"):
        provide_lvis()
