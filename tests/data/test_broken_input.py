"""Broken data sets at both doors: training, and tools/check_dataset.py. The cases: broken.py."""

import json
import re
import sys
from dataclasses import replace

import broken
import check_dataset
import pytest
import torch
from broken import CASES, HEIGHT, SECTIONS, WIDTH, Case, break_data, table
from conftest import ROOT, make_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from processes import Script

from atss import Anchors
from atss.analysis import statistics
from atss.assigners import ASSIGNER_REGISTRY
from atss.data.datasets import refuse_unannotated, register
from atss.data.mapper import Mapper
from atss.geometry import iou
from atss.labels import check
from atss.labels.coco import find_in_json
from atss.labels.findings import ERROR, FAULTY_FIELDS, KINDS
from atss.labels.formats import read_labels

SOUND = Case("nothing", lambda content, root: None, "trains", "", "")
CONFIG = str(ROOT / "configs" / "ATSS_R_18_FPN_small.yaml")


@pytest.fixture
def train():
    """What training does with a data set before the model sees it: train(annotations, images)
    gives the mapped examples, and what the log says."""

    def door(annotations, images):
        register(f"broken={annotations}:{images}")
        refuse_unannotated(["broken"])
        records = get_detection_dataset_dicts(["broken"])
        mapper = Mapper(cfg, is_train=True)
        return [mapper(r) for r in records], MetadataCatalog.get("broken").remarks

    cfg = make_cfg("INPUT.MIN_SIZE_TRAIN", (HEIGHT,), "INPUT.RANDOM_FLIP", "none")
    yield door
    if "broken" in DatasetCatalog:
        DatasetCatalog.remove("broken")
        MetadataCatalog.remove("broken")


def inspect(case, root, *options, lvis=False):
    """Exit status and report of check_dataset.py."""
    paths = map(str, break_data(case, root, lvis))
    target = root / "report.json"
    status = check_dataset.main([*paths, "--config-file", CONFIG, "--json", str(target), *options])
    return status, json.loads(target.read_text()) if target.is_file() else None


