"""--classes: choose, merge and order classes, in every format."""

import json
import re

import broken
import check_dataset
import pytest
from conftest import ROOT, make_cfg
from detections import truth_as_detections
from detectron2.data import DatasetCatalog, MetadataCatalog

import atss.engine.run as way_in
from atss.engine.evaluation import build_evaluator
from atss.labels.classes import choose, parse
from atss.labels.formats import Reading, read_labels


@pytest.fixture
def sources(tmp_path):
    """{format: annotations:images} of one data set: 8 cats, 4 dogs."""
    content = broken.make_data(tmp_path)
    yaml, folder = broken.write_yolo(content, tmp_path), broken.write_voc(content, tmp_path)
    (tmp_path / "coco.json").write_text(json.dumps(content))
    broken.to_lvis(content)
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    yield {
        "coco": f"{tmp_path}/coco.json:{tmp_path}/images",
        "lvis": f"{tmp_path}/lvis.json:{tmp_path}",
        "yolo": f"{yaml}:train",
        "voc": f"{folder}:train",
    }
    for name in ("first", "second"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def register(*specs, classes=None):
    argv = ["--config-file", str(ROOT / "configs/ATSS_R_18_FPN_small.yaml")]
    argv += [x for spec in specs for x in ("--register", spec)]
    argv += ["--classes", classes] if classes is not None else []
    way_in.register(way_in.make_parser().parse_args(argv))


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("a", {"a": ["a"]}),
        ("b, a", {"b": ["b"], "a": ["a"]}),
        ("a,b=c", {"a": ["a"], "b": ["b", "c"]}),
        ("b=c,a,b=d", {"b": ["b", "c", "d"], "a": ["a"]}),
        ("b,b=c", {"b": ["b", "c"]}),
        ('"a, b",traffic light=a', {"a, b": ["a, b"], "traffic light": ["traffic light", "a"]}),
        ("b=b", {"b": ["b"]}),
    ],
)
def test_parse(text, chosen):
    assert parse(text) == chosen
    assert list(parse(text)) == list(chosen)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "--classes names no class"),
        ("a,,b", "--classes takes NAME,NAME=OTHER,..., got 'a,,b'"),
        ("a=", "--classes takes NAME,NAME=OTHER,..., got 'a='"),
        ("=a", "--classes takes NAME,NAME=OTHER,..., got '=a'"),
        ("a,b=a", "--classes: 'a' counts as both a and b"),
        ("x=c,y=c", "--classes: 'c' counts as both x and y"),
    ],
)
def test_invalid_classes_are_refused(text, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        parse(text)


@pytest.mark.parametrize("form", ["coco", "lvis", "yolo", "voc"])
@pytest.mark.parametrize(
    ("classes", "names", "counts"),
    [
        (None, ["cat", "dog"], [8, 4]),
        ("dog,cat", ["dog", "cat"], [4, 8]),
        ("dog", ["dog"], [4]),
        ("pet=dog,pet=cat", ["pet"], [12]),
        ("cow=dog,cat", ["cow", "cat"], [4, 8]),
        ("cat=dog", ["cat"], [12]),
    ],
)
def test_registered_classes_in_every_format(form, sources, classes, names, counts):
    register(f"first={sources[form]}", classes=classes)
    metadata = MetadataCatalog.get("first")
    assert metadata.thing_classes == names
    records = DatasetCatalog.get("first")
    assert len(records) == 4
    found = [a["category_id"] for record in records for a in record["annotations"]]
    assert [found.count(i) for i in range(len(names))] == counts
    remark = f"classes that --classes leaves out (1): cat ({12 - sum(counts)} objects)"
    expected = remark if sum(counts) < 12 else None
    assert metadata.remarks.get("class_left_out") == expected


@pytest.mark.parametrize("form", ["coco", "lvis", "yolo", "voc"])
def test_evaluation_uses_the_chosen_classes(form, sources, tmp_path):
    register(f"first={sources[form]}", classes="dog,animal=cat")
    assert truth_as_detections("first", ["dog", "animal"], tmp_path)["AP"] == pytest.approx(100)
    half = truth_as_detections("first", ["dog", "animal"], tmp_path, only="dog")
    assert half["AP"] == pytest.approx(50)


def test_sets_of_different_classes_get_the_same_numbers(sources, tmp_path):
    content = broken.make_data(tmp_path / "other")
    content["categories"] = [{"id": 2, "name": "cat"}]
    content["annotations"] = [a | {"category_id": 2} for a in content["annotations"]]
    (tmp_path / "other/a.json").write_text(json.dumps(content))
    other = f"second={tmp_path}/other/a.json:{tmp_path}/other/images"
    register(f"first={sources['voc']}", other, classes="dog,cat")
    for name in ("first", "second"):
        assert MetadataCatalog.get(name).thing_classes == ["dog", "cat"]
    assert {a["category_id"] for r in DatasetCatalog.get("second") for a in r["annotations"]} == {1}


def test_unknown_class_is_refused(sources):
    spec = f"first={sources['coco']}"
    sentence = "--classes: no data set has 'cow': choose from ['cat', 'dog']"
    for classes in ("cow,cat", "cat=cow"):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            register(spec, classes=classes)
        DatasetCatalog.remove("first")
        MetadataCatalog.remove("first")


def test_registering_again_replaces_the_classes(sources):
    for classes in ("cat,dog", "cat,dog", "dog", "dog,cat"):
        register(f"first={sources['coco']}", classes=classes)
        assert MetadataCatalog.get("first").thing_classes == classes.split(",")


def test_a_set_without_annotations_is_not_evaluated(tmp_path):
    """Detections are still written, as for a test server. The name may contain a slash."""
    content = broken.make_data(tmp_path)
    del content["annotations"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    try:
        register(f"my/first={tmp_path}/a.json:{tmp_path}/images", classes="dog")
        cfg = make_cfg("OUTPUT_DIR", str(tmp_path / "out"))
        assert not build_evaluator(cfg, "my/first")._do_evaluation
    finally:
        DatasetCatalog.pop("my/first", None)
        MetadataCatalog.pop("my/first", None)


def test_first_pixel_0_is_used_for_voc(sources, capsys):
    argv = ["--config-file", str(ROOT / "configs/ATSS_R_18_FPN_small.yaml")]
    argv += ["--register", f"first={sources['voc']}", "--first-pixel", "0"]
    way_in.register(way_in.make_parser().parse_args(argv))
    box = DatasetCatalog.get("first")[0]["annotations"][0]["bbox"]
    assert box == [5, 11, 15, 19]  # 1-based: [4, 10, 16, 20]


def test_check_dataset_with_classes(sources, capsys):
    paths = sources["voc"].rsplit(":", 1)
    config = ["--config-file", str(ROOT / "configs/ATSS_R_18_FPN_small.yaml")]
    assert check_dataset.main([*paths, "--classes", "dog", *config]) == 0
    out = capsys.readouterr().out
    assert "1  classes that --classes leaves out\n             cat (8 objects)\n" in out
    assert "        4          4  dog" in out
    assert check_dataset.main([*paths, "--classes", "cow", *config]) == 2
    assert "--classes: no data set has 'cow'" in capsys.readouterr().err


def test_lvis_lists_get_the_new_ids(tmp_path):
    """A merged class is absent if all its members are."""
    content = broken.make_data(tmp_path)
    broken.to_lvis(content)
    content["categories"].append({"id": 3, "name": "cow", "frequency": "c"})
    content["images"][0] |= {"neg_category_ids": [1, 3], "not_exhaustive_category_ids": [2]}
    content["images"][1] |= {"neg_category_ids": [1, 2], "not_exhaustive_category_ids": []}
    chosen, _, found = choose(content, parse("cow,pet=cat,pet=dog"))
    assert found == {"cow", "cat", "dog"}
    lists = ("neg_category_ids", "not_exhaustive_category_ids")
    assert [chosen["images"][0][key] for key in lists] == [[1], [2]]
    assert [chosen["images"][1][key] for key in lists] == [[2], []]
    assert [(c["id"], c["name"], c["frequency"]) for c in chosen["categories"]] == [
        (1, "cow", "c"),
        (2, "pet", "r"),
    ]


@pytest.mark.parametrize(
    ("absent", "partly", "marked", "expected"),
    [
        ([1, 2], [], [], ([1], [])),
        ([2], [], [1], ([], [])),  # one is fully marked, the other absent
        ([], [], [1], ([], [1])),  # the other is unknown
        ([], [], [1, 2], ([], [])),
        ([2], [1], [1], ([], [1])),
        ([], [], [], ([], [])),
        ([1], [], [], ([], [])),
    ],
)
def test_lvis_lists_of_merged_classes(absent, partly, marked, expected):
    content = {
        "categories": [
            {"id": 1, "name": "cat", "frequency": "r"},
            {"id": 2, "name": "dog", "frequency": "f"},
        ],
        "images": [{"id": 7, "neg_category_ids": absent, "not_exhaustive_category_ids": partly}],
        "annotations": [{"image_id": 7, "category_id": c} for c in marked],
    }
    for order in ("pet=cat,pet=dog", "pet=dog,pet=cat"):
        chosen, *_ = choose(content, parse(order))
        image = chosen["images"][0]
        assert (image["neg_category_ids"], image["not_exhaustive_category_ids"]) == expected
        assert chosen["categories"] == [{"id": 1, "name": "pet", "frequency": "f"}]


def test_malformed_entries_are_still_reported(tmp_path):
    content = broken.make_data(tmp_path)
    content["annotations"][0]["category_id"] = 77
    content["annotations"][1]["category_id"] = [1]
    (tmp_path / "a.json").write_text(json.dumps(content))
    source = f"first={tmp_path}/a.json:{tmp_path}/images"
    sentence = "annotations with an unknown category_id (2): annotation 1 of a.png"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        register(source, classes="cat,dog")
    content["annotations"] = content["annotations"][2:]
    twice = content | {"categories": [*content["categories"], {"id": 1, "name": "cow"}]}
    (tmp_path / "a.json").write_text(json.dumps(twice))
    with pytest.raises(ValueError, match="duplicate category ids"):
        register(source, classes="cat,dog")
    for image in content["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for category in content["categories"]:
        category["frequency"] = "f"
    content["images"][0]["id"] = [1]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="ids that are not whole numbers"):
        register(source, classes="cat,dog")
    del content["categories"][0]["name"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="entry 0 of 'categories' has no 'name'"):
        register(source, classes="cat,dog")


def test_blanks_around_a_name_are_ignored(tmp_path):
    """--classes cannot contain them."""
    content = broken.make_data(tmp_path)
    content["categories"][1]["name"] = "cat "
    chosen, left_out, found = choose(content, parse("cat"))
    assert {a["category_id"] for a in chosen["annotations"]} == {1}
    assert (len(chosen["annotations"]), left_out, found) == (12, [], {"cat"})


def test_reading_does_not_change_the_source(sources):
    annotations, images = sources["coco"].rsplit(":", 1)
    before = read_labels(annotations, images).content
    read_labels(annotations, images, Reading(parse("dog")))
    assert read_labels(annotations, images).content == before
