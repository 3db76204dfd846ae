"""Proposals of this project in Detectron2's detectors of two stages."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, NARROW, TWO_STAGE, make_gt, make_input
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_proposal_generator, matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances, Keypoints, PolygonMasks, pairwise_iou
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from atss import Anchors, Assignment, GroundTruth, load_config
from atss.assigners import ASSIGNER_REGISTRY
from atss.checkpoints.classes import class_tensors
from atss.config import build_tta, check_model
from atss.errors import UserError

OWN_RPN = "Faster_R_50_FPN_1x_MaxIoU_RPN"
OPTIONS = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATASETS.TRAIN", (), "DATASETS.TEST", ()),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
)
SMALL = (*NARROW, *OPTIONS, "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ATSS.NUM_CONVS", 1)
BOXES = [[20, 20, 90, 80], [5, 60, 30, 90]]


def config(name, *opts):
    """Return the config of a narrow and shallow model."""
    files = [x if "/" in x else f"two_stage/{x}" for x in name.split()]
    return load_config(*files, opts=[*SMALL, *opts])


def with_masks(example):
    """Add masks that fill the boxes."""
    objects = example["instances"]
    polygons = [[x1, y1, x2, y1, x2, y2, x1, y2] for x1, y1, x2, y2 in objects.gt_boxes.tensor]
    objects.gt_masks = PolygonMasks([[np.array(x)] for x in polygons])
    return example


def examples():
    return [with_masks(make_input(BOXES, [1, 2])), with_masks(make_input(seed=1))]


@pytest.fixture(autouse=True)
def storage():
    """The event storage that the ROI heads write to."""
    with EventStorage() as opened:
        yield opened


@pytest.fixture(scope="module")
def reference():
    return np.load(GOLDEN / "rpn_reference.npz")


def tensor(reference, name):
    return torch.from_numpy(reference[name])


def generator(reference, *opts, name=OWN_RPN):
    """Return the generator with the reference's weights, with all anchors of its rule."""
    values = ("MODEL.ATSS.ASSIGNER", "Matcher", "MODEL.FPN.OUT_CHANNELS", 8)
    for when in ("PRE", "POST"):
        train, test = (int(x) for x in reference[f"{when.lower()}_nms_topk"])
        key = f"MODEL.RPN.{when}_NMS_TOPK"
        values += (f"{key}_TRAIN", train, f"{key}_TEST", test)
    cfg = config(name, *values, *opts)
    shapes = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 7)}
    built = build_proposal_generator(cfg, shapes)
    weights = {k.removeprefix("weight/"): tensor(reference, k) for k in reference if "weight/" in k}
    built.load_state_dict(weights)
    return built


def inputs(reference):
    sizes = [tuple(int(x) for x in hw) for hw in reference["image_sizes"]]
    images = ImageList(torch.zeros(2, 3, *reference["canvas"]), sizes)
    features = {f"p{i}": tensor(reference, f"feature_p{i}") for i in range(2, 7)}
    objects = [
        Instances(hw, gt_boxes=Boxes(boxes), gt_classes=torch.full((len(boxes),), 2))
        for hw, boxes in zip(
            sizes, (tensor(reference, f"gt_boxes_{i}") for i in (0, 1)), strict=True
        )
    ]
    return images, features, objects


def test_state_dict_is_that_of_detectron2():
    names = []
    for name in ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", f"two_stage/{OWN_RPN}"):
        cfg = load_config(name, opts=["MODEL.DEVICE", "meta"])
        with torch.device("meta"):
            model = build_model(cfg)
        names.append({k: x.shape for k, x in model.state_dict().items()})
    assert names[0] == names[1]
    assert "proposal_generator.rpn_head.anchor_deltas.weight" in names[0]


