import csv
import json
import re
from functools import partial

import assignment_statistics as tool
import numpy as np
import pytest
import torch
from conftest import ROOT, make_cfg
from detectron2.modeling import build_model
from PIL import Image

from atss import Anchors
from atss.analysis.statistics import constants, groups, match, read_objects
from atss.config import build_sampling
from atss.errors import UserError
from atss.labels.check import check, format_report
from atss.labels.coco import find_in_json
from atss.labels.formats import Labels


def run(tmp_path, annotations, *argv, names=("thing",)):
    file = tmp_path / "annotations.json"
    images = [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}]
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    content = {"images": images, "categories": categories}
    numbered = [annotation | {"id": i} for i, annotation in enumerate(annotations, start=1)]
    file.write_text(json.dumps(content | {"annotations": numbered}))
    tool.main(["--annotations", str(file), "--output", str(tmp_path / "out"), *argv])
    with open(tmp_path / "out" / "objects.csv") as table:
        return list(csv.DictReader(table))


def annotation(x, y, w, h, **more):
    return {"image_id": 1, "category_id": 1, "bbox": [x, y, w, h], **more}


def test_counts_by_rule_and_group(tmp_path, capsys):
    boxes = [(0, 0, 20, 20), (100, 100, 50, 50), (200, 100, 300, 90)]
    objects = run(tmp_path, [annotation(*b) for b in boxes])
    assert [float(o["area"]) for o in objects] == [400, 2500, 27000]
    assert [float(o["border"]) for o in objects] == [0, 100, 100]
    assert float(objects[2]["aspect"]) == pytest.approx(300 / 90)
    # 800 / 480 is exact, so that sizes on the canvas are exact.
    assert float(objects[1]["side"]) == pytest.approx(50 * 800 / 480, rel=1e-3)
    for o in objects:
        assert 0 < int(o["ATSS"]) <= 45
        assert 0 < float(o["mean"]) < 1
    table = (tmp_path / "out" / "table.md").read_text()
    assert "0.2 * k * L would be 9.0" in table
    assert "| objects | count | ATSS | MaxIoU | SpatialScale |" in table
    assert "small, < 32² | 1 |" in table
    assert (tmp_path / "out" / "plot.png").is_file()


def test_counts_by_class(tmp_path):
    boxes = [(0, 0, 20, 20), (100, 100, 50, 50), (200, 100, 300, 90)]
    annotations = [annotation(*b, category_id=k) for b, k in zip(boxes, (2, 1, 1), strict=True)]
    objects = run(tmp_path, annotations, "--rules", "SpatialScale", names=("thing", "cat"))
    assert [o["class"] for o in objects] == ["cat", "thing", "thing"]
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [x[:18] for x in lines[-2:]] == ["| class: cat | 1 |", "| class: thing | 2"]


def test_labels_of_any_format_are_read(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "a" / "x.png")
    (tmp_path / "data.yaml").write_text("train: a\nnames: [cat, dog]\n")
    label = tmp_path / "a" / "x.txt"
    label.write_text("1 0.5 0.5 0.25 0.5\n")
    source = f"{tmp_path}/data.yaml:train"
    content, objects, image_dir = read_objects(source)
    assert objects.boxes.tolist() == [[24, 12, 16, 24]]
    assert (tmp_path / image_dir / content["images"][0]["file_name"]).samefile(
        tmp_path / "a" / "x.png"
    )
    with pytest.raises(UserError, match=r"did you mean .*data.yaml:train\?"):
        read_objects(source.removesuffix(":train"))
    label.write_text("2 0.5 0.5 0.25 0.5\n")
    with pytest.raises(UserError, match=r"data.yaml:train has .*class"):
        read_objects(source)


@pytest.mark.parametrize(("count", "lines"), [(1, 0), (2, 2), (20, 20), (21, 0)])
def test_few_classes_are_groups(count, lines):
    properties = {"area": 400.0, "aspect": 1.0, "border": 9.0}
    labels = groups([properties | {"class": f"name {i}"} for i in range(count)])
    assert sum(label.startswith("class: ") for label in labels) == lines


def test_rules_and_options_are_chosen(tmp_path):
    opts = (
        "--rules",
        "SpatialScale",
        "--output",
        str(tmp_path / "out"),
        "MODEL.ATSS.ASSIGNERS.SpatialScale.TOP_K",
        "1",
    )
    (only,) = run(tmp_path, [annotation(100, 100, 80, 80)], *opts)
    assert 1 <= int(only["SpatialScale"]) <= 5  # of 5 levels
    assert "mean" not in only


def test_crowds_are_left_out_and_no_objects_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no objects"):
        run(tmp_path, [annotation(0, 0, 20, 20, iscrowd=1)])