@pytest.mark.parametrize("case", [SOUND, *CASES], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")  # Pillow's, of some of these files
def test_training(case, train, tmp_path):
    paths = break_data(case, tmp_path / "data")
    if case.training == "stops":
        with pytest.raises((ValueError, OSError), match=re.escape(case.sentence)) as error:
            train(*paths)
        sentence = str(error.value)
        assert case.thing in sentence
        assert "\n" not in sentence
        return
    examples, remarks = train(*paths)
    assert sum(len(e["instances"]) for e in examples) == case.objects
    if case.training == "leaves out" and case.sentence:
        assert case.sentence in remarks[case.kind]
        assert case.thing in remarks[case.kind]
    if case.training == "trains" and "logged" in case.sentence:
        assert case.thing in remarks[case.kind]
    if case.colour:
        image = examples[0]["image"].float()  # BGR
        assert image.shape == (3, HEIGHT, WIDTH)
        expected = torch.tensor(case.colour[::-1]).float()[:, None, None]
        assert (image - expected).abs().max() <= 4  # of a lossy format


@pytest.mark.parametrize("case", [SOUND, *CASES], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_check_dataset(case, tmp_path, capsys):
    deep = ["--deep"] if "middle" in case.name else []
    status, report = inspect(case, tmp_path / "data", *deep)
    captured = capsys.readouterr()
    if case.kind is None:
        assert status == 2
        assert captured.err.startswith("error: ")
        assert case.sentence in captured.err
        assert captured.err.count("\n") == 1
        return
    found = {finding["kind"]: finding for finding in report["findings"]}
    errors = [kind for kind in found if KINDS[kind].level == ERROR]
    is_error = bool(case.kind) and KINDS[case.kind].level == ERROR
    assert errors == [case.kind] * is_error
    assert status == is_error
    if not is_error:
        assert sum(of_class["objects"] for of_class in report["classes"]) == case.objects
    if not case.kind:
        assert not found
        return
    finding = found[case.kind]
    assert any(case.thing in where for where in finding["where"])
    assert finding["count"] == len(finding["where"])
    assert f"{finding['count']:>9,}  {finding['what']}" in captured.out


SHARED = [
    case
    for case in (*broken.STRUCTURE, *broken.ENTRIES, *broken.ANNOTATIONS)
    # LVIS has no file names, and without images or categories nothing says that it is LVIS's.
    if "file_name" not in case.name
    and "of one file" not in case.name
    and case.name
    not in ("no images", "an empty list of images", "a list, where a dictionary belongs")
]


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_of_lvis_the_same_is_said(case, train, tmp_path):
    status, report = inspect(case, tmp_path / "data", lvis=True)
    if case.kind is None:
        assert status == 2
    elif case.kind:
        assert case.kind in {finding["kind"] for finding in report["findings"]}
        assert status == (KINDS[case.kind].level == ERROR)
    if case.training == "stops":
        with pytest.raises((ValueError, OSError), match=re.escape(case.sentence)):
            train(*break_data(case, tmp_path / "again", lvis=True))


def test_the_page_and_the_cases_agree():
    page = (ROOT / "docs" / "broken_input.md").read_text()
    for heading, cases in SECTIONS.items():
        for level, title in enumerate(heading.split(": "), start=2):
            assert f"\n{'#' * level} {title}\n" in page
        assert table(cases) in page, f"python tests/broken.py prints the new table of {heading}"


def test_every_finding_has_a_case():
    assert len({(case.name, case.kind) for case in CASES}) == len(CASES)
    by_files_alone = {"object_poorly_matched", "image_without_objects", "image_huge"}
    by_options = {
        "class_left_out",
        "image_in_other_split",
        "image_of_same_scene_in_other_split",
    }
    assert {case.kind for case in CASES} >= set(KINDS) - by_files_alone - by_options


def test_every_error_of_annotations_stops_training():
    for case in CASES:
        if case.kind and KINDS[case.kind].level == ERROR:
            assert case.training == "stops", case.name


def test_the_value_at_fault_is_shown(tmp_path):
    """Of many, too; a field is one of those that COCO's format has."""
    assert set(FAULTY_FIELDS) <= set(KINDS)
    points = [1, 2, 2] * 10 + [None, 2, 2]
    case = Case("", broken.put("annotations", 0, "keypoints", points), "stops", "", "")
    _, report = inspect(case, tmp_path / "data")
    assert report["findings"][0]["where"] == [f"annotation 1 of a.png, keypoints {points}"]
    content = broken.make_data(tmp_path / "sound")
    for image in content["images"]:
        image["id"] = f"{image['id']}"
    assert find_in_json(content)[0][0].examples(1) == [
        "annotation 1 of image 1, image_id 1 is a whole number, and ids are text"
    ]


@pytest.mark.parametrize("literal", [False, True])
def test_a_json_from_windows_is_read(tmp_path, literal):
    """With a byte-order mark and backslashes, unless files are called so."""
    content = broken.make_data(tmp_path)
    names = [rf"images\{image['file_name']}" for image in content["images"]]
    for image, name in zip(content["images"], names, strict=True):
        image["file_name"] = name
        if literal:
            broken.plain().save(tmp_path / name)
    json_file = tmp_path / "windows.json"
    json_file.write_text(json.dumps(content), encoding="utf-8-sig")
    labels = read_labels(str(json_file), str(tmp_path))
    expected = names if literal else [f"images/{x}.png" for x in "abcd"]
    assert [image["file_name"] for image in labels.content["images"]] == expected
    assert check_dataset.main([str(json_file), str(tmp_path)]) == 0


def test_names_that_are_almost_equal_are_shown_together(tmp_path):
    content = broken.make_data(tmp_path / "data")
    names = ["RBC", "WBC", "a b", "rbc", "dog", "WBC ", "AB", "RBC"]
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    (finding,) = (f for f in find_in_json(content)[0] if f.kind == "category_name_similar")
    shown = [example.partition("name ")[2] for example in finding.examples()]
    assert shown == ["'a b'", "'AB'", "'RBC'", "'rbc'", "'RBC'", "'WBC'", "'WBC '"]


def test_truncated_images_are_found_without_decoding_the_others(tmp_path, monkeypatch):
    """The cheap test for truncated files: only what does not end as its format ends is decoded."""
    decoded, read_header = [], check.read_header

    def spy(path, decode=False):
        decoded.extend([path] * decode)
        return read_header(path, decode)

    monkeypatch.setattr(check, "read_header", spy)
    assert inspect(SOUND, tmp_path / "sound")[0] == 0
    assert decoded == []
    inspect(SOUND, tmp_path / "deep", "--deep")
    assert len(decoded) == 4


def test_objects_are_counted_by_class_and_matched_to_anchors(tmp_path):
    _, report = inspect(SOUND, tmp_path / "data")
    cat, dog = report["classes"]
    assert cat == {"name": "cat", "objects": 8, "images": 4}
    assert dog == {"name": "dog", "objects": 4, "images": 4}
    # 16 x 20 of 48 px become 107 x 133 of 320 px: the anchor of 128 px, its centre within 8 px.
    assert 0.7 < report["best_iou"]["p50"] < 0.9
    assert report["positives_per_object"] > 3


def test_best_iou_is_that_of_all_anchors(tmp_path):
    """Against a look at every anchor, with several shapes per location and boxes at borders."""
    generator = torch.Generator().manual_seed(0)
    anchors = Anchors.grid((160, 224), scales=(4.0, 6.0), ratios=(0.5, 1.0, 2.0))
    corner = torch.rand(200, 2, generator=generator) * torch.tensor([224.0, 160.0]) - 10
    boxes = torch.cat([corner, corner + torch.rand(200, 2, generator=generator) * 150], dim=1)
    every = iou(anchors.boxes[:, None].double(), boxes.double()).amax(dim=0)
    torch.testing.assert_close(torch.from_numpy(statistics._best_iou(anchors, boxes)), every)


@pytest.mark.parametrize("in_one", [False, True])
def test_a_config_of_fewer_levels(tmp_path, in_one):
    """Strides are the backbone's, not five by habit; the source in one argument or in two."""
    paths = list(map(str, break_data(SOUND, tmp_path / "the data")))
    argv = [":".join(paths)] if in_one else paths
    argv += ["--config-file", str(ROOT / "configs/demo.yaml")]
    assert check_dataset.main(argv) == 0
    assert check_dataset.main([*argv, "MODEL.ATSS.ASSIGNER", "Nonesuch"]) == 2


@pytest.mark.parametrize("source", ["{}", "{}:nowhere", "nowhere:{}", "nowhere"])
def test_a_source_without_images(tmp_path, capsys, source):
    json_file, _ = break_data(SOUND, tmp_path / "data")
    assert check_dataset.main([source.format(json_file)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_config_with_an_own_rule(tmp_path, capsys, monkeypatch):
    paths = list(map(str, break_data(SOUND, tmp_path / "data")))
    (tmp_path / "rule_of_ones_own.py").write_text(
        "from atss.assigners import ASSIGNER_REGISTRY, ATSS\n"
        "ASSIGNER_REGISTRY.register(type('RuleOfOnesOwn', (ATSS,), {}))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = ["--import", "rule_of_ones_own"]
    rule = ["MODEL.ATSS.ASSIGNER", "RuleOfOnesOwn"]
    try:
        assert check_dataset.main([*paths, *own, "--config-file", CONFIG, *rule]) == 0
    finally:
        ASSIGNER_REGISTRY.entries.pop("RuleOfOnesOwn", None)
    assert check_dataset.main([*paths, "--import", "no_such_rule"]) == 2
    said = capsys.readouterr().err
    assert said == "error: --import no_such_rule: No module named 'no_such_rule'\n"


def test_a_report_that_cannot_be_written_is_said_first(tmp_path, capsys):
    paths = [*map(str, break_data(SOUND, tmp_path / "data"))]
    assert check_dataset.main([*paths, "--json", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err == f"error: cannot write --json {tmp_path}: Is a directory\n"
    assert not said.out
    assert check_dataset.main([*paths, "--json", paths[0]]) == 2
    assert capsys.readouterr().err == f"error: --json {paths[0]} would replace the annotations\n"


def test_training_stops_with_the_sentence_last(tmp_path):
    """Through the command, in a worker process: the file's name is in the last line, and the
    traceback in the log's file alone. What is left out has been logged before."""
    truncated, crowd = (
        next(case for case in CASES if case.name == name)
        for name in ("a truncated JPEG", "a crowd")
    )

    def both(content, root):
        truncated.change(content, root)
        crowd.change(content, root)

    json_file, image_dir = break_data(replace(truncated, change=both), tmp_path / "data")
    command = [ROOT / "tools/train_net.py"]
    command += ["--config-file", CONFIG, "--register", f"broken={json_file}:{image_dir}"]
    command += ["DATASETS.TRAIN", "('broken',)", "DATASETS.TEST", "()"]
    command += ["DATALOADER.NUM_WORKERS", "1", "SOLVER.MAX_ITER", "4"]
    command += ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
    said, exit_code = Script(command).communicate()
    assert exit_code == 1
    last = said.strip().splitlines()[-1]
    assert re.search(r"cannot read the image .*a\.png: .*truncated", last), said[-1500:]
    assert "Traceback" not in said
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Traceback" in log
    assert "Data set broken has crowds (1): annotation 1 of a.png" in log