def test_thresholds_are_those_of_detectron2():
    """Overlaps at, just below and far from a threshold; an object that overlaps no anchor."""
    anchors = Anchors.grid((64, 64), (8, 16), scales=(1.0,))
    ten = torch.tensor([8.0, 8.0, 16.0, 16.0])
    sizes = [(0.7, 1), (0.3, 1), (0.6999, 1), (0.55, 0.55), (1.4, 1.1), (0.5, 1.4)]
    boxes = [ten[:2].tolist() + (ten[:2] + 8 * torch.tensor(x)).tolist() for x in sizes]
    boxes += [[100.0, 100.0, 120.0, 130.0], [8.0, 8.0, 12.0, 16.0], [8.0, 8.0, 10.0, 16.0]]
    exact = 0.25, 0.5, False  # IoUs of the last two, which claim no anchor
    for objects in ([0], [1], [2], [3, 4], [0, 1, 2, 3, 4, 5], [6], [2, 6], [], [7], [8]):
        gt = make_gt([boxes[i] for i in objects])
        iou = pairwise_iou(Boxes(gt.boxes), Boxes(anchors.boxes))
        for low, high, low_quality in ((0.3, 0.7, True), exact):
            match = matcher.Matcher([low, high], [0, -1, 1], allow_low_quality_matches=low_quality)
            owner, label = match(iou)
            expected = torch.where(label == 1, owner, -1 + label.clamp(max=0))
            rule = ASSIGNER_REGISTRY.get("Matcher")(low, high, low_quality)
            assert torch.equal(rule(anchors, gt).gt_index[0], expected), objects


@pytest.mark.parametrize("low_quality", [True, False])
def test_labels_are_those_of_detectron2(reference, low_quality):
    """Also where rounding decides between equal overlaps."""
    built = generator(reference)
    rule = ASSIGNER_REGISTRY.get("Matcher")(low_quality_matches=low_quality)
    _, features, objects = inputs(reference)
    anchors = built.anchor_generator.grid(list(features.values()))
    assert torch.equal(anchors.boxes, tensor(reference, "anchors"))
    found = rule(anchors, GroundTruth.from_instances(objects)).gt_index
    labels = tensor(reference, "labels" if low_quality else "labels_no_low_quality").long()
    assert torch.equal((found >= 0).long() - (found == -2).long(), labels)
    first = torch.tensor([[0], [len(objects[0])]])
    owner = tensor(reference, "matched").long() + first
    assert torch.equal(found[labels == 1], owner[labels == 1])


@pytest.mark.parametrize(
    ("loss", "opts"),
    [
        ("l1", ()),
        ("smooth_l1", ("MODEL.ATSS.SMOOTH_L1_LOSS_BETA", 1 / 9)),
        (
            "giou",
            ("MODEL.ATSS.BBOX_REG_LOSS_TYPE", "giou", "MODEL.ATSS.BBOX_REG_LOSS_WEIGHT", 1.0),
        ),
    ],
)
def test_losses_and_gradients_are_those_of_detectron2(reference, loss, opts):
    """Of all anchors: the divisor is 256 for each image."""
    built = generator(reference, *opts).train()
    _, losses = built(*inputs(reference))
    assert {*losses} == {"loss_rpn_cls", "loss_rpn_loc"}
    cls, loc = 512 * losses["loss_rpn_cls"], 512 * losses["loss_rpn_loc"]
    assert cls.item() == pytest.approx(float(reference["sum_cls"]), rel=1e-5)
    assert loc.item() == pytest.approx(float(reference[f"sum_loc_{loss}"]), rel=1e-5)
    if loss == "l1":
        (cls + loc).backward()
        for name, parameter in built.named_parameters():
            expected = tensor(reference, f"grad_l1/{name}")
            assert torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-2), name


def test_losses_of_a_sample_are_those_of_detectron2(reference):
    built = generator(reference).train()
    matched, labels = (tensor(reference, x).long() for x in ("matched", "sampled_labels"))
    matched[1] += len(reference["gt_boxes_0"])
    index = torch.where(labels == 1, matched, labels - 1)  # -2: ignored, -1: background
    built.branches["main"].phases[0].assigner = lambda *_: Assignment(index)
    _, losses = built(*inputs(reference))
    for name in ("cls", "loc"):
        expected = float(reference[f"sampled_loss_{name}"])
        assert losses[f"loss_rpn_{name}"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["train", "test", "test_min_size"])
