import copy
import json
import pickle
import re
from contextlib import nullcontext

import numpy as np
import pytest
import recipe
import torch
from conftest import GOLDEN, ROOT, THIN, WIDE_FOR_GN, make_cfg, make_input
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from atss import BACKGROUND, Assignment
from atss.checkpoints import config_for, convert
from atss.config import build_tta
from atss.modeling import Branch, Criterion, Phase
from atss.modeling.branch import SIZES, Branches
from atss.modeling.criterion import Quotient
from atss.modeling.terms import score

# GroupNorm: with BatchNorm the images of a training batch would depend on each other.
TINY = (
    *("MODEL.ATSS.NUM_CONVS", 1, *(x for item in WIDE_FOR_GN.items() for x in item)),
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN"),
)
BOX = [[20, 20, 90, 80]]


def tiny(*opts):
    torch.manual_seed(0)
    return build_model(make_cfg(*TINY, *opts))


@pytest.fixture(scope="module")
def mmdet():
    """mmdet 3.3.0's ATSS with made-up weights, converted: our model, its input, their outputs."""
    reference = np.load(GOLDEN / "mmdet_atss_r50.npz")
    shapes = json.loads((GOLDEN / "mmdet_atss_r50_shapes.json").read_text())
    weights = {k: torch.from_numpy(v) for k, v in recipe.weights(shapes).items()}
    weights["bbox_head.atss_cls.bias"] -= 2
    state = convert(weights, "mmdet", "atss")
    cfg = config_for(state, "mmdet", detector="atss")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    model.load_state_dict(state)
    names = json.loads((GOLDEN / "checkpoint_map_d2.json").read_text())["mmdet_to_d2"]
    example = make_input(reference["gt_boxes"], reference["gt_classes"], (160, 224))
    example["image"] = torch.from_numpy(reference["image_rgb"])
    return model, example, reference, names


def test_head_outputs_equal_mmdet(mmdet):
    model, example, reference, _ = mmdet
    with torch.no_grad():
        images = model.preprocess_image([example])
        features = model.backbone(images.tensor)
        output = model.head([features[name] for name in model.head_in_features])
    for name, ours in zip(("cls", "box", "ctr"), output[:3], strict=True):
        maps = [reference[f"{name}{level}"] for level in range(5)]
        expected = np.concatenate([x.reshape(len(x), -1).T for x in maps])
        ours = ours[0].reshape(len(expected), -1).numpy()
        assert np.abs(ours - expected).max() <= 1e-3 * np.abs(expected).max()


def test_losses_and_gradients_equal_mmdet(mmdet):
    model, example, reference, names = mmdet
    model.train()
    losses = model([example])
    expected = dict(zip(reference["loss_names"], reference["loss_values"], strict=True))
    assert losses["loss_cls"].item() == pytest.approx(expected["loss_cls"], rel=1e-3)
    assert losses["loss_box_reg"].item() == pytest.approx(expected["loss_bbox"], rel=1e-3)
    assert losses["loss_centerness"].item() == pytest.approx(expected["loss_centerness"], rel=1e-3)

    model.zero_grad()
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    for key, norm in zip(reference["grad_names"], reference["grad_norms"], strict=True):
        assert parameters[names[key]].grad.norm().item() == pytest.approx(norm, rel=1e-2, abs=1e-6)


