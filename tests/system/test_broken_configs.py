"""Invalid configs: each stops train_net.py with the sentence in docs/broken_input.md."""

import re
import runpy
import sys

import pytest
from broken_page import check_faults, check_sentence
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

import atss.engine.run as way_in
from atss import load_config

# Fault: options of the command line, or the text of a yaml file.
ATSS = "MODEL.ATSS."
CASES = {
    "unknown rule": [ATSS + "ASSIGNER", "NoSuchRule"],
    "a rule that is a page's example now": [ATSS + "ASSIGNER", "TopK"],
    "misspelt rule in a yaml": "MODEL: {ATSS: {ASSIGNERS: {ATTS: {TOP_K: 5}}}}",
    "misspelt argument of a rule": "MODEL: {ATSS: {ASSIGNERS: {ATSS: {TOPK: 5}}}}",
    "ATSS's `ALPHA` beside DDOD": [
        ATSS + "ASSIGNER",
        "DDOD",
        ATSS + "ASSIGNERS.ATSS.ALPHA",
        "0.5",
    ],
    "k of 0": [ATSS + "ASSIGNERS.ATSS.TOP_K", "0"],
    "falling ranges of levels": [
        ATSS + "ASSIGNER",
        "SpatialScale",
        ATSS + "ASSIGNERS.SpatialScale.RANGES",
        "(64, 32, 16, 8)",
    ],
    "ranges for other levels": [
        ATSS + "ASSIGNER",
        "SpatialScale",
        ATSS + "IN_FEATURES",
        "['p3', 'p4']",
    ],
    "level that the backbone does not make": [ATSS + "IN_FEATURES", "['p2', 'p3']"],
    "levels from coarse to fine": [ATSS + "IN_FEATURES", "['p4', 'p3']"],
    "no levels": [ATSS + "IN_FEATURES", "[]"],
    "FPN on stages that are not put out": ["MODEL.RESNETS.OUT_FEATURES", "['res4', 'res5']"],
    "other anchor generator": ["MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator"],
    "unknown anchor generator": ["MODEL.ANCHOR_GENERATOR.NAME", "Grid"],
    "unknown backbone": ["MODEL.BACKBONE.NAME", "resnet"],
    "unknown depth": ["MODEL.RESNETS.DEPTH", "19"],
    "unknown head": [ATSS + "HEAD", "NoHead"],
    "unknown norm in the head": [ATSS + "NORM", "XX"],
    "channels that groups do not divide": ["MODEL.FPN.OUT_CHANNELS", "100"],
    "unknown regression": [ATSS + "REGRESSION", "corner"],
    "corners from a head of convolutions": [ATSS + "REGRESSION", "corners"],
    "soft class targets under the focal loss": [ATSS + "CLS_TARGET", "overlap"],
    "unknown box loss": [ATSS + "BBOX_REG_LOSS_TYPE", "diou"],
    "points with several anchors": [
        ATSS + "REGRESSION",
        "point",
        ATSS + "ANCHOR_SCALES",
        "[4.0, 8.0]",
    ],
    "smooth L1 on points": [ATSS + "REGRESSION", "point", ATSS + "BBOX_REG_LOSS_TYPE", "smooth_l1"],
    "distribution focal loss of deltas": [ATSS + "BBOX_REG_LOSS_TYPE", "giou + dfl"],
    "quality from no distribution": [ATSS + "CENTERNESS", "distribution"],
    "quality without a loss": [ATSS + "QUALITY", ""],
    "distributions without a distance": [
        ATSS + "REGRESSION",
        "distribution",
        ATSS + "REGRESSIONS.distribution.REG_MAX",
        "0",
    ],
    "negative anchor": [ATSS + "ANCHOR_SCALES", "[-8.0]"],
    "no anchor": [ATSS + "ANCHOR_RATIOS", "[]"],
    "text among numbers": [ATSS + "ANCHOR_RATIOS", "['one']"],
    "threshold above 1": [ATSS + "NMS_THRESH_TEST", "1.5"],
    "threshold that is no number": "MODEL: {ATSS: {SCORE_THRESH_TEST: .nan}}",
    "no detections": ["TEST.DETECTIONS_PER_IMAGE", "0"],
    "text for a limit": ["TEST.DETECTIONS_PER_IMAGE", "all"],
    "unknown score": [ATSS + "SCORE", "cubed"],
    "fp16 on a CPU": [ATSS + "PRECISION", "fp16"],
    "unknown precision": [ATSS + "PRECISION", "fp64"],
    "unknown device": ["MODEL.DEVICE", "gpu"],
    "unknown order of channels": ["INPUT.FORMAT", "rgb"],
    "classes against data": [ATSS + "NUM_CLASSES", "7"],
    "unregistered data set": ["DATASETS.TRAIN", "('squares_train',)"],
    "nothing to train on": ["DATASETS.TRAIN", "()"],
    "ranges of views": ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)"],
    "more processes than images": ["--num-gpus", "8", "SOLVER.IMS_PER_BATCH", "4"],
    "parts of no whole images": ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.ACCUMULATE", "3"],
    "negative batch": ["SOLVER.IMS_PER_BATCH", "-2"],
    "batch to measure in a yaml": "SOLVER: {IMS_PER_BATCH: -1}",
    "share of crops above 1": ["INPUT.FULL_SIZE_CROP", "1.5"],
    "negative share of an object": ["INPUT.FULL_SIZE_CROP_MIN_AREA", "-0.1"],
    "two kinds of crops": ["INPUT.FULL_SIZE_CROP", "0.5", "INPUT.SCALE_JITTER", "[0.5, 2.0]"],
    "no iterations": ["SOLVER.MAX_ITER", "0"],
    "misspelt key": ["SOLVER.BASE_LRR", "0.1"],
    "misspelt key in a yaml": "SOLVER: {MAXITER: 5}",
    "misspelt group in a yaml": "MODEL: {ATS: {NMS_THRESH_TEST: 0.5}}",
    "key in the wrong place": ["MODEL.BASE_LR", "0.1"],
    "key below a value": [ATSS + "NORM.GROUPS", "8"],
    "value for a group": [ATSS[:-1], "8"],
    "group for a value in a yaml": "MODEL: {ATSS: {NORM: {GN: 1}}}",
    "key without a value": ["SOLVER.BASE_LR", "0.1", "SEED"],
    "key without a value in a yaml": "MODEL:\n  ATSS:\n    NMS_THRESH_TEST:\n",
    "text for a tuple": ["DATASETS.TRAIN", "squares"],
    "text for a float": [ATSS + "NMS_THRESH_TEST", "high"],
    "text for a number in a yaml": "SOLVER: {BASE_LR: fast}",
    "file that does not exist": None,
    "base that does not exist": "_BASE_: nowhere.yaml\n",
    "misspelt name of the model zoo as base": "_BASE_: ATSS_R_50_FPN_x1\n",
    "base that is no file": "_BASE_: 5\n",
    "key that stands twice in a base": "_BASE_: base.yaml\n",
    "part of a config alone": "OUTPUT_DIR: output/x\n",
    "other version of Detectron2's keys": "VERSION: 1\n",
    "base of itself": "_BASE_: broken.yaml\n",
    "no yaml": "MODEL: [1, 2\n",
    "no keys": "- MODEL\n",
    "empty file": "",
    "key that stands twice": "SOLVER: {BASE_LR: 0.1}\nSEED: 1\nSOLVER: {MAX_ITER: 9}\n",
    "Python in a yaml": "SEED: !!python/object/apply:os.system ['touch exploded']\n",
}