def test_proposals_are_those_of_detectron2(reference, case):
    size = float(reference["min_size"]) if "min" in case else 0
    built = generator(reference, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", int(size))
    images, features, objects = inputs(reference)
    built.train(case == "train")
    proposals, losses = built(images, features, objects if case == "train" else None)
    assert bool(losses) == (case == "train")
    for i, found in enumerate(proposals):
        assert found.image_size == images.image_sizes[i]
        assert {*found.get_fields()} == {"proposal_boxes", "objectness_logits"}
        boxes = found.proposal_boxes.tensor
        assert not boxes.requires_grad
        assert not found.objectness_logits.requires_grad
        torch.testing.assert_close(boxes, tensor(reference, f"{case}_boxes_{i}"), atol=1e-3, rtol=0)
        expected = tensor(reference, f"{case}_logits_{i}")
        torch.testing.assert_close(found.objectness_logits, expected, atol=1e-5, rtol=1e-5)


def test_whole_detector_equals_detectron2s():
    """Losses and gradients of both stages with all anchors and proposals, and detections."""
    every = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10_000, "MODEL.ATSS.ASSIGNERS.Sampled.NUM", 10_000)
    every += ("MODEL.ATSS.NORMALISER_MIN", 1e4, "MODEL.ATSS.BOX_NORMALISER_MIN", 1e4)
    every += ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000)
    every += ("MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5)
    theirs = build_model(config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", *every))
    ours = build_model(config(OWN_RPN, *every))
    assert type(theirs.proposal_generator) is RPN
    ours.load_state_dict(theirs.state_dict())
    batch = [make_input(BOXES, [1, 2]), make_input(seed=1)]
    results = []
    for model in (theirs, ours):
        losses = model.train()(batch)
        sum(losses.values()).backward()
        with torch.no_grad():
            found = model.eval()(batch)[0]["instances"]
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append((losses, gradients, found.pred_boxes.tensor, found.scores))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


OURS = [x for x in TWO_STAGE if not x.endswith("_small")]
SLOW = [x for x in OURS if "lite0" in x and not x.endswith("small_ATSS_RPN")]


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in OURS],
)
def test_every_config_trains_and_detects(name):
    """Also with an image without objects; every weight gets a gradient."""
    model = build_model(config(name, "MODEL.TIMM.PRETRAINED", False)).train()
    losses = model(examples())
    names = {*losses}
    stages = ("_stage0", "_stage1", "_stage2") if "Cascade" in name else ("",)
    expected = {f"{x}{stage}" for x in ("loss_cls", "loss_box_reg") for stage in stages}
    assert {"loss_rpn_cls", "loss_rpn_loc"} | expected <= names
    assert ("loss_mask" in names) == ("Mask" in name)
    assert all(torch.isfinite(x) for x in losses.values())
    sum(losses.values()).backward()
    without = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    with torch.no_grad():
        detected = model.eval()(examples())[0]["instances"]
    assert detected.has("pred_masks") == ("Mask" in name)


FIRST_STAGE = "Faster_R_50_FPN_1x_ATSS_first_stage"


