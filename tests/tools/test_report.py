"""tools/report.py: figures of files and of runs."""

import json

import pytest
import report
import torch
from conftest import make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from golden_results import CASES

from atss.data import datasets
from atss.engine.evaluation import build_evaluator
from atss.engine.sources import shorten_paths


@pytest.fixture
def files(tmp_path):
    """Paths of annotations and detections of a golden case."""
    case = CASES["medium_ties"]
    for name in ("gt", "detections"):
        (tmp_path / f"{name}.json").write_text(json.dumps(case[name]))
    return ["--annotations", f"{tmp_path}/gt.json", "--detections", f"{tmp_path}/detections.json"]


def test_files_give_a_table_and_a_json(files, tmp_path, capsys):
    report.main([*files, "--json", str(tmp_path / "new/report.json")])
    found = json.loads((tmp_path / "new/report.json").read_text())
    expected = CASES["medium_ties"]["expected"]
    assert found["AP"] == pytest.approx(100 * expected["pycocotools"]["stats"][0])
    assert found["errors"]["counts"] == expected["tidecv"]["counts"]
    text = capsys.readouterr().out
    assert f"AP50 {found['AP50']:.2f}" in text
    assert f"cost in AP50 of {found['errors']['base_ap50']:.2f}" in text


def test_limit_of_detections_is_counted_and_named(tmp_path, capsys):
    """225 perfect detections on an image: COCO's limit of 100 leaves 45 of 101 recalls."""
    boxes = [[i % 15 * 6, i // 15 * 6, 5, 5] for i in range(225)]
    objects = [{"image_id": 1, "category_id": 1, "bbox": x} for x in boxes]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 99, "height": 99}],
        "categories": [{"id": 1, "name": "dot"}],
        "annotations": [
            {**x, "id": i, "area": 25, "iscrowd": 0} for i, x in enumerate(objects, start=1)
        ],
    }
    (tmp_path / "gt.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps([{**x, "score": 0.9} for x in objects]))
    argv = ["--annotations", f"{tmp_path}/gt.json", "--detections", f"{tmp_path}/found.json"]
    argv += ["--json", f"{tmp_path}/report.json", "--output", f"{tmp_path}/report.html"]
    for limit, ap, missed in ((100, 100 * 45 / 101, 125), (300, 100, 0)):
        report.main([*argv, "--max-detections", str(limit)])
        found = json.loads((tmp_path / "report.json").read_text())
        assert found["AP"] == pytest.approx(ap)
        assert found["errors"]["counts"]["Miss"] == missed
        assert found["data"]["max_detections"] == limit
        named = "300 count, COCO counts 100" in (tmp_path / "report.html").read_text()
        assert named == ("at most 300 detections" in capsys.readouterr().out) == (limit == 300)


def test_json_never_replaces_an_input(files):
    with pytest.raises(SystemExit, match=r"--json .*gt\.json would replace an input"):
        report.main([*files, "--json", files[1]])


def test_two_results_are_compared(files, capsys):
    report.main([*files, files[-1]])
    table = capsys.readouterr().out.partition("second - first")[2]
    assert [x.split() for x in table.splitlines()][2] == ["AP50", "+0.00", "+0.00", "to", "+0.00"]


def test_run_has_the_ap_of_its_evaluation(squares, tmp_path, capsys):
    """The annotations are found by the run's config, image ids and classes included."""
    output = tmp_path / "run"
    opts = ("DATASETS.TEST", "('squares',)", "TEST.DETECTIONS_PER_IMAGE", 300)
    cfg = make_cfg("OUTPUT_DIR", str(output), *opts)
    source = f"squares={squares}/annotations.json:{squares}/images"
    name = datasets.register(source)
    try:
        evaluator = build_evaluator(cfg, name)
        evaluator.reset()
        for i, record in enumerate(DatasetCatalog.get(name)):
            boxes = torch.tensor([x["bbox"] for x in record["annotations"]]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            instances = Instances((record["height"], record["width"]))
            instances.pred_boxes = Boxes(boxes + 2 * i)
            instances.scores = torch.linspace(0.9, 0.5, len(boxes))
            classes = [x["category_id"] for x in record["annotations"]]
            instances.pred_classes = torch.tensor(classes, dtype=torch.long)
            evaluator.process([record], [{"instances": instances}])
        expected = evaluator.evaluate()["bbox"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    cfg.DATASETS.REGISTER = [source]
    shorten_paths(cfg)
    (output / "config.yaml").write_text(cfg.dump())
    try:
        report.main([str(output), "--json", str(tmp_path / "report.json")])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    found = json.loads((tmp_path / "report.json").read_text())
    assert 0 < found["AP"] < 100
    assert found["AP"] == pytest.approx(expected["AP"], abs=1e-9)
    assert found["AP50"] == pytest.approx(expected["AP50"], abs=1e-9)
    assert found["data"]["max_detections"] == 300


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no results: pass OUTPUT_DIR, or --annotations and --detections"),
        (["--annotations", "a"], "no results: pass OUTPUT_DIR"),
        (["out", "--annotations", "a"], "pass OUTPUT_DIR, or --annotations and --detections"),
        (["a", "b", "c"], "at most two results can be compared"),
        (["nowhere"], "nowhere is not the folder of a training: it has no config.yaml"),
        (["a", "--max-detections", "0"], "--max-detections must be >= 1, got 0"),
        (["a", "--score-threshold", "2"], "--score-threshold must be between 0 and 1, got 2.0"),
        (["--annotations", "a.json", "--detections", "b"], "cannot read the annotations a.json"),
    ],
)
def test_mistakes_are_named(words, sentence):
    with pytest.raises(SystemExit, match=f"^error: {sentence}"):
        report.main(words)
