"""Broken data sets in training and in tools/check_dataset.py. broken.py has the cases."""

import json
import re
import sys
from dataclasses import replace

import broken
import check_dataset
import pytest
import torch
from broken import CASES, HEIGHT, SECTIONS, WIDTH, Case, break_data
from broken_page import PAGE, RUN, format_cases, replace_table
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
    """train(annotations, images) returns the mapped examples and the logged remarks."""

    def read(annotations, images):
        register(f"broken={annotations}:{images}")
        refuse_unannotated(["broken"])
        records = get_detection_dataset_dicts(["broken"])
        mapper = Mapper(cfg, is_train=True)
        return [mapper(r) for r in records], MetadataCatalog.get("broken").remarks

    cfg = make_cfg("INPUT.MIN_SIZE_TRAIN", (HEIGHT,), "INPUT.RANDOM_FLIP", "none")
    yield read
    if "broken" in DatasetCatalog:
        DatasetCatalog.remove("broken")
        MetadataCatalog.remove("broken")


def inspect(case, root, *options, lvis=False):
    """Return the exit status and report of check_dataset.py."""
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
    findings = {finding["kind"]: finding for finding in report["findings"]}
    errors = [kind for kind in findings if KINDS[kind].level == ERROR]
    is_error = bool(case.kind) and KINDS[case.kind].level == ERROR
    assert errors == [case.kind] * is_error
    assert status == is_error
    if not is_error:
        assert sum(of_class["objects"] for of_class in report["classes"]) == case.objects
    if not case.kind:
        assert not findings
        return
    finding = findings[case.kind]
    assert any(case.thing in place for place in finding["where"])
    assert finding["count"] == len(finding["where"])
    assert f"{finding['count']:>9,}  {finding['what']}" in captured.out


SHARED = [
    case
    for case in (*broken.STRUCTURE, *broken.ENTRIES, *broken.ANNOTATIONS)
    # LVIS has no file names, and is not recognised without images.
    if "file_name" not in case.name
    and "of one file" not in case.name
    and case.name not in ("no images", "an empty list of images", "a list instead of a dict")
]


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_lvis_gives_the_same_errors(case, train, tmp_path):
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
    page = PAGE.read_text()
    for heading, cases in SECTIONS.items():
        assert replace_table(page, heading, format_cases(cases)) == page, f"{heading}: {RUN}"


def test_every_finding_has_a_case():
    assert len({(case.name, case.kind) for case in CASES}) == len(CASES)
    tested_elsewhere = {
        "object_too_small",
        "object_too_large",
        "object_too_long",
        "image_without_objects",
        "image_huge",
        "class_left_out",
        "image_in_other_split",
        "image_of_same_scene_in_other_split",
    }
    assert {case.kind for case in CASES} >= set(KINDS) - tested_elsewhere


def test_every_error_of_annotations_stops_training():
    for case in CASES:
        if case.kind and KINDS[case.kind].level == ERROR:
            assert case.training == "stops", case.name


def test_the_value_at_fault_is_shown(tmp_path):
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
    """With a byte-order mark and backslashes, which may be part of the names of files."""
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


def test_similar_class_names_are_adjacent(tmp_path):
    content = broken.make_data(tmp_path / "data")
    names = ["RBC", "WBC", "a b", "rbc", "dog", "WBC ", "AB", "RBC"]
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    (finding,) = (f for f in find_in_json(content)[0] if f.kind == "category_name_similar")
    shown = [example.partition("name ")[2] for example in finding.examples()]
    assert shown == ["'a b'", "'AB'", "'RBC'", "'rbc'", "'RBC'", "'WBC'", "'WBC '"]


def test_complete_images_are_not_decoded(tmp_path, monkeypatch):
    decoded, read_header = [], check.read_header

    def spy(path, decode=False):
        decoded.extend([path] * decode)
        return read_header(path, decode)

    monkeypatch.setattr(check, "read_header", spy)
    assert inspect(SOUND, tmp_path / "sound")[0] == 0
    assert decoded == []
    inspect(SOUND, tmp_path / "deep", "--deep")
    assert len(decoded) == 4