@pytest.mark.parametrize("name", [OWN_RPN, FIRST_STAGE])
def test_images_without_objects_and_proposals(name):
    """Training and detection need neither."""
    model = build_model(config(name, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 10_000)).train()
    batch = [make_input(), make_input(seed=1)]
    losses = model(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    assert losses["loss_rpn_loc"] == 0
    with torch.no_grad():
        assert [len(x["instances"]) for x in model.eval()(batch)] == [0, 0]


def propose(model, batch):
    images = model.preprocess_image(batch)
    objects = [x["instances"] for x in batch]
    features = model.backbone(images.tensor)
    return model.proposal_generator(images, features, objects if model.training else None)


def test_a_thousand_objects():
    model = build_model(config("Faster_R_50_FPN_1x_ATSS_RPN")).train()
    corners = torch.rand(1000, 2) * 80
    boxes = torch.cat([corners, corners + torch.rand(1000, 2) * 30 + 1], dim=1)
    _, losses = propose(model, [make_input(boxes, torch.arange(1000) % 3)])
    assert all(torch.isfinite(x) and x > 0 for x in losses.values())


def test_second_branch_has_losses_in_training_alone():
    cfg = config("Faster_R_50_FPN_1x_ATSS_RPN", "MODEL.ATSS.BRANCHES", ["extra"])
    cfg.MODEL.ATSS.BRANCH.extra = type(cfg)({"OWN_HEAD": True})
    model = build_model(cfg)
    _, losses = propose(model.train(), [make_input(BOXES, [1, 2])])
    assert {"loss_rpn_cls", "extra/loss_rpn_cls", "extra/loss_rpn_loc"} <= {*losses}
    assert not propose(model.eval(), [make_input()])[1]


def test_class_wise_and_class_agnostic_scores():
    """Both train; the score of a proposal is its best class's, with the quality."""
    batch = [make_input(BOXES, [1, 2])]
    for number, channels in ((1, 1), (-1, 3)):
        model = build_model(config(FIRST_STAGE, "MODEL.ATSS.NUM_CLASSES", number))
        assert model.proposal_generator.rpn_head.cls_score.out_channels == channels
        # Checkpoints of other classes are matched by name, for rows of classes alone.
        assert bool(class_tensors(model)) == (channels > 1)
        _, losses = propose(model.train(), batch)
        assert {*losses} == {"loss_rpn_cls", "loss_rpn_loc", "loss_rpn_centerness"}
        with torch.no_grad():
            (found,), nothing = propose(model.eval(), batch)
            maps = model.backbone(model.preprocess_image(batch).tensor)
            head = model.proposal_generator.rpn_head
            output = head([maps[x] for x in ("p3", "p4", "p5", "p6", "p7")])
        assert not nothing
        best = (output.confidence() * output.quality.sigmoid()).sqrt().amax()
        assert found.objectness_logits.sigmoid().max() == pytest.approx(best.item(), rel=1e-4)
        assert (found.objectness_logits.diff() <= 0).all()


def test_key_points_train_and_are_detected():
    """Detectron2's config with either recipe over it."""
    name = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x Base-ATSS_RPN"
    opts = ("MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,))
    opts += ("MODEL.PIXEL_STD", [1000.0] * 3)  # else the heat maps overflow
    model = build_model(config(name, *opts)).train()
    example = make_input(BOXES, [0, 0])
    points = torch.tensor([[[50.0, 50.0, 2.0]] * 17, [[10.0, 70.0, 2.0]] * 17])
    example["instances"].gt_keypoints = Keypoints(points)
    losses = model([example])
    assert {"loss_keypoint", "loss_cls", "loss_rpn_cls"} <= {*losses}
    sum(losses.values()).backward()
    with torch.no_grad():
        assert model.eval()([example])[0]["instances"].pred_keypoints.shape[1:] == (17, 3)


def test_saturated_scores_stay_finite():
    """Infinite logits would count as a diverged training."""
    model = build_model(config(FIRST_STAGE)).train()
    head = model.proposal_generator.rpn_head
    torch.nn.init.constant_(head.cls_score.bias, 200.0)
    torch.nn.init.constant_(head.ctrness.bias, 200.0)
    (found,), _ = propose(model, [make_input(BOXES, [1, 2])])
    assert torch.isfinite(found.objectness_logits).all()
    assert len(found)


def test_two_processes_equal_one(monkeypatch):
    """The losses of two images are the mean of those of two processes with one each."""
    model = build_model(config(FIRST_STAGE)).train()
    batch = [make_input(BOXES, [1, 2]), make_input([[10, 10, 100, 90]], [0], seed=1)]
    _, together = propose(model, batch)
    amounts = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: amounts.append(x.clone()))
    for example in batch:
        propose(model, [example])
    total = sum(amounts)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.copy_(total))
    apart = [propose(model, [example])[1] for example in batch]
    for name, loss in together.items():
        mean = sum(x[name] for x in apart) / 2
        assert mean.item() == pytest.approx(loss.item(), rel=1e-4), name


