"""A detector from its config and weights. Drawing and films: tests/tools/test_demo.py."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import make_cfg
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.modeling import build_model
from PIL import Image

from atss.checkpoints import WeightsError
from atss.modeling import SUPPRESSIONS
from atss.predictor import Predictor


@pytest.fixture
def weights(tmp_path):
    torch.save({"model": build_model(make_cfg(*TINY)).state_dict()}, tmp_path / "model.pth")
    return str(tmp_path / "model.pth")


TINY = ("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ATSS.NUM_CONVS", 1, "INPUT.MIN_SIZE_TEST", 64)


@pytest.mark.parametrize("order", ["BGR", "RGB", "L", "YUV-BT.601"])
def test_images_are_bgr_whatever_the_model_wants(tmp_path, order):
    opts = (*TINY, "INPUT.FORMAT", order)
    if order == "L":
        opts += ("MODEL.PIXEL_MEAN", [100.0], "MODEL.PIXEL_STD", [1.0])
    torch.save({"model": build_model(make_cfg(*opts)).state_dict()}, tmp_path / "model.pth")
    predictor = Predictor(make_cfg(*opts), tmp_path / "model.pth")
    seen = []
    predictor.model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    predictor([np.full((64, 96, 3), (10, 20, 30), np.uint8)])
    read = convert_PIL_to_numpy(Image.new("RGB", (9, 9), (30, 20, 10)), order)  # as in training
    pixel = torch.from_numpy(read[5, 5].copy())
    torch.testing.assert_close(seen[0]["image"][:, 5, 5], pixel, check_dtype=False)
    expected = {"BGR": [10, 20, 30], "RGB": [30, 20, 10], "L": [22]}.get(order)
    assert expected in (None, seen[0]["image"][:, 5, 5].tolist())


def test_boxes_are_in_pixels_of_each_image(weights):
    """Of any size; what comes out is NumPy, the best first."""
    predictor = Predictor(make_cfg(*TINY, "MODEL.ATSS.SCORE_THRESH_TEST", 0.0), weights)
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    small, large = predictor([image, image.repeat(2, axis=0).repeat(2, axis=1)])
    for found, (height, width) in ((small, (64, 96)), (large, (128, 192))):
        assert all(isinstance(x, np.ndarray) for x in found)
        assert (np.diff(found.scores) <= 0).all()
        assert 0 < found.boxes[:, 2].max() <= width
        assert 0 < found.boxes[:, 3].max() <= height
    assert large.boxes.max() > 96
    kept = small.above(float(small.scores[3]))
    assert len(kept.boxes) == len(kept.classes) == (small.scores >= small.scores[3]).sum()


def test_weights_that_do_not_exist_are_named():
    with pytest.raises(WeightsError, match=r"the weights nowhere\.pth do not exist"):
        Predictor(make_cfg(*TINY), "nowhere.pth")


def test_weights_of_other_classes_are_warned_of(tmp_path, caplog):
    content = {"model": build_model(make_cfg(*TINY)).state_dict(), "class_names": ["a", "b", "c"]}
    torch.save(content, tmp_path / "model.pth")
    cfg = make_cfg(*TINY, "MODEL.ATSS.CLASS_NAMES", ["a", "c", "b"])
    assert Predictor(cfg, str(tmp_path / "model.pth")).names == ["a", "c", "b"]
    assert "Class 1 is 'b' to the weights" in caplog.text


def test_a_rule_that_is_not_known_here_is_not_needed(weights, tmp_path):
    """Nor phases, or other branches: what they had in the weights is left over."""
    cfg = make_cfg(*TINY, "MODEL.ATSS.BRANCHES", ["extra"], "MODEL.ATSS.PHASES", [["extra", 5]])
    cfg.MODEL.ATSS.BRANCH.extra = type(cfg)({"OWN_HEAD": True, "ASSIGNER": "Gone"})
    cfg.MODEL.ATSS.ASSIGNER = "Gone"
    cfg.MODEL.ATSS.ASSIGNERS.Gone = type(cfg)({"SHARE": 1})
    (tmp_path / "config.yaml").write_text(cfg.dump())
    image = np.zeros((64, 96, 3), np.uint8)
    (found,) = Predictor(tmp_path / "config.yaml", weights)([image])
    (plain,) = Predictor(make_cfg(*TINY), weights)([image])
    assert np.array_equal(found.boxes, plain.boxes)


def test_the_branch_for_inference_is_built(tmp_path):
    cfg = make_cfg(*TINY, "MODEL.ATSS.BRANCHES", ["one"], "MODEL.ATSS.INFERENCE", "one")
    cfg.MODEL.ATSS.BRANCH.one = type(cfg)({"OWN_HEAD": True, "QUALITY": "", "NUM_CONVS": 2})
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    model = Predictor(cfg, tmp_path / "model.pth").model
    assert len(model.branches["one"].head.cls_subnet) == 6


@pytest.mark.parametrize("lacks", ["head.cls_score.weight", "backbone.fpn_lateral3.weight"])
def test_weights_that_fit_in_part_are_refused(weights, tmp_path, lacks):
    content = torch.load(weights)
    del content["model"][lacks]
    torch.save(content, tmp_path / "part.pth")
    with pytest.raises(
        WeightsError, match=rf"part.pth has no weights for 1 parts .* {lacks}: they"
    ):
        Predictor(make_cfg(*TINY), tmp_path / "part.pth")


def test_what_norms_have_measured_is_needed_too(tmp_path):
    opts = (*TINY, "MODEL.RESNETS.NORM", "FrozenBN")
    content = {"model": build_model(make_cfg(*opts)).state_dict()}
    del content["model"]["backbone.bottom_up.stem.conv1.norm.running_var"]
    torch.save(content, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"for 1 parts .*stem.conv1.norm.running_var"):
        Predictor(make_cfg(*opts), tmp_path / "part.pth")


def test_overlays_that_inference_needs_are_kept(tmp_path):
    @dataclass(frozen=True)
    class Twice:
        first: object = "nms"

        def __call__(self, boxes, scores, classes, limit):
            return self.first(*self.first(boxes, scores, classes, limit), limit)

    SUPPRESSIONS.register(Twice, parts={"first": SUPPRESSIONS})
    try:
        cfg = make_cfg(*TINY, "MODEL.ATSS.SUPPRESSION", "Twice")
        cfg.MODEL.ATSS.PHASES = [["main", 0.5]]
        over = {"SUPPRESSION": "nms", "NMS_THRESH_TEST": 0.3, "ASSIGNER": "TopK"}
        cfg.MODEL.ATSS.BRANCH.main = type(cfg)({"ASSIGNER": "TopK"})
        cfg.MODEL.ATSS.BRANCH.strict = type(cfg)(over)
        cfg.MODEL.ATSS.SUPPRESSIONS.Twice = type(cfg)({"FIRST": "strict"})
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
        model = Predictor(cfg, tmp_path / "model.pth").model
    finally:
        del SUPPRESSIONS.entries["Twice"]
    assert model.postprocess.suppression.first.threshold == 0.3


def test_no_weights_are_refused():
    with pytest.raises(WeightsError, match=r"MODEL.WEIGHTS names no weights to detect with"):
        Predictor(make_cfg(*TINY), "")