def test_a_batch_equals_its_images():
    """Different images and objects: whatever mixes up images or anchors shows."""
    model = tiny().train()
    examples = [
        make_input(BOX, [0], seed=1),
        make_input([], [], seed=2),
        make_input([[5, 5, 60, 40], [64, 32, 128, 96]], [1, 2], seed=3),
    ]
    seen = []

    def record(output, boxes, anchors, gt, assignment):
        seen.append((output.classes, boxes, assignment.gt_index))
        return {"loss": Quotient(boxes.sum(), boxes.new_ones(()), 1.0)}

    model.branches["main"].at(0).criterion.quotients = record
    with torch.no_grad():
        model(examples)
        for example in examples:
            model([example])
    together, alone = seen[0], seen[1:]
    first = 0
    for i, (example, single) in enumerate(zip(examples, alone, strict=True)):
        torch.testing.assert_close(together[0][i], single[0][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[1][i], single[1][0], atol=1e-3, rtol=1e-4)
        shifted = torch.where(single[2][0] >= 0, single[2][0] + first, single[2][0])
        assert torch.equal(together[2][i], shifted)
        first += len(example["instances"])


@pytest.mark.parametrize("objects", [[BOX, []], [[], []]], ids=["one empty", "all empty"])
def test_trains_on_images_without_objects(objects):
    model = tiny().train()
    losses = model([make_input(boxes, [0] * len(boxes)) for boxes in objects])
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_levels_may_be_smaller_than_k():
    losses = tiny().train()([make_input([[4, 4, 28, 28]], [0], hw=(32, 32))])
    assert all(torch.isfinite(x) for x in losses.values())


def test_detections_are_in_pixels_of_the_original_image():
    model = tiny("MODEL.ATSS.SCORE_THRESH_TEST", 0.0).eval()
    example = make_input()
    with torch.no_grad():
        plain = model([example])[0]["instances"]
        doubled = model([example | {"height": 192, "width": 256}])[0]["instances"]
    assert len(plain) == 100
    torch.testing.assert_close(doubled.pred_boxes.tensor, plain.pred_boxes.tensor * 2)
    assert plain.pred_boxes.tensor[:, 2].max() <= 128
    assert (plain.scores.diff() <= 0).all()


@pytest.mark.parametrize("outside", [False, True], ids=["own autocast", "caller's autocast"])
def test_bf16_is_close_to_fp32(outside):
    example = make_input(BOX, [0])
    expected = tiny().train()([example])
    model = tiny(*(() if outside else ("MODEL.ATSS.PRECISION", "bf16"))).train()
    with torch.autocast("cpu", dtype=torch.bfloat16) if outside else nullcontext():
        losses = model([example])
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=0.02)


def test_channels_last_changes_only_the_layout():
    example = make_input(BOX, [0])
    expected = tiny().train()([example])
    model = tiny("MODEL.ATSS.CHANNELS_LAST", True).train()
    features = model.backbone(model.preprocess_image([example]).tensor)
    assert features["p3"].is_contiguous(memory_format=torch.channels_last)
    for name, value in model([example]).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


def test_logs_assignment_and_pictures():
    model = tiny("VIS_PERIOD", 1).train()
    with EventStorage() as storage:
        model([make_input([*BOX, [30, 1, 41, 70]], [0, 1]), make_input([[1, 1, 2, 2]], [0])])
    latest = {name: value for name, (value, _) in storage.latest().items()}
    sizes = {x: latest[f"assignment/objects_without_positive_{x}"] for x in SIZES}
    assert sizes == {"small": 1, "medium": 0, "large": 0}
    assert latest["assignment/objects_without_positive"] == 1
    assert latest["assignment/positives_per_object"] > 0
    (picture,) = storage._vis_data
    assert picture[1].shape == (3, 2 * 96, 128)