def test_nms_threshold_of_one_keeps_overlaps(reference):
    images, features, _ = inputs(reference)
    kept = []
    for threshold in (0.3, 1.0):
        built = generator(reference, "MODEL.RPN.NMS_THRESH", threshold).eval()
        proposals, _ = built(images, features)
        kept.append(proposals[0].objectness_logits)
    assert len(kept[1]) == 60
    assert kept[1].mean() > kept[0].mean()


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (("MODEL.ATSS.PRECISION", "bf16"), "MODEL.ATSS.PRECISION is for ATSSDetector: .* 'fp32'"),
        (("MODEL.ATSS.NUM_CLASSES", 7), "NUM_CLASSES of a first stage must be 1, .* 3, got 7"),
        (("MODEL.ATSS.IN_FEATURES", ["p2", "p9"]), r"IN_FEATURES names \['p9'\]"),
        (("MODEL.ATSS.NUM_CLASSES", -1), "NUM_CLASSES of RPNHead must be 1, got 3"),
        (("MODEL.RPN.NMS_THRESH", 1.5), "MODEL.RPN.NMS_THRESH must be between 0 and 1, got 1.5"),
        (("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator"), "must be GridAnchorGenerator"),
        (("MODEL.ATSS.ASSIGNERS.Sampled.RULE", "Sampled"), "'Sampled' is Sampled itself"),
        (("MODEL.ATSS.ASSIGNERS.Matcher.POSITIVE_FROM", 0.1), "Matcher needs 0 < background"),
    ],
)
def test_wrong_values_name_the_key(opts, sentence):
    with pytest.raises(UserError, match=sentence):
        build_model(config(OWN_RPN, *opts))


def test_training_without_objects_is_refused(reference):
    images, features, _ = inputs(reference)
    with pytest.raises(UserError, match="training needs images with instances"):
        generator(reference).train()(images, features)


def test_any_rule_samples_for_the_rpn():
    """All positives and a focal background are values, too."""
    focal = ("MODEL.ATSS.CLS_LOSS", "focal", "MODEL.ATSS.NORMALISER_PER_IMAGE", False)
    focal += ("MODEL.ATSS.NORMALISER_MIN", 1.0, "MODEL.ATSS.BOX_NORMALISER_MIN", 1e-6)
    focal += ("MODEL.ATSS.HEADS.RPNHead.PRIOR_PROB", 0.01, "MODEL.ATSS.ASSIGNER", "ATSS")
    batch = [make_input(BOXES, [1, 2])]
    for rule in ("MaxIoU", "PAA", "SimOTA", "TAL", "POTO"):
        opts = ("MODEL.ATSS.ASSIGNERS.Sampled.RULE", rule)
        model = build_model(config("Faster_R_50_FPN_1x_ATSS_RPN", *opts)).train()
        torch.nn.init.zeros_(model.proposal_generator.rpn_head.objectness_logits.weight)
        _, losses = propose(model, batch)
        assert losses["loss_rpn_cls"].item() == pytest.approx(0.693, abs=1e-3)  # p = 0.5
    model = build_model(config("Faster_R_50_FPN_1x_ATSS_RPN", *focal)).train()
    torch.nn.init.zeros_(model.proposal_generator.rpn_head.objectness_logits.weight)
    _, losses = propose(model, batch)
    assert 0.5 < losses["loss_rpn_cls"] < 3  # -0.25 ln 0.01 of each positive


def test_test_time_augmentation_is_detectron2s():
    cfg = config("Mask_R_50_FPN_1x_ATSS_first_stage", "TEST.AUG.MIN_SIZES", (64,))
    model = build_model(cfg).eval()
    example = make_input()
    with torch.no_grad():
        (found,) = build_tta(cfg, model)([example])
    assert found["instances"].has("pred_masks")


def test_config_is_checked_before_data_are_read():
    cfg = config(FIRST_STAGE, "MODEL.ATSS.ASSIGNERS.ATSS.TOP_K", 0)
    with pytest.raises(UserError, match="TOP_K must be >= 1"):
        check_model(cfg, training=True)