# Arguments of each tool besides --config-file.
DOORS = {
    "assignment_statistics": ["--annotations", "{labels}"],
    "benchmark": ["data"],
    "check_dataset": ["{labels}", "{images}"],
    "convert_checkpoint": ["--to", "mmdet", "x.pth", "y.pth"],
    "demo": ["--weights", "x.pth", "--input", "{images}", "--output", "out"],
    "train_net": [],
}


@pytest.fixture
def data(squares):
    """Yield the options that register the squares; remove them after the test."""
    yield ["--register", f"squares={squares}/annotations.json:{squares}/images"]
    if "squares" in DatasetCatalog:
        DatasetCatalog.remove("squares")
        MetadataCatalog.remove("squares")


def test_page_lists_all_cases():
    check_faults("Configs", list(CASES))


@pytest.mark.parametrize("fault", CASES)
def test_message_is_that_of_the_page(fault, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken, file = CASES[fault], tmp_path / "broken.yaml"
    (tmp_path / "base.yaml").write_text("SEED: 1\nSEED: 2\n")
    if broken is not None:
        base = f"_BASE_: {ROOT}/configs/ATSS_R_18_FPN_small.yaml\n"
        text = broken if isinstance(broken, str) else base
        needs_base = text.startswith(("MODEL: {", "MODEL:\n", "SOLVER: {", "SEED"))
        file.write_text(base + text if needs_base else text)
    options = ["DATASETS.TRAIN", "('squares',)", "DATASETS.TEST", "('squares',)"]
    options = [*options, "MODEL.DEVICE", "cpu"]
    changes = broken if isinstance(broken, list) else []
    flags = 2 if changes and changes[0].startswith("--") else 0
    argv = ["--config-file", str(file), *data, *changes[:flags], *options, *changes[flags:]]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build_model(way_in.prepare(way_in.make_parser().parse_args(argv)))
    check_sentence("Configs", fault, str(caught.value))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("config", ["fine_tune", ROOT / "configs" / "fine_tune.yaml"])
@pytest.mark.parametrize("tool", DOORS)
def test_every_tool_refuses_a_recipe_alone(tool, config, squares, monkeypatch, capsys):
    labels, images = squares / "annotations.json", squares / "images"
    argv = [str(x).format(labels=labels, images=images) for x in DOORS[tool]]
    monkeypatch.setattr(sys, "argv", [tool, *argv, "--config-file", str(config)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    sentence = r"error: config \S*fine_tune\S* is a recipe and sets no MODEL\.META_ARCH"
    assert re.search(sentence, f"{stop.value}{capsys.readouterr().err}")


def test_integer_is_accepted_for_a_float():
    assert load_config(opts=["SOLVER.EPOCHS", "12", "SOLVER.BASE_LR", 1]).SOLVER.EPOCHS == 12.0