def test_report_of_classes_and_anchors(tmp_path):
    _, report = inspect(SOUND, tmp_path / "data")
    cat, dog = report["classes"]
    assert cat == {"name": "cat", "objects": 8, "images": 4}
    assert dog == {"name": "dog", "objects": 4, "images": 4}
    # 16 x 20 of 48 px become 107 x 133 of 320 px: the anchor of 128 px, its centre within 8 px.
    assert 0.7 < report["best_iou"]["p50"] < 0.9
    assert report["positives_per_object"] > 3


def test_best_iou_equals_brute_force(tmp_path):
    """With several shapes per location and boxes at borders."""
    generator = torch.Generator().manual_seed(0)
    anchors = Anchors.grid((160, 224), scales=(4.0, 6.0), ratios=(0.5, 1.0, 2.0))
    corner = torch.rand(200, 2, generator=generator) * torch.tensor([224.0, 160.0]) - 10
    boxes = torch.cat([corner, corner + torch.rand(200, 2, generator=generator) * 150], dim=1)
    expected = iou(anchors.boxes[:, None].double(), boxes.double()).amax(dim=0)
    torch.testing.assert_close(torch.from_numpy(statistics._best_iou(anchors, boxes)), expected)


@pytest.mark.parametrize("in_one", [False, True])
def test_a_config_with_fewer_levels(tmp_path, in_one):
    """The source is one argument or two."""
    paths = list(map(str, break_data(SOUND, tmp_path / "the data")))
    argv = [":".join(paths)] if in_one else paths
    argv += ["--config-file", str(ROOT / "configs/demo.yaml")]
    assert check_dataset.main(argv) == 0
    assert check_dataset.main([*argv, "MODEL.ATSS.ASSIGNER", "Nonesuch"]) == 2


@pytest.mark.parametrize(
    ("source", "hint"),
    [("d.yaml", "did you mean d.yaml:train?"), ("d:train", "did you mean the file d/data.yaml?")],
)
def test_a_source_without_its_split_gets_a_hint(tmp_path, monkeypatch, capsys, source, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("d.yaml", "d/data.yaml"):
        (tmp_path / name).write_text("{train: images, names: [cat]}")
    assert check_dataset.main([source]) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("source", ["{}", "{}:nowhere", "nowhere:{}", "nowhere"])
def test_an_incomplete_source_is_refused(tmp_path, capsys, source):
    json_file, _ = break_data(SOUND, tmp_path / "data")
    assert check_dataset.main([source.format(json_file)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_config_with_an_imported_rule(tmp_path, capsys, monkeypatch):
    paths = list(map(str, break_data(SOUND, tmp_path / "data")))
    (tmp_path / "imported_rule.py").write_text(
        "from atss.assigners import ASSIGNER_REGISTRY, ATSS\n"
        "ASSIGNER_REGISTRY.register(type('ImportedRule', (ATSS,), {}))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ["--import", "imported_rule", "--config-file", CONFIG]
    try:
        assert check_dataset.main([*paths, *options, "MODEL.ATSS.ASSIGNER", "ImportedRule"]) == 0
    finally:
        ASSIGNER_REGISTRY.entries.pop("ImportedRule", None)
    assert check_dataset.main([*paths, "--import", "no_such_rule"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --import no_such_rule: No module named 'no_such_rule'; ")
    assert err.endswith("pass its path, such as --import path/to/no_such_rule.py\n")


def test_an_unwritable_report_is_refused_first(tmp_path, capsys):
    paths = [*map(str, break_data(SOUND, tmp_path / "data"))]
    assert check_dataset.main([*paths, "--json", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: cannot write --json {tmp_path}: Is a directory\n"
    assert not captured.out
    assert check_dataset.main([*paths, "--json", paths[0]]) == 2
    assert capsys.readouterr().err == f"error: --json {paths[0]} would replace the annotations\n"


def test_training_ends_with_the_sentence(tmp_path):
    """With a worker process: the last line names the file, and only log.txt has the traceback.
    Dropped objects are logged before."""
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
    output, exit_code = Script(command).communicate()
    assert exit_code == 1
    last = output.strip().splitlines()[-1]
    assert re.search(r"cannot read the image .*a\.png: .*truncated", last), output[-1500:]
    assert "Traceback" not in output
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Traceback" in log
    assert "Data set broken has crowds (1): annotation 1 of a.png" in log
