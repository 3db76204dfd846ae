"""An exported file beside the detector that it was made of."""

import json

import numpy as np
import onnx
import pytest
import torch
from conftest import make_cfg
from detectron2.modeling import build_model

import atss_runner
from atss import Predictor
from atss.errors import UserError
from atss.export import export_onnx

SMALL = ("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ATSS.NUM_CONVS", 1, "INPUT.MIN_SIZE_TEST", 96)


def build(*opts, config=""):
    """A config with class names, and its model with stirred norms."""
    names = ("MODEL.ATSS.CLASS_NAMES", ["ant", "bee", "cat"], "MODEL.ATSS.NUM_CLASSES", 3)
    cfg = make_cfg(*SMALL, "MODEL.ATSS.SCORE_THRESH_TEST", 0.0, *names, *opts, config=config)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
    return cfg, model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The file, and a Predictor of the same weights."""
    folder = tmp_path_factory.mktemp("exported")
    cfg, model = build()
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    export_onnx(model, cfg, folder / "model.onnx")
    return folder / "model.onnx", Predictor(cfg, folder / "model.pth")


def assert_equal(found, expected):
    assert len(found.boxes) == len(expected.boxes) > 0
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    for box, k in zip(expected.boxes, expected.classes, strict=True):
        same = (found.classes == k) & (np.abs(found.boxes - box).max(axis=1) < 1e-2)
        assert same.any()


def test_detections_are_those_of_the_predictor(exported, squares):
    file, predictor = exported
    images = sorted(map(str, (squares / "images").iterdir()))
    detector = atss_runner.load(file)
    for found, expected in zip(detector(images), predictor(images), strict=True):
        assert_equal(found, expected)
    assert detector.names == predictor.names
    assert_equal(detector(images[0]), predictor(images[0]))


def test_file_names_no_local_path(exported):
    file, _ = exported
    assert b".py" not in file.read_bytes()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda file: file.write_text("no model"), "cannot load"),
        (lambda file: file.write_bytes(file.read_bytes()[:9999]), "cannot load"),
        (lambda file: change(file, None), "no exported detector: it has no metadata"),
        (lambda file: change(file, {"schema": 2}), "schema 2, this runner reads up to 1"),
        (lambda file: file.unlink(), "does not exist"),
    ],
)
def test_other_files_are_refused(exported, tmp_path, spoil, sentence):
    file = tmp_path / "model.onnx"
    file.write_bytes(exported[0].read_bytes())
    spoil(file)
    with pytest.raises(atss_runner.FileError, match=f"model.onnx .*{sentence}|{sentence}.*onnx"):
        atss_runner.load(file)


def change(file, values):
    model = onnx.load(str(file))
    (entry,) = model.metadata_props
    if values is None:
        del model.metadata_props[:]
    else:
        entry.value = json.dumps(json.loads(entry.value) | values)
    onnx.save(model, str(file))


def test_sides_must_be_multiples_of_the_divisor(exported):
    detector = atss_runner.load(exported[0])
    with pytest.raises(atss_runner.FileError, match=r"multiples of \d+, got 100 x 128"):
        detector.run(np.zeros((1, 3, 100, 128), np.float32))


def test_config_without_class_names_is_refused(tmp_path):
    cfg, model = build()
    cfg.MODEL.ATSS.CLASS_NAMES = []
    with pytest.raises(UserError, match="no class names"):
        export_onnx(model, cfg, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_file_that_differs_is_removed(tmp_path, monkeypatch):
    cfg, model = build()
    raw, calls = model.raw, []

    def differing(pixels):
        calls.append(pixels)
        boxes, *others = raw(pixels)
        return boxes if torch.compiler.is_exporting() else boxes + 1, *others

    monkeypatch.setattr(model, "raw", differing)
    with pytest.raises(UserError, match="the exported file differs from the detector: boxes by 1"):
        export_onnx(model, cfg, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["ATSS_lite0_FPN_fine_tune", "tables/atss_A9", "ATSS_dcnv2_R_50_FPN_1x"]
    + [f"successors/{x}_R_50_FPN_1x" for x in ("GFLv2", "TOOD", "VFNet", "DDOD", "POTO", "PAA")],
)
def test_kinds_of_networks_export(name, tmp_path):
    opts = ("MODEL.TIMM.PRETRAINED", False, "MODEL.ATSS.PRECISION", "fp32")
    cfg, model = build(*opts, config=f"{name}.yaml")
    parities = export_onnx(model, cfg, tmp_path / "model.onnx")
    assert len(parities) == 3
