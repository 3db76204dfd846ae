"""Predictor: a detector from its config and weights. Drawing and videos:
tests/tools/test_demo.py."""

import json
import math
import re
from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import make_cfg
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.modeling import build_model
from PIL import Image

from atss.checkpoints import WeightsError
from atss.data.mapper import Mapper
from atss.modeling import SUPPRESSIONS
from atss.predictor import Predictor


@pytest.fixture
def weights(tmp_path):
    torch.save({"model": build_model(make_cfg(*TINY)).state_dict()}, tmp_path / "model.pth")
    return str(tmp_path / "model.pth")


TINY = ("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ATSS.NUM_CONVS", 1, "INPUT.MIN_SIZE_TEST", 64)
PIXELS = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)  # BGR
PICTURE = Image.fromarray(PIXELS[:, :, ::-1])


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """A model that detects something on any image."""
    file = tmp_path_factory.mktemp("predictor") / "model.pth"
    torch.save({"model": build_model(make_cfg(*TINY)).state_dict()}, file)
    return Predictor(make_cfg(*TINY, "MODEL.ATSS.SCORE_THRESH_TEST", 0.0), file)


def read_only(image):
    image = image.copy()
    image.flags.writeable = False
    return image


def with_alpha(*values):
    """Add a random alpha, which would change detections if it were used."""
    alpha = np.random.default_rng(1).integers(0, 255, (48, 64, 1), np.uint8)
    return np.concatenate([*values, alpha], axis=2)


def as_file(picture, name):
    """Return a function that saves a picture in a folder and returns its name."""

    def save(folder):
        picture.save(folder / name)
        return folder / name

    return save


GREY = PIXELS[:, :, 1]
FOLDED = {
    "BGRA": (with_alpha(PIXELS), PIXELS),
    "by columns": (np.asfortranarray(PIXELS), PIXELS),
    "a view": (PIXELS.repeat(2, axis=1)[::-1, ::2][::-1], PIXELS),
    "read-only": (read_only(PIXELS), PIXELS),
    "(H, W)": (GREY, GREY[:, :, None].repeat(3, axis=2)),
    "(H, W, 1)": (GREY[:, :, None], GREY[:, :, None].repeat(3, axis=2)),
    "PIL RGB": (PICTURE, PIXELS),
    "PIL RGBA": (Image.fromarray(with_alpha(PIXELS[:, :, ::-1])), PIXELS),
    "PIL L": (Image.fromarray(GREY), GREY[:, :, None].repeat(3, axis=2)),
    "PIL YCbCr": (
        PICTURE.convert("YCbCr"),
        np.asarray(PICTURE.convert("YCbCr").convert("RGB"))[:, :, ::-1],
    ),
    "path": (as_file(PICTURE, "a.png"), PIXELS),
    "text": (lambda folder: str(as_file(PICTURE, "a.png")(folder)), PIXELS),
}


def assert_same(found, expected):
    assert len(expected.boxes) > 0
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", FOLDED)
def test_one_image_of_each_kind_gives_one_result(predictor, tmp_path, kind):
    image, pixels = FOLDED[kind]
    image = image(tmp_path) if callable(image) else image
    (expected,) = predictor([pixels])
    assert_same(predictor(image), expected)
    assert_same(predictor([image])[0], expected)
    outputs = [predictor.at_anchors(x).boxes for x in (image, [pixels])]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("several", [list, tuple, deque, iter], ids=lambda x: x.__name__)
def test_several_images_give_a_list(predictor, monkeypatch, several):
    found = predictor(several([PIXELS, PICTURE]))
    assert type(found) is list
    assert len(found) == 2
    assert_same(*found)
    monkeypatch.setattr(predictor, "model", None)  # Detectron2's models refuse an empty batch
    assert predictor(several([])) == []


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", ["turned", "broken"])
def test_pil_images_are_turned_as_files(predictor, tmp_path, ending, exif):
    data = Image.Exif()
    data[0x0112] = 6
    file = tmp_path / f"a.{ending}"
    PICTURE.save(file, exif=data if exif == "turned" else b"Exif\0\0no exif")
    found = predictor([Image.open(file), file])
    assert_same(*found)
    if exif == "turned":
        assert found[0].boxes[:, 3].max() > 48


