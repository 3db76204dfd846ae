import csv
import json

import assignment_statistics as tool
import pytest
from conftest import ROOT


def run(tmp_path, annotations, *argv):
    file = tmp_path / "annotations.json"
    images = [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}]
    content = {"images": images, "categories": [{"id": 1, "name": "thing"}]}
    numbered = [annotation | {"id": i} for i, annotation in enumerate(annotations, start=1)]
    file.write_text(json.dumps(content | {"annotations": numbered}))
    tool.main(["--annotations", str(file), "--output", str(tmp_path / "out"), *argv])
    with open(tmp_path / "out" / "objects.csv") as table:
        return list(csv.DictReader(table))


def annotation(x, y, w, h, **more):
    return {"image_id": 1, "category_id": 1, "bbox": [x, y, w, h], **more}


def test_counts_by_rule_and_sorts_by_kind(tmp_path, capsys):
    boxes = [(0, 0, 20, 20), (100, 100, 50, 50), (200, 100, 300, 90)]
    objects = run(tmp_path, [annotation(*b) for b in boxes])
    assert [float(o["area"]) for o in objects] == [400, 2500, 27000]
    assert [float(o["border"]) for o in objects] == [0, 100, 100]
    assert float(objects[2]["aspect"]) == pytest.approx(300 / 90)
    # 800 / 480 is exact, so that sizes on the canvas are.
    assert float(objects[1]["side"]) == pytest.approx(50 * 800 / 480, rel=1e-3)
    for o in objects:
        assert 0 < int(o["ATSS"]) <= 45
        assert int(o["TopK"]) <= 9
        assert 0 < float(o["mean"]) < 1
    table = (tmp_path / "out" / "table.md").read_text()
    assert "0.2 * k * L would be 9.0" in table
    assert "| objects | count | ATSS | MaxIoU | SpatialScale | TopK |" in table
    assert "small, < 32² | 1 |" in table
    assert (tmp_path / "out" / "plot.png").is_file()


def test_rules_and_arguments_are_chosen(tmp_path):
    opts = (
        "--rules",
        "TopK",
        "--output",
        str(tmp_path / "out"),
        "MODEL.ATSS.ASSIGNERS.TopK.TOP_K",
        "3",
    )
    (only,) = run(tmp_path, [annotation(100, 100, 80, 80)], *opts)
    assert only["TopK"] == "3"
    assert "mean" not in only


def test_crowds_are_left_out_and_nothing_left_is_said(tmp_path):
    with pytest.raises(SystemExit, match="has no objects"):
        run(tmp_path, [annotation(0, 0, 20, 20, iscrowd=1)])


def test_what_training_leaves_out_is_not_counted(tmp_path):
    left_out = [
        annotation(0, 0, 20, 20, iscrowd=1),
        annotation(100, 100, 0, 50),
        annotation(640, 100, 50, 50),
        annotation(100, 100, 50, 50, segmentation=[[1, 2, 9, 9]]),
    ]
    (only,) = run(tmp_path, [*left_out, annotation(200, 100, 50, 60)], "--rules", "TopK")
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
    with pytest.raises(SystemExit, match="known are"):
        run(tmp_path, [annotation(0, 0, 20, 20)], "--rules", "Nearest")
    with pytest.raises(SystemExit, match="cannot read the annotations"):
        tool.main(["--annotations", str(tmp_path / "absent.json")])


def test_an_output_that_cannot_be_written_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "compare", None)
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match=r"error: cannot write --output .*out/table.md: File exi"):
        run(tmp_path, [annotation(0, 0, 20, 20)])


def test_several_configs_are_compared_on_their_own_anchors(tmp_path):
    """Nine anchors: 45 candidates under Algorithm 1, nine times as many under the later rule."""
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
    with pytest.raises(SystemExit, match="--rules is for one config"):
        run(tmp_path, [annotation(0, 0, 9, 9)], "--rules", "ATSS", "--config-file", *rows)