@pytest.mark.parametrize(
    ("box", "size"),
    [([1, 1, 32.9, 32.9], "small"), ([1, 1, 33, 33], "medium"), ([1, 1, 97, 97], "large")],
)
def test_objects_without_a_positive_are_logged_by_size(box, size, monkeypatch):
    model = tiny().train()

    def assign(anchors, gt, predictions):
        return Assignment(torch.full((1, len(anchors.boxes)), BACKGROUND))

    monkeypatch.setattr(model.branches["main"].at(0), "assigner", assign)
    with EventStorage() as storage:
        model([make_input([box], [0])])
    latest = {name: value for name, (value, _) in storage.latest().items()}
    prefix = "assignment/objects_without_positive"
    assert {x: latest[f"{prefix}_{x}"] for x in SIZES} == {x: int(x == size) for x in SIZES}
    assert latest[prefix] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predict_equals_the_predictions_of_training(precision):
    """Without a step in between, of images that share a canvas; and in evaluation, too, the towers
    have the config's precision."""
    model, seen, dtypes = tiny("MODEL.ATSS.PRECISION", precision).train(), [], []
    model.head.cls_subnet[0].register_forward_hook(lambda *x: dtypes.append(x[2].dtype))
    examples = [make_input(BOX, [0]), make_input(BOX, [0], seed=1)]
    assigner = model.branches["main"].at(0).assigner

    def look(anchors, gt, predictions):
        seen.append(predictions)
        return assigner(anchors, gt, predictions)

    model.branches["main"].at(0).assigner = look
    with torch.no_grad():
        model(examples)
        predicted = model.predict(examples)
    assert not seen[0].boxes.requires_grad
    assert torch.equal(seen[0].boxes, predicted.boxes)
    assert torch.equal(seen[0].output.classes, predicted.output.classes)
    with torch.no_grad():
        model.eval()(examples)
    assert {*dtypes} == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}


def test_default_predictor(tmp_path):
    weights = tmp_path / "model.pth"
    torch.save({"model": tiny().state_dict()}, weights)
    cfg = make_cfg(*TINY, "MODEL.WEIGHTS", str(weights), "MODEL.ATSS.SCORE_THRESH_TEST", 0.0)
    image = np.zeros((60, 80, 3), np.uint8)
    instances = DefaultPredictor(cfg)(image)["instances"]
    assert instances.image_size == (60, 80)
    assert len(instances) == 100


def test_detectron2_retinanet_initialises_backbone_and_fpn(tmp_path):
    """By the names of its weights; the head and P6, which differ, begin anew."""
    cfg = make_cfg(*TINY, "MODEL.META_ARCHITECTURE", "RetinaNet")
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "DefaultAnchorGenerator"
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    theirs = build_model(cfg).state_dict()
    torch.save({"model": theirs}, tmp_path / "retinanet.pth")
    model = tiny()
    DetectionCheckpointer(model).load(str(tmp_path / "retinanet.pth"))
    loaded = [n for n in theirs if n.startswith(("backbone.bottom_up", "backbone.fpn_"))]
    assert loaded
    for name in loaded:
        torch.testing.assert_close(model.state_dict()[name], theirs[name])
    assert model.backbone.top_block.p6.weight.shape[1] == 64


def test_lazy_config_builds_the_same_model(new_setuptools):
    lazy = LazyConfig.load(str(ROOT / "configs" / "ATSS_R_50_FPN_1x.py"))
    ours = instantiate(lazy.model)
    cfg = make_cfg("MODEL.ATSS.NUM_CLASSES", 80, config="ATSS_R_50_FPN_1x.yaml")
    theirs = build_model(cfg)
    shapes = {name: x.shape for name, x in theirs.state_dict().items()}
    assert {name: x.shape for name, x in ours.state_dict().items()} == shapes
    trainable = {name for name, x in theirs.named_parameters() if x.requires_grad}
    assert {name for name, x in ours.named_parameters() if x.requires_grad} == trainable
    lazy.optimizer.params.model = ours
    groups = instantiate(lazy.optimizer).param_groups
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(0.01, 1e-4), (0.02, 0.0)}
    rates = instantiate(lazy.lr_multiplier)
    assert [rates(i / 90000) for i in (0, 500, 60000, 80000)] == pytest.approx(
        [1 / 3, 1, 0.1, 0.01]
    )

    ours.load_state_dict(theirs.state_dict())
    example = make_input(BOX, [0])
    for name, value in ours.train()([example]).items():
        torch.testing.assert_close(value, theirs.train()([example])[name])