def test_dropped_objects_are_not_counted(tmp_path):
    left_out = [
        annotation(0, 0, 20, 20, iscrowd=1),
        annotation(100, 100, 0, 50),
        annotation(640, 100, 50, 50),
    ]
    (only,) = run(tmp_path, [*left_out, annotation(200, 100, 50, 60)], "--rules", "MaxIoU")
    assert float(only["area"]) == 3000


def test_levels_are_the_configs(tmp_path):
    """An object of 33 pixels on the canvas, which anchors of 512 and 1024 pixels hardly overlap."""
    means = {}
    for levels in ("['p3', 'p4']", "['p6', 'p7']"):
        opts = ("--rules", "ATSS", "--", "MODEL.ATSS.IN_FEATURES", levels)
        (only,) = run(tmp_path, [annotation(100, 100, 20, 20)], *opts)
        means[levels] = float(only["mean"])
        assert "0.2 * k * L would be 3.6" in (tmp_path / "out" / "table.md").read_text()
    assert means["['p3', 'p4']"] > 10 * means["['p6', 'p7']"]


def test_unknown_rule_and_unreadable_file(tmp_path):
    with pytest.raises(SystemExit, match="choose from"):
        run(tmp_path, [annotation(0, 0, 20, 20)], "--rules", "Nearest")
    with pytest.raises(SystemExit, match="cannot read the annotations"):
        tool.main(["--annotations", str(tmp_path / "absent.json")])


def test_unwritable_output_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "compare", None)
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match=r"error: cannot write --output .*out/table.md: File exi"):
        run(tmp_path, [annotation(0, 0, 20, 20)])


def test_several_configs_are_compared_on_their_own_anchors(tmp_path):
    """Nine anchors: 45 candidates with Algorithm 1, nine times as many with the later rule."""
    rows = [str(ROOT / "configs/tables" / f"{r}.yaml") for r in ("atss_A9", "atss_A9_locations")]
    (only,) = run(tmp_path, [annotation(100, 100, 80, 80)], "--config-file", *rows)
    assert 0 < int(only["atss_A9"]) <= 45 < int(only["atss_A9_locations"]) <= 405
    assert "mean" not in only
    assert (
        "| objects | count | atss_A9 | atss_A9_locations |"
        in (tmp_path / "out/table.md").read_text()
    )
    many = [str(f) for f in sorted((ROOT / "configs/tables").glob("atss_k*.yaml"))]
    run(tmp_path, [annotation(100, 100, 80, 80)], "--config-file", *many)
    assert "| atss_k19 | " in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(SystemExit, match="--rules needs a single --config-file, got 2"):
        run(tmp_path, [annotation(0, 0, 9, 9)], "--rules", "ATSS", "--config-file", *rows)


@pytest.fixture
def model(tmp_path):
    """Config and weights of a small model of one class, and an image."""
    cfg = make_cfg("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ATSS.NUM_CONVS", 0)
    cfg.merge_from_list(["MODEL.ATSS.NUM_CLASSES", 1, "MODEL.ATSS.CLASS_NAMES", ["thing"]])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 240, "INPUT.MAX_SIZE_TEST", 320])
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    pixels = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    return ["--config-file", str(tmp_path / "config.yaml"), "--images", str(tmp_path)]


def test_rules_get_predictions_of_a_model(tmp_path, model):
    boxes = [annotation(100, 100, 80, 80), annotation(300, 50, 200, 300)]
    weights = ["--weights", str(tmp_path / "model.pth")]
    found = run(tmp_path, boxes, *model, *weights)
    for rule in ("ATSS", "PAA", "OTA", "SimOTA", "SoftLabel", "TAL"):
        assert sum(int(o[rule]) for o in found) > 0, rule
    assert all(int(o["TAL"]) <= 13 for o in found)
    # Without weights these rules are left out, or refused.
    assert "TAL" not in run(tmp_path, boxes, *model)[0]
    with pytest.raises(SystemExit, match="TAL needs a model's predictions: set --weights"):
        run(tmp_path, boxes, *model, "--rules", "ATSS", "TAL")


def test_weights_of_other_classes_are_refused(tmp_path, model):
    text = (tmp_path / "config.yaml").read_text().replace("- thing", "- other")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit, match=r"has other classes .* \['other'\].* \['thing'\]"):
        run(tmp_path, [annotation(0, 0, 90, 90)], *model, "--weights", str(tmp_path / "model.pth"))