REFUSED = {
    "nothing": (None, TypeError, "type NoneType"),
    "number": (3, TypeError, "type int"),
    "bytes": (b"abc", TypeError, "type bytes"),
    "dictionary": ({"a.png": 1}, TypeError, "type dict"),
    "tensor": (torch.zeros(48, 64, 3), TypeError, "type Tensor, shape .*64, 3.*, dtype torch"),
    "float": (PIXELS / 255, TypeError, r"type ndarray, shape \(48, 64, 3\), dtype float64"),
    "16 bits": (PIXELS.astype(np.uint16), TypeError, r"shape \(48, 64, 3\), dtype uint16"),
    "bool": (PIXELS > 9, TypeError, "dtype bool"),
    "objects": (np.array([None]), TypeError, "dtype object"),
    "two channels": (PIXELS[:, :, :2], ValueError, r"shape \(48, 64, 2\), dtype uint8"),
    "channels first": (PIXELS.transpose(2, 0, 1), ValueError, r"shape \(3, 48, 64\), dtype uint8"),
    "a stack": (PIXELS[None], ValueError, r"shape \(1, 48, 64, 3\).*a list"),
    "a row": (PIXELS[0, :, 0], ValueError, r"shape \(64,\)"),
    "no rows": (PIXELS[:0], ValueError, r"shape \(0, 64, 3\)"),
    "no columns": (Image.new("RGB", (0, 9)), ValueError, r"shape \(9, 0, 3\)"),
    "thin": (np.zeros((1, 4000, 3), np.uint8), ValueError, "is 4000 x 1 pixels, too thin"),
    "thin PIL": (Image.new("L", (1, 4000)), ValueError, "is 1 x 4000 pixels, too thin"),
    "PIL of 16 bits": (Image.new("I;16", (64, 48)), TypeError, "more than 8 bits .*mode I;16"),
    "PIL of numbers": (Image.new("F", (64, 48)), TypeError, "more than 8 bits .*mode F"),
    "PIL La": (Image.new("La", (64, 48)), ValueError, "mode La.*not supported"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_other_objects_are_refused(predictor, kind):
    """In one message, alone and in a list, with its index."""
    image, error, sentence = REFUSED[kind]
    for door in (predictor, predictor.at_anchors):
        for given, name in ((image, "the image"), ([PIXELS, image], "image 1")):
            with pytest.raises(error, match=f"{name}.*{sentence}") as caught:
                door(given)
            assert len(str(caught.value).splitlines()) == 1


def test_files_are_refused_by_their_names(predictor, tmp_path):
    Image.new("L", (1, 4000)).save(tmp_path / "thin.png")
    for name, sentence in (("nowhere.png", "No such file"), ("thin.png", "is 1 x 4000 pixels")):
        with pytest.raises((OSError, ValueError), match=rf"{re.escape(name)}.*{sentence}"):
            predictor(tmp_path / name)


def test_damage_in_a_pillow_image_is_an_error(predictor, tmp_path):
    """Detectron2 ignores it when it looks for an EXIF, and the rest of the image is black."""
    PICTURE.save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="cannot read the image, a PIL image of mode RGB: "):
        predictor(Image.open(tmp_path / "a.png"))


def test_at_anchors_needs_an_image(predictor):
    with pytest.raises(ValueError, match="at_anchors needs an image"):
        predictor.at_anchors([])


def test_no_resizing_makes_no_image_thin(weights, tmp_path):
    """MIN_SIZE_TEST 0: images stay as they are."""
    cfg = make_cfg(*TINY, "INPUT.MIN_SIZE_TEST", 0, "MODEL.ATSS.SCORE_THRESH_TEST", 0.0)
    (array, file) = Predictor(cfg, weights)([PIXELS, as_file(PICTURE, "a.png")(tmp_path)])
    assert_same(file, array)


def test_stretched_images_are_those_of_training(weights, tmp_path):
    """Height 96 and width 160 in evaluation and training; boxes are in pixels of the image."""
    opts = ("INPUT.RESIZE", "stretch", "INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 160)
    opts += (
        "INPUT.MIN_SIZE_TRAIN",
        (96,),
        "INPUT.MAX_SIZE_TRAIN",
        160,
        "INPUT.RANDOM_FLIP",
        "none",
    )
    cfg = make_cfg(*TINY, *opts, "MODEL.ATSS.SCORE_THRESH_TEST", 0.0)
    predictor = Predictor(cfg, weights)
    seen = []
    predictor.model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    file = as_file(PICTURE.resize((300, 2)), "a.png")(tmp_path)  # too thin to keep its ratio
    (found,) = predictor([file])
    for is_train in (False, True):
        mapped = Mapper(cfg, is_train=is_train)({"file_name": str(file)})["image"]
        assert mapped.shape == (3, 96, 160)
        assert torch.equal(seen[0]["image"], mapped)
    assert 200 < found.boxes[:, [0, 2]].max() <= 300
    assert 1 < found.boxes[:, [1, 3]].max() <= 2
    cfg.INPUT.MIN_SIZE_TRAIN = (96, 128)
    with pytest.raises(ValueError, match=r"stretch needs one INPUT\.MIN_SIZE_TRAIN, the h"):
        Predictor(cfg, weights)


@pytest.mark.parametrize("order", ["BGR", "RGB", "L", "YUV-BT.601"])
def test_images_are_bgr_for_rgb_models_too(tmp_path, order):
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
    """For images of any size; results are NumPy, best first."""
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


def test_missing_weights_are_named():
    with pytest.raises(WeightsError, match=r"the weights nowhere\.pth do not exist"):
        Predictor(make_cfg(*TINY), "nowhere.pth")


def test_weights_of_other_classes_warn(tmp_path, caplog):
    content = {"model": build_model(make_cfg(*TINY)).state_dict(), "class_names": ["a", "b", "c"]}
    torch.save(content, tmp_path / "model.pth")
    cfg = make_cfg(*TINY, "MODEL.ATSS.CLASS_NAMES", ["a", "c", "b"])
    assert Predictor(cfg, str(tmp_path / "model.pth")).names == ["a", "c", "b"]
    assert "Class 1 is 'b' in the weights" in caplog.text


def test_unknown_rules_are_not_needed(weights, tmp_path):
    """Nor are phases and other branches, whose weights are ignored."""
    cfg = make_cfg(*TINY, "MODEL.ATSS.BRANCHES", ["extra"], "MODEL.ATSS.PHASES", [["extra", 5]])
    cfg.MODEL.ATSS.BRANCH.extra = type(cfg)({"OWN_HEAD": True, "ASSIGNER": "Gone"})
    cfg.MODEL.ATSS.ASSIGNER = "Gone"
    cfg.MODEL.ATSS.ASSIGNERS.Gone = type(cfg)({"SHARE": 1})
    (tmp_path / "config.yaml").write_text(cfg.dump())
    image = np.zeros((64, 96, 3), np.uint8)
    (found,) = Predictor(tmp_path / "config.yaml", weights)([image])
    (plain,) = Predictor(make_cfg(*TINY), weights)([image])
    assert np.array_equal(found.boxes, plain.boxes)


def test_inference_branch_is_built(tmp_path):
    cfg = make_cfg(*TINY, "MODEL.ATSS.BRANCHES", ["one"], "MODEL.ATSS.INFERENCE", "one")
    cfg.MODEL.ATSS.BRANCH.one = type(cfg)({"OWN_HEAD": True, "CENTERNESS": "", "NUM_CONVS": 2})
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    model = Predictor(cfg, tmp_path / "model.pth").model
    assert len(model.branches["one"].head.cls_subnet) == 6


@pytest.mark.parametrize("lacks", ["head.cls_score.weight", "backbone.fpn_lateral3.weight"])
def test_incomplete_weights_are_refused(weights, tmp_path, lacks):
    content = torch.load(weights)
    del content["model"][lacks]
    torch.save(content, tmp_path / "part.pth")
    with pytest.raises(
        WeightsError, match=rf"part.pth has no weights for 1 parts .* {lacks}: they"
    ):
        Predictor(make_cfg(*TINY), tmp_path / "part.pth")


def test_statistics_of_norms_are_needed(tmp_path):
    opts = (*TINY, "MODEL.RESNETS.NORM", "FrozenBN")
    content = {"model": build_model(make_cfg(*opts)).state_dict()}
    del content["model"]["backbone.bottom_up.stem.conv1.norm.running_var"]
    torch.save(content, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"for 1 parts .*stem.conv1.norm.running_var"):
        Predictor(make_cfg(*opts), tmp_path / "part.pth")


def test_overlays_for_inference_are_kept(tmp_path):
    @dataclass(frozen=True)
    class Twice:
        first: object = "nms"

        def __call__(self, boxes, scores, classes, limit):
            return self.first(*self.first(boxes, scores, classes, limit), limit)

    SUPPRESSIONS.register(Twice, parts={"first": SUPPRESSIONS})
    try:
        cfg = make_cfg(*TINY, "MODEL.ATSS.SUPPRESSION", "Twice")
        cfg.MODEL.ATSS.PHASES = [["main", 0.5]]
        over = {"SUPPRESSION": "nms", "NMS_THRESH_TEST": 0.3, "ASSIGNER": "MaxIoU"}
        cfg.MODEL.ATSS.BRANCH.main = type(cfg)({"ASSIGNER": "MaxIoU"})
        cfg.MODEL.ATSS.BRANCH.strict = type(cfg)(over)
        cfg.MODEL.ATSS.SUPPRESSIONS.Twice = type(cfg)({"FIRST": "strict"})
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
        model = Predictor(cfg, tmp_path / "model.pth").model
    finally:
        del SUPPRESSIONS.entries["Twice"]
    assert model.postprocess.suppression.first.threshold == 0.3


def test_empty_weights_are_refused():
    with pytest.raises(WeightsError, match=r"MODEL.WEIGHTS is empty: detection needs weights"):
        Predictor(make_cfg(*TINY), "")


def test_picture_is_large_enough_for_labels(predictor, caplog):
    assert predictor.show(PICTURE, 0).size == (640, 480)
    assert predictor.show(PICTURE.resize((800, 100)), 0).size == (800, 100)
    assert not caplog.records


def test_picture_without_detections_names_the_highest_score(predictor, caplog):
    with caplog.at_level("WARNING"):
        predictor.show(PICTURE, threshold=1)
    highest = math.floor(1000 * predictor(PICTURE).scores.max()) / 1000  # never above the score
    assert f"The highest score is {highest:.3f}: pass a lower threshold than 1" in caplog.text


def test_thresholds_of_classes_select_detections(weights, tmp_path):
    """Of a report or a dictionary; a class without one keeps all, and show its threshold."""
    names = [f"c{k}" for k in range(80)]
    config = (*TINY, "MODEL.ATSS.SCORE_THRESH_TEST", 0.0, "MODEL.ATSS.CLASS_NAMES", names)
    everything = Predictor(make_cfg(*config), weights)
    found = everything(PIXELS)
    assert everything.thresholds is None
    k = int(found.classes[0])
    (tmp_path / "report.json").write_text(
        json.dumps({"thresholds": {names[k]: {"score": 1.0}, names[k - 1]: None}})
    )
    for thresholds in (tmp_path / "report.json", {names[k]: 1.0}):
        selected = Predictor(make_cfg(*config), weights, thresholds=thresholds)
        assert [x for x in selected.thresholds if x is not None] == [1.0]
        kept = selected(PIXELS)
        assert len(kept.scores) == (found.classes != k).sum() > 0
        assert k not in kept.classes
        pictures = [np.asarray(selected.show(PIXELS, x)) for x in (0.0, 1.0)]
        assert (pictures[0] != pictures[1]).any()
    with pytest.raises(OSError, match=r"^the dictionary has thresholds of dog, the det"):
        Predictor(make_cfg(*config), weights, thresholds={"dog": 0.5})


def test_images_without_a_limit_of_pixels(predictor, tmp_path, monkeypatch):
    """Pillow's way to read large images."""
    PICTURE.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert len(predictor(tmp_path / "a.png").boxes)