def test_a_batch_of_several_sizes_equals_single_images():
    model = tiny("MODEL.ATSS.SCORE_THRESH_TEST", 0.0).eval()
    sizes = [(96, 128), (64, 128), (90, 125), (128, 96), (64, 127)]
    examples = [make_input(hw=hw, seed=i) for i, hw in enumerate(sizes)]
    canvases = []
    model.backbone.register_forward_pre_hook(lambda m, x: canvases.append(tuple(x[0].shape)))
    with torch.no_grad():
        together = model(examples)
        assert canvases == [(2, 3, 96, 128), (2, 3, 64, 128), (1, 3, 128, 96)]
        alone = [model([example])[0] for example in examples]
    for example, a, b in zip(examples, together, alone, strict=True):
        a, b = a["instances"], b["instances"]
        assert a.image_size == b.image_size == (example["height"], example["width"])
        assert len(a) == len(b) > 0
        assert torch.equal(a.pred_classes, b.pred_classes)
        torch.testing.assert_close(a.scores, b.scores)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=1e-3, rtol=0)


def test_assigners_get_detached_predictions():
    """An assigner that uses predictions must not train the model through them."""
    model, seen = tiny().train(), []

    def rule(anchors, gt, predictions):
        seen.append(predictions)
        weight = predictions.output.quality.sigmoid()
        return Assignment(torch.zeros_like(weight, dtype=torch.long), weight)

    model.branches = Branches({"main": Branch(Phase(rule, Criterion(box_weight=score)))})
    losses = model([make_input(BOX, [0])])
    output, boxes = seen[0]
    assert not any(
        x.requires_grad for x in (output.classes, output.box_regression, output.quality, boxes)
    )
    losses["loss_box_reg"].backward()
    assert model.head.ctrness.weight.grad is None or (model.head.ctrness.weight.grad == 0).all()


@pytest.mark.parametrize(
    "row", ["atss_box", "atss_point", "fcos_original", "retinanet_A1", "ssc_lite_point"]
)
def test_survives_pickling(row):
    """As torch.save(model) and processes that are spawned have it."""
    torch.manual_seed(0)
    opts = ("MODEL.ATSS.SCORE_THRESH_TEST", 0.0, "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ATSS.SCORE")
    opts += ("product" if row == "atss_point" else "sqrt",)
    opts += tuple(x for item in THIN.items() for x in item)
    model = build_model(make_cfg(*opts, config=f"tables/{row}.yaml"))
    example = make_input(BOX, [0])
    expected = model([example])
    copy = pickle.loads(pickle.dumps(model))
    assert copy([example]) == expected
    with torch.no_grad():
        found, again = (m.eval()([example])[0]["instances"] for m in (model, copy))
    assert torch.equal(found.pred_boxes.tensor, again.pred_boxes.tensor)
    assert torch.equal(found.scores, again.scores)
    pickle.dumps(build_tta(make_cfg(*opts), model))


def test_an_output_of_two_branches_is_decoded_once(monkeypatch):
    """One with a head of its own has another output."""
    model, decoded = tiny().train(), []
    boxes = Criterion(cls_loss=None, quality=None)
    others = {
        "boxes": Branch(Phase(None, boxes, assignment_of="main")),
        "own": Branch(Phase(None, boxes, assignment_of="main"), head=copy.deepcopy(model.head)),
        "guest": Branch(Phase(None, boxes, assignment_of="main"), head_of="own"),
    }
    nn.init.constant_(others["own"].head.bbox_pred.bias, 1.0)
    model.branches = Branches({"main": model.branches["main"], **others})
    decode = model.box_coder.decode
    monkeypatch.setattr(
        model.box_coder, "decode", lambda *args: decoded.append(args) or decode(*args)
    )
    losses = model([make_input(BOX, [0])])
    assert len(decoded) == 2
    assert losses["boxes/loss_box_reg"] != losses["own/loss_box_reg"]
    assert losses["guest/loss_box_reg"] == losses["own/loss_box_reg"]


def test_a_branch_without_an_assignment_is_named():
    model = tiny().train()
    phase = Phase(None, Criterion(), assignment_of="boxes")
    model.branches = Branches({"main": model.branches["main"], "boxes": Branch(phase)})
    sentence = "branch 'boxes' takes the assignment of 'boxes': choose from ['main']"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model([make_input(BOX, [0])])