def test_constants_of_similarities_by_brute_force(tmp_path, capsys):
    boxes = [(40, 60, 20, 20), (100, 100, 50, 80)]
    run(tmp_path, [annotation(*b) for b in boxes], "--", "INPUT.MIN_SIZE_TEST", "480")
    printed = capsys.readouterr().out
    found = constants(
        *read_objects(str(tmp_path / "annotations.json"))[:2],
        str(ROOT / "configs/ATSS_R_50_FPN_1x.yaml"),
        ["INPUT.MIN_SIZE_TEST", 480],
    )
    assert found["CONSTANT"] == pytest.approx((20 + 4000**0.5) / 2)
    anchors = Anchors.grid((480, 640))
    x = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]).double().numpy() / 2
    side = (anchors.boxes[:, 2:] - anchors.boxes[:, :2]).double().numpy()
    relative = [
        np.abs(x - np.array([left + w / 2, top + h / 2])) / (side + np.array([w, h]))
        for left, top, w, h in boxes
    ]
    m, n = np.mean(relative, axis=(0, 1))
    assert (found["M"], found["N"]) == pytest.approx((m, n))
    assert f"nwd.CONSTANT {found['CONSTANT']:.3g}, simd.M {m:.3g}, simd.N {n:.3g}" in printed


def test_check_reports_tiny_objects():
    """Objects of 16 x 9 pixels (mean side 12) on an image that is resized to half."""
    images = [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}]
    content = {"images": images, "categories": [{"id": 1, "name": "thing"}]}
    content["annotations"] = [annotation(40 * i + 12, 122, 16, 9, id=i + 1) for i in range(15)]
    for rule, expected in (
        ("ATSS", r"below 6\.0 .* input, and 100\.0% get no"),
        ("TAL", r"below 6\.0 .* input\. "),
    ):
        sampling = build_sampling(make_cfg("MODEL.ATSS.ASSIGNER", rule))
        matcher = partial(match, sampling=sampling, sizes=[(240, 640)])
        report = format_report(check(Labels(content, ""), [(240, 640)], False, matcher))
        assert re.search(f"Tiny objects: half of them have sides {expected}", report)
        assert "5.3 times as large, that becomes 32;" in report
    matcher = partial(match, sampling=sampling, sizes=[(240, 640), (960, 1280)])
    assert "Tiny" not in format_report(
        check(Labels(content, ""), [(240, 640), (960, 1280)], False, matcher)
    )


def test_check_skips_rules_that_need_predictions():
    images = [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}]
    content = {"images": images, "categories": [{"id": 1, "name": "thing"}]}
    content["annotations"] = [annotation(0, 0, 1, 1, id=1), annotation(9, 9, 99, 99, id=2)]
    for rule, expected in (("ATSS", True), ("SimOTA", False)):
        sampling = build_sampling(make_cfg("MODEL.ATSS.ASSIGNER", rule))

        def matcher(content, objects, sampling=sampling):
            return match(content, objects, sampling, [(480, 640)])

        fit = matcher(content, find_in_json(content)[1])
        assert (fit.positives is not None) == expected
        assert (fit.best_iou > 0).all()
        report = check(Labels(content, ""), [(480, 640)], False, matcher)
        kinds = {finding.kind for finding in report.findings}
        assert "object_too_small" in kinds
        assert ("object_without_positive" in kinds) == expected
        assert ("positives_per_object" in report.to_dict()) == expected
        assert ("depends on predictions" in format_report(report)) != expected


def test_check_divides_poor_matches_by_their_reason():
    """A file of 1280 pixels for an input of 320: sides are a fourth."""
    images = [{"id": 1, "file_name": "a.jpg", "width": 1280, "height": 1280}]
    content = {"images": images, "categories": [{"id": 1, "name": "thing"}]}
    boxes = [(600, 600, 30, 30), (600, 600, 60, 60), (100, 600, 1000, 4), (300, 300, 400, 400)]
    content["annotations"] = [annotation(*box, id=i) for i, box in enumerate(boxes, start=1)]
    matcher = partial(match, sampling=build_sampling(make_cfg()), sizes=[(320, 320)])
    found = {x.kind: x for x in check(Labels(content, ""), [(320, 320)], False, matcher).findings}
    expected = {"object_too_small": [0, 1], "object_too_long": [2]}
    poor = {k: x.positions.tolist() for k, x in found.items() if k.startswith("object_too")}
    assert poor == expected
    title = found["object_too_small"].title
    at = "INPUT.MIN_SIZE_TRAIN 320, MAX_SIZE_TRAIN 320 (bbox: pixels of the file)"
    assert title.endswith(f"{at}; with both twice as large about 1")
    again = partial(match, sampling=build_sampling(make_cfg()), sizes=[(640, 640)])
    findings = check(Labels(content, ""), [(640, 640)], False, again).findings
    small = next(x for x in findings if x.kind == "object_too_small")
    assert small.positions.tolist() == [0]
