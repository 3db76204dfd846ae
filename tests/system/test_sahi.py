"""Tiled inference by sahi with a run: the code of docs/deploy.md."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT, make_cfg
from detectron2.modeling import build_model
from PIL import Image

import atss

pytest.importorskip("sahi", reason="sahi is not installed")
from sahi.predict import get_prediction

NAMES = ["ant", "bee", "cat"]
PAGE = ROOT / "docs" / "deploy.md"
(CODE,) = re.findall(r"```python\n(import sahi.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(params=["BGR", "RGB"])
def image(request, squares, tmp_path, monkeypatch):
    """A photo of 256 x 192 pixels, and in "out" a run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    opts = ("INPUT.FORMAT", request.param, "INPUT.MIN_SIZE_TEST", 96, "MODEL.FPN.OUT_CHANNELS", 32)
    opts += ("MODEL.ATSS.NUM_CONVS", 0, "MODEL.ATSS.SCORE_THRESH_TEST", 0.0)
    cfg = make_cfg(*opts, "MODEL.ATSS.CLASS_NAMES", NAMES)
    torch.manual_seed(0)
    (tmp_path / "out").mkdir()
    torch.save({"model": build_model(cfg).state_dict()}, "out/model_final.pth")
    (tmp_path / "out" / "config.yaml").write_text(cfg.dump())
    photo = Image.open(squares / "images" / "0.png").convert("RGB").resize((256, 192))
    photo.save("photo.jpg")
    return Image.open("photo.jpg")


@pytest.mark.slow
def test_sahi_detects_as_the_predictor(image):
    code = CODE.replace("confidence_threshold=0.3", "confidence_threshold=0.0")
    code = code.replace("640", "128")
    page: dict = {}
    exec(compile(code, "deploy.md", "exec"), page)
    sliced = np.array([x.bbox.to_xyxy() for x in page["result"].object_prediction_list])
    assert sliced[:, 2].max() > 200
    assert sliced[:, 3].max() > 150

    found = get_prediction(image, page["model"]).object_prediction_list
    expected = atss.Predictor("out")(image)
    assert len(found) == len(expected.boxes) > 10
    boxes = np.array([x.bbox.to_xyxy() for x in found])
    np.testing.assert_allclose(boxes, expected.boxes, atol=1e-2)
    np.testing.assert_allclose([x.score.value for x in found], expected.scores, atol=1e-5)
    assert [x.category.name for x in found] == [NAMES[k] for k in expected.classes]
