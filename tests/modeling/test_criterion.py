import math
from dataclasses import replace
from multiprocessing.queues import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, make_cfg, make_gt
from detectron2.utils import comm
from processes import FORKED
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from atss import (
    BACKGROUND,
    IGNORE,
    Anchors,
    Assignment,
    ATSSDetector,
    GridAnchorGenerator,
    HeadOutput,
)
from atss.config.branches import build_branches
from atss.config.build import build_postprocess
from atss.errors import UserError
from atss.losses import Matchability, QualityFocal, Varifocal, giou_loss
from atss.modeling import BOX_CODES
from atss.modeling.box_coding import BoxDeltas, Distribution, PointDistances
from atss.modeling.criterion import Criterion
from atss.modeling.head import flatten_levels
from atss.modeling.terms import (
    Balance,
    DistributionFocalLoss,
    GIoULoss,
    NWDLoss,
    SmoothL1Loss,
    central,
    confidence,
    overlap,
    score,
    targets,
)
from atss.modeling.terms import one as one_for_all

ANCHORS = Anchors.grid((16, 16), strides=(8,), scales=(2.0,))  # 4 anchors of 16 pixels
GT = make_gt([[0, 0, 14, 12], [6, 2, 16, 16], [0, 0, 10, 16]], [0, 0, 1], 2, classes=[1, 0, 2])
DETECTED = ("boxes", "scores", "classes")
GT_INDEX = torch.tensor([[0, 1, BACKGROUND, BACKGROUND], [IGNORE, BACKGROUND, 2, BACKGROUND]])


def random_output(n: int = 2, seed: int = 0, quality: bool = True) -> HeadOutput:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, 4, 3), (n, 4, 4), (n, 4)]
    logits, deltas, q = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    return HeadOutput(logits, deltas, q if quality else None)


def tensors(output: HeadOutput) -> list[torch.Tensor]:
    return [output.classes, output.box_regression, output.quality]


def losses_of(output: HeadOutput, gt=GT, gt_index=GT_INDEX) -> dict[str, torch.Tensor]:
    boxes = BoxDeltas().decode(output.box_regression, ANCHORS.boxes, ANCHORS.stride)
    return Criterion()(output, boxes, ANCHORS, gt, Assignment(gt_index))


def spelled_out(output: HeadOutput) -> dict[str, float]:
    """The formulas of the paper's section 3.1, one anchor at a time, in Python's float64."""
    centres = [(4, 4), (12, 4), (4, 12), (12, 12)]
    boxes = BoxDeltas().decode(output.box_regression, ANCHORS.boxes, ANCHORS.stride).tolist()
    cls = box = quality = weights = 0.0
    positives = 0
    for n in range(2):
        for r in range(4):
            g = GT_INDEX[n, r].item()
            if g == IGNORE:
                continue
            for k in range(3):
                p = 1 / (1 + math.exp(-output.classes[n, r, k].item()))
                if g >= 0 and GT.classes[g] == k:
                    cls += 0.25 * (1 - p) ** 2 * -math.log(p)
                else:
                    cls += 0.75 * p**2 * -math.log(1 - p)
            if g < 0:
                continue
            positives += 1
            (x, y), (x1, y1, x2, y2), (a1, b1, a2, b2) = (
                centres[r],
                GT.boxes[g].tolist(),
                boxes[n][r],
            )
            left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
            horizontal = min(left, right) / max(left, right)
            centerness = math.sqrt(horizontal * min(top, bottom) / max(top, bottom))
            inter = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - inter
            hull = (max(x2, a2) - min(x1, a1)) * (max(y2, b2) - min(y1, b1))
            box += centerness * (1 - inter / union + (hull - union) / hull)
            weights += centerness
            q = 1 / (1 + math.exp(-output.quality[n, r].item()))
            quality -= centerness * math.log(q) + (1 - centerness) * math.log(1 - q)
    return {
        "loss_cls": cls / positives,
        "loss_box_reg": 2 * box / weights,
        "loss_centerness": quality / positives,
    }


def test_equals_the_formulas_spelled_out():
    output = random_output()
    losses = losses_of(output)
    expected = spelled_out(output)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5)


def test_box_weights_are_one_without_quality():
    losses = losses_of(random_output(quality=False))
    assert losses.keys() == {"loss_cls", "loss_box_reg"}


@pytest.mark.parametrize("gt", [make_gt([], num_images=2), GT], ids=["no object", "no positive"])
def test_no_positives_give_zero_losses_with_gradients(gt):
    output = random_output()
    losses = losses_of(output, gt, torch.full((2, 4), BACKGROUND))
    assert losses["loss_box_reg"] == losses["loss_centerness"] == 0
    assert losses["loss_cls"] > 0
    sum(losses.values()).backward()
    for x in tensors(output):
        assert torch.isfinite(x.grad).all()
    assert output.box_regression.grad.abs().max() == 0


def test_no_object_of_one_class():
    output = random_output()
    output = output._replace(classes=output.classes[..., :1])
    losses = losses_of(output, make_gt([], num_images=2), torch.full((2, 4), BACKGROUND))
    assert losses["loss_cls"] > 0


def test_ignored_anchors_get_no_gradient():
    output = random_output()
    sum(losses_of(output).values()).backward()
    assert output.classes.grad[1, 0].abs().max() == 0
    assert output.classes.grad[1, 1].abs().min() > 0


def test_finite_for_extreme_outputs():
    for far in (torch.full_like, lambda x, value: torch.full_like(x, -value)):
        output = random_output().map(lambda x, far=far: far(x, 1e4).requires_grad_())
        losses = losses_of(output)
        sum(losses.values()).backward()
        assert all(torch.isfinite(x) for x in losses.values())
        assert all(torch.isfinite(x.grad).all() for x in tensors(output))


# ATSS's, and those whose sums are of targets and weights that predictions make.
CRITERIA = (
    {},
    {
        "cls_loss": QualityFocal(),
        "cls_target": overlap,
        "box_weight": confidence,
        "quality": overlap,
        "quality_name": "overlap",
        "normaliser": targets,
        "least": 0.1,
        "box_least": 1.0,
    },
    {"cls_loss": Varifocal(), "cls_target": overlap, "box_weight": overlap, "box_least": 1e-6},
)


def _trained(parts, output, gt=GT, gt_index=GT_INDEX) -> tuple[dict, list[torch.Tensor]]:
    """Losses, and gradients of the outputs."""
    leaves = output.map(lambda x: x.detach().clone().requires_grad_())
    boxes = BoxDeltas().decode(leaves.box_regression, ANCHORS.boxes, ANCHORS.stride)
    losses = Criterion(**parts)(leaves, boxes, ANCHORS, gt, Assignment(gt_index))
    sum(losses.values()).backward()
    return {name: x.item() for name, x in losses.items()}, [x.grad for x in tensors(leaves)]


def _one_image(rank: int, port: int, queue: SimpleQueue) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    output = random_output().map(lambda x: x[rank : rank + 1])
    mine = GT.image_index == rank
    gt = make_gt(GT.boxes[mine], [0] * int(mine.sum()), 1, GT.classes[mine])
    offset = 0 if rank == 0 else 2
    index = GT_INDEX[rank : rank + 1]
    index = torch.where(index >= 0, index - offset, index)
    found = []
    for parts in CRITERIA:
        losses, gradients = _trained(parts, output, gt, index)
        found.append((losses, [x.tolist() for x in gradients]))
    queue.put((rank, found))
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_on_the_union(free_port):
    """Averaged over processes, as DDP does: the same losses and the same gradients."""
    queue = FORKED.SimpleQueue()
    workers = [FORKED.Process(target=_one_image, args=(r, free_port, queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    results = [found for _, found in sorted(queue.get() for _ in workers)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0

    for i, parts in enumerate(CRITERIA):
        losses, expected = _trained(parts, random_output())
        for name, value in losses.items():
            mean = sum(found[i][0][name] for found in results) / 2
            assert mean == pytest.approx(value, rel=1e-6), name
        for rank, found in enumerate(results):
            for gradient, x in zip(found[i][1], expected, strict=True):
                torch.testing.assert_close(torch.tensor(gradient)[0] / 2, x[rank])


def test_targets_are_detached():
    """Targets and weights depend on predictions, without gradient."""
    output = random_output()
    boxes = BoxDeltas().decode(output.box_regression, ANCHORS.boxes, ANCHORS.stride)
    losses = Criterion(**CRITERIA[1])(output, boxes, ANCHORS, GT, Assignment(GT_INDEX))
    learns = {"loss_cls": 0, "loss_box_reg": 1, "loss_overlap": 2}
    for name, own in learns.items():
        found = torch.autograd.grad(
            losses[name], tensors(output), retain_graph=True, allow_unused=True
        )
        for i, gradient in enumerate(found):
            moved = gradient is not None and bool(gradient.abs().max() > 0)
            assert moved == (i == own), (name, i)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"cls_loss": lambda p, entropy, targets: entropy.mean()},
            r"the class loss <lambda> must return a tensor of shape \(2, 4, 3\), got \(\)",
        ),
        (
            {"box_terms": {"mine": lambda matched: matched.boxes}},
            r"the box loss 'mine' must return .* \(2, 4\), or .*, got \(2, 4, 4\)",
        ),
    ],
)
def test_wrong_shape_of_an_own_loss_is_named(parts, sentence):
    output = random_output()
    boxes = BoxDeltas().decode(output.box_regression, ANCHORS.boxes, ANCHORS.stride)
    with pytest.raises(UserError, match=sentence):
        Criterion(**parts)(output, boxes, ANCHORS, GT, Assignment(GT_INDEX))


def of_one_positive(classes, numbers, code, target, **parts):
    """Losses of a single anchor of 16 pixels around (8, 8) on a stride of 8, of class 1 of two, in
    float64."""
    anchors = Anchors.grid((8, 8), strides=(8,), scales=(2.0,), offset=1.0)
    numbers = torch.tensor([[numbers]], dtype=torch.float64)
    output = HeadOutput(torch.tensor([[classes]], dtype=torch.float64), numbers, None, True)
    boxes = code.decode(numbers, anchors.boxes.double(), anchors.stride)
    gt = make_gt([target], [0], 1, classes=[1])
    gt = replace(gt, boxes=gt.boxes.double())
    losses = Criterion(**parts)(output, boxes, anchors, gt, Assignment(torch.tensor([[0]])))
    return boxes[0, 0].tolist(), {name: x.item() for name, x in losses.items()}


def test_generalised_focal_losses_spelled_out():
    """GFLv2's: of probabilities, in Python's numbers. Logits 0, but for the bins of 1 and 2 strides
    of the left side and 1 of the others."""
    row = [0.0] * 17
    left, others = list(row), list(row)
    left[1], left[2], others[1] = 3.0, 2.0, 9.0
    p, target = (0.2, 0.6), (1.0, 2.0, 15.0, 17.0)
    (x1, y1, x2, y2), losses = of_one_positive(
        *(p, left + 3 * others, Distribution(), target),
        cls_loss=QualityFocal(),
        cls_target=overlap,
        box_terms={"giou": GIoULoss(), "dfl": DistributionFocalLoss(code=Distribution())},
        box_weight=confidence,
        box_least=1.0,
    )

    def shares(logits):
        total = sum(math.exp(x) for x in logits)
        return [math.exp(x) / total for x in logits]

    distances = [sum(i * share for i, share in enumerate(shares(x))) for x in (left, others)]
    assert (x1, y1) == pytest.approx((8 - 8 * distances[0], 8 - 8 * distances[1]))
    width, height = min(x2, 15) - max(x1, 1), min(y2, 17) - max(y1, 2)
    union = (x2 - x1) * (y2 - y1) + 14 * 15 - width * height
    q = width * height / union
    hull = (max(x2, 15) - min(x1, 1)) * (max(y2, 17) - min(y1, 2))
    entropy = -q * math.log(p[1]) - (1 - q) * math.log(1 - p[1])
    expected_cls = p[0] ** 2 * -math.log(1 - p[0]) + (q - p[1]) ** 2 * entropy
    assert losses["loss_cls"] == pytest.approx(expected_cls, rel=1e-6)
    giou = 1 - q + (hull - union) / hull
    assert losses["loss_box_reg"] == pytest.approx(2 * 0.6 * giou, rel=1e-6)  # at least 1
    dfl = 0.0
    for logits, y in zip((left, others, others, others), (7 / 8, 6 / 8, 7 / 8, 9 / 8), strict=True):
        low = int(y)
        near = [math.log(shares(logits)[low + i]) for i in (0, 1)]
        dfl -= (low + 1 - y) * near[0] + (y - low) * near[1]
    assert losses["loss_dfl"] == pytest.approx(0.25 * 0.6 * dfl / 4, rel=1e-6)


def test_matchability_target_is_a_power_of_the_iou():
    """An IoU of 1 / 2 becomes a target of 0.5^1.5; a normaliser of targets counts the overlap."""
    p = (0.2, 0.6)
    _, losses = of_one_positive(
        *(p, [1.0] * 4, PointDistances(), (0, 0, 16, 8)),
        cls_loss=Matchability(1.5),
        cls_target=overlap,
        normaliser=targets,
        least=0.25,
    )
    goal = 0.5**1.5
    entropy = -goal * math.log(p[1]) - (1 - goal) * math.log(1 - p[1])
    expected = (entropy + p[0] ** 1.5 * -math.log(1 - p[0])) / 0.5
    assert losses["loss_cls"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 8.0])
def test_target_of_applies_to_positives_only(gamma):
    """The power 0 of a negative's 0 is 1; a high one of a small overlap is 0, as of negatives."""
    output = random_output()
    classes = output.classes.detach().requires_grad_()
    boxes = (GT.boxes + 1e6)[GT_INDEX.clamp(min=0)].requires_grad_()
    criterion = Criterion(cls_loss=Matchability(gamma), cls_target=overlap)
    losses = criterion(output._replace(classes=classes), boxes, ANCHORS, GT, Assignment(GT_INDEX))
    (pull,) = torch.autograd.grad(losses["loss_cls"], classes)
    p = classes.sigmoid().detach()
    expected = p**gamma * p  # of negatives
    expected[GT_INDEX == IGNORE] = 0
    for n, r in (GT_INDEX >= 0).nonzero().tolist():
        k = GT.classes[GT_INDEX[n, r]]
        expected[n, r, k] = p[n, r, k] - 1e-6**gamma  # they miss
    torch.testing.assert_close(pull * 3, expected, atol=1e-6, rtol=1e-4)


def test_nan_probability_gives_nan_loss():
    """The trainer reports the loss; torch's cross entropy would raise an error."""
    classes = torch.full((2, 4, 3), 0.5)
    classes[0, 1, 2] = torch.nan
    classes.requires_grad_()
    output = HeadOutput(classes, random_output().box_regression.detach(), None, True)
    losses = losses_of(output)
    assert losses["loss_cls"].isnan()
    assert not losses["loss_box_reg"].isnan()
    losses["loss_cls"].backward()
    assert classes.grad[0, 1, 2].isnan()


def test_a_positive_with_iou_zero_stays_positive():
    """Varifocal treats it as a positive with a small target, not as a negative."""
    p = (0.2, 0.6)
    _, losses = of_one_positive(
        *(p, [1.0] * 4, PointDistances(), (100, 0, 116, 8)),
        cls_loss=Varifocal(),
        cls_target=overlap,
    )
    of_the_other_class = 0.75 * p[0] ** 2 * -math.log(1 - p[0])
    assert losses["loss_cls"] == pytest.approx(of_the_other_class, rel=1e-3)


def test_plain_retinanets_box_loss():
    """Smooth L1 of the deltas of positives, summed over 4 N_pos, without any weight."""
    output, coder = random_output(quality=False), BoxDeltas()
    boxes = coder.decode(output.box_regression, ANCHORS.boxes, ANCHORS.stride)
    criterion = Criterion(box_terms={"smooth_l1": SmoothL1Loss(code=coder, weight=1.0)})
    losses = criterion(output, boxes, ANCHORS, GT, Assignment(GT_INDEX))
    expected, positives = 0.0, 0
    for n, r in (GT_INDEX >= 0).nonzero().tolist():
        target = coder.encode(GT.boxes[GT_INDEX[n, r]], ANCHORS.boxes[r], ANCHORS.stride[r])
        for x in (output.box_regression[n, r] - target).abs().tolist():
            expected += x**2 / 0.22 if x < 0.11 else x - 0.055
        positives += 1
    assert losses["loss_box_reg"].item() == pytest.approx(expected / (4 * positives), rel=1e-5)
    assert "loss_centerness" not in losses


def test_deltas_of_negatives_have_no_effect():
    """However far out they are."""
    output = random_output(quality=False)
    wild = output.box_regression.detach().clone()
    wild[GT_INDEX < 0] = torch.inf
    criterion = Criterion(box_terms={"smooth_l1": SmoothL1Loss(code=BoxDeltas())})
    args = (ANCHORS.boxes.expand(2, 4, 4), ANCHORS, GT, Assignment(GT_INDEX))
    tame = criterion(output, *args)["loss_box_reg"]
    torch.testing.assert_close(
        criterion(output._replace(box_regression=wild), *args)["loss_box_reg"], tame
    )


def test_box_loss_is_a_centerness_weighted_mean():
    """The weight of a single positive cancels, however small it is."""
    output = random_output()
    index = torch.full((2, 4), BACKGROUND)
    index[0, 0] = 0
    gt = make_gt([[3.9, 3.9, 30, 30]], [0], 2)
    boxes = BoxDeltas().decode(output.box_regression, ANCHORS.boxes, ANCHORS.stride)
    loss = losses_of(output, gt, index)["loss_box_reg"]
    torch.testing.assert_close(loss, 2 * giou_loss(boxes[0, 0], gt.boxes[0]))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_outputs_of_ignored_anchors_have_no_effect(value):
    """Logits of ignored anchors, centerness of those without an object: multiplied by zero they
    would be no number."""

    def train(output):
        leaves = output.map(lambda x: x.detach().clone().requires_grad_())
        losses = losses_of(leaves)
        sum(losses.values()).backward()
        return losses, [x.grad for x in tensors(leaves)]

    wild = random_output().map(lambda x: x.detach().clone())
    wild.classes[GT_INDEX == IGNORE] = value
    wild.quality[GT_INDEX < 0] = value
    (expected, gradients), (losses, others) = train(random_output()), train(wild)
    assert losses == expected
    for a, b in zip(gradients, others, strict=True):
        assert torch.equal(a, b)


def test_soft_class_targets_are_refused():
    """At building, so that no GPU is waited for. The focal loss has its minimum elsewhere: for a
    target of 0.7 at a probability of 0.88."""
    for target in (score, overlap, lambda matched: matched.positive.float()):
        with pytest.raises(ValueError, match=r"cls_target may be between 0 and 1, but .* 0 and 1"):
            Criterion(cls_target=target)
        Criterion(cls_loss=QualityFocal(), cls_target=target)
        Criterion(cls_loss=None, cls_target=target)

    class Central:
        hard_targets = True

        def __call__(self, matched):
            return (central(matched) > 0.5).float()

    Criterion(cls_target=Central())
    key = "MODEL.ATSS.CLS_TARGET score may be between"
    with pytest.raises(ValueError, match=key):
        build_branches(make_cfg("MODEL.ATSS.CLS_TARGET", "score"), {"code": BoxDeltas()})


def test_score_target_without_scores_is_refused():
    output = random_output()
    boxes = BoxDeltas().decode(output.box_regression, ANCHORS.boxes, ANCHORS.stride)
    criterion = Criterion(cls_loss=QualityFocal(), cls_target=score)
    with pytest.raises(ValueError, match="needs an assigner with scores"):
        criterion(output, boxes, ANCHORS, GT, Assignment(GT_INDEX))


class Shapes(TorchDispatchMode):
    """Count the elements of all tensors that are created."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made += [tuple(x.shape) for x in [result] if isinstance(x, torch.Tensor)]
        return result


@pytest.mark.parametrize("cls_loss", [None, QualityFocal()])
def test_classes_are_not_copied_without_a_class_loss(cls_loss):
    output = random_output()
    boxes = BoxDeltas().decode(output.box_regression, ANCHORS.boxes, ANCHORS.stride)
    with Shapes() as shapes:
        criterion = Criterion(cls_loss=cls_loss, cls_target=overlap, quality=overlap)
        criterion(output, boxes, ANCHORS, GT, Assignment(GT_INDEX))
    assert (tuple(output.classes.shape) in shapes.made) == (cls_loss is not None)


# head -> (kinds of output and their channels, names of losses, config, keys that mmdet has
# otherwise, what the branches read of the maps, flattened).
MMDETS = {
    "atss": (
        {"cls": 8, "box": 4, "centerness": 1},
        {"loss_box_reg": "loss_bbox"},
        "ATSS_R_50_FPN_1x.yaml",
        ("MODEL.ATSS.SCORE", "product", "MODEL.ATSS.RANK_BY_CLASS", True),
        lambda cls, box, quality: {"main": HeadOutput(cls, box, quality.squeeze(-1))},
    ),
    "paa": (
        {"cls": 8, "box": 4, "iou": 1},
        {"loss_box_reg": "loss_bbox", "loss_overlap": "loss_iou"},
        "successors/PAA_R_50_FPN_1x.yaml",
        ("MODEL.ATSS.NORMALISER_PER_IMAGE", True),
        lambda cls, box, quality: {"main": HeadOutput(cls, box, quality.squeeze(-1))},
    ),
    "gfl": (
        {"cls": 8, "distribution": 68},
        {"loss_box_reg": "loss_bbox"},
        "successors/GFL_R_50_FPN_1x.yaml",
        (),
        lambda cls, distribution: {"main": HeadOutput(cls, distribution, None)},
    ),
    "vfnet": (
        {"cls": 8, "first_ltrb_px": 4, "refined_ltrb_px": 4},
        {"loss_box_reg": "loss_bbox_rf", "coarse/loss_box_reg": "loss_bbox"},
        "successors/VFNet_R_50_FPN_1x.yaml",
        (),
        lambda cls, first, refined: {
            "main": HeadOutput(cls, refined.log(), None),
            "coarse": HeadOutput(None, first.log(), None),
        },
    ),
    "tood_first": (
        {"probability": 8, "box_xyxy_in_strides": 4},
        {"loss_box_reg": "loss_bbox"},
        "successors/TOOD_R_50_FPN_1x.yaml",
        ("SOLVER.MAX_ITER", 90),
        lambda cls, corners: {"main": HeadOutput(cls, corners, None, True)},
    ),
    "tood": (
        {"probability": 8, "box_xyxy_in_strides": 4},
        {"loss_box_reg": "loss_bbox"},
        "successors/TOOD_R_50_FPN_1x.yaml",
        ("SOLVER.MAX_ITER", 12),
        lambda cls, corners: {"main": HeadOutput(cls, corners, None, True)},
    ),
}


@pytest.mark.parametrize("head", MMDETS)
def test_losses_gradients_and_detections_equal_mmdet(head):
    """mmdet 3.3.0's heads on given outputs, with anchors from offset 0: what configs say becomes
    their losses, and their detections. It is the fifth iteration."""
    reference = np.load(GOLDEN / "successor_losses.npz")
    kinds, names, config, opts, read = MMDETS[head]
    cfg = make_cfg(*opts, "MODEL.ATSS.NUM_CLASSES", 8, config=config)
    code = BOX_CODES.build(cfg.MODEL.ATSS)
    maps = {
        kind: [torch.from_numpy(reference[f"{head}/{kind}_{i}"]).requires_grad_() for i in range(5)]
        for kind in kinds
    }
    detector = ATSSDetector(
        backbone=nn.Identity(),
        head=nn.Identity(),
        head_in_features=["p"] * 5,
        anchor_generator=GridAnchorGenerator(strides=(8, 16, 32, 64, 128), offset=0.0),
        branches=build_branches(cfg, {"num_levels": 5, "num_classes": 8, "code": code}),
        box_coder=code,
        postprocess=build_postprocess(cfg),
        num_classes=8,
        pixel_mean=[0.0],
        pixel_std=[1.0],
    )
    detector.iteration = 5
    hw = tuple(reference["image_size"].tolist())
    boxes = [torch.from_numpy(reference[f"gt_boxes_{i}"]).float() for i in range(2)]
    labels = [torch.from_numpy(reference[f"gt_classes_{i}"]).long() for i in range(2)]
    image_index = [i for i, x in enumerate(boxes) for _ in x]
    gt = make_gt(torch.cat(boxes), image_index, 2, torch.cat(labels))
    outputs = read(*(flatten_levels(maps[kind], dim) for kind, dim in kinds.items()))
    features = [x.detach() for x in next(iter(maps.values()))]
    losses = detector.forward_training(SimpleNamespace(), features, outputs, gt)
    expected = dict(
        zip(reference[f"{head}/loss_names"], reference[f"{head}/loss_values"], strict=True)
    )
    assert {names.get(name, name) for name in losses} == {*expected}
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[names.get(name, name)], rel=1e-5)
    sum(losses.values()).backward()
    norms = zip(reference[f"{head}/grad_of"], reference[f"{head}/grad_norms"], strict=True)
    for kind, norm in norms:
        found = torch.cat([x.grad.flatten() for x in maps[kind]]).norm().item()
        assert found == pytest.approx(norm, rel=1e-4), kind

    if f"{head}/det_boxes_0" not in reference:
        return
    images = SimpleNamespace(image_sizes=[hw] * 2)
    for i, found in enumerate(detector.forward_inference(images, features, outputs)):
        theirs = [torch.from_numpy(reference[f"{head}/det_{x}_{i}"]) for x in DETECTED]
        assert len(found) == len(theirs[0])
        order = theirs[1].argsort(descending=True, stable=True)  # PAA's come class by class
        boxes, scores, classes = (x[order] for x in theirs)
        torch.testing.assert_close(found.scores, scores, atol=1e-6, rtol=1e-5)
        assert torch.equal(found.pred_classes, classes)
        torch.testing.assert_close(found.pred_boxes.tensor, boxes, atol=1e-3, rtol=0)


def matched_of(output, assignment):
    """Return the arguments that a criterion passes to its parts."""
    seen = []

    def look(matched):
        seen.append(matched)
        return matched.positive.float()

    boxes = BoxDeltas().decode(output.box_regression, ANCHORS.boxes, ANCHORS.stride)
    Criterion(cls_loss=QualityFocal(), cls_target=look)(output, boxes, ANCHORS, GT, assignment)
    return seen[0]


def test_fields_of_matched():
    matched = matched_of(random_output(), Assignment(GT_INDEX, torch.full((2, 4), 0.25)))
    assert torch.equal(matched.target_boxes[0, 1], GT.boxes[1])
    assert torch.equal(matched.target_boxes[0, 2], ANCHORS.boxes[2])
    assert torch.equal(matched.boxes[0, 2], ANCHORS.boxes[2])
    assert matched.target_classes[0, :2].tolist() == [1, 0]
    assert matched.output.box_regression[0, 2].abs().sum() == 0
    assert matched.output.classes[1, 0].abs().sum() == 0
    assert matched.anchors.stride.tolist() == [8] * 4
    assert score(matched)[0].tolist() == [0.25, 0.25, 0, 0]


def test_probabilities_equal_their_logits():
    output = random_output()
    same = output._replace(classes=output.classes.sigmoid(), probabilities=True)
    for (name, a), b in zip(losses_of(output).items(), losses_of(same).values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def losses_with(assignment=None, **parts):
    output = random_output()
    boxes = BoxDeltas().decode(output.box_regression, ANCHORS.boxes, ANCHORS.stride)
    assignment = assignment or Assignment(GT_INDEX)
    losses = Criterion(**parts)(output, boxes, ANCHORS, GT, assignment)
    return {name: x.item() for name, x in losses.items()}


def test_lower_bounds_and_weights():
    """Three positives in two images."""
    plain = losses_with()
    bounded = losses_with(least=6.0)
    assert bounded["loss_cls"] == pytest.approx(plain["loss_cls"] / 2)
    assert bounded["loss_centerness"] == pytest.approx(plain["loss_centerness"] / 2)
    assert bounded["loss_box_reg"] == plain["loss_box_reg"]
    each = losses_with(least=3.0, least_per_image=True)
    assert each == pytest.approx(bounded)
    assert losses_with(box_least=1e3)["loss_box_reg"] < 0.01 * plain["loss_box_reg"]
    half = losses_with(quality_weight=0.5)
    assert half["loss_centerness"] == pytest.approx(plain["loss_centerness"] / 2)
    assert losses_with(normaliser=targets) == pytest.approx(plain)
    soft = {"cls_loss": QualityFocal(), "cls_target": score}
    sums = [
        losses_with(Assignment(GT_INDEX, (GT_INDEX >= 0) * 0.25), **soft, **x)["loss_cls"]
        for x in ({"least": 0.75}, {"least": 0.5, "normaliser": targets})
    ]
    assert sums[1] == pytest.approx(4 * sums[0])  # three quarters in place of three


@pytest.fixture
def two_alike(monkeypatch):
    """As one of two processes that have the same images."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.mul_(2))


@pytest.mark.parametrize(
    ("parts", "divided_by"),
    [
        ({}, 3),
        ({"least": 5.0}, 3),  # the six of both are more
        ({"least": 8.0}, 4),
        ({"least": 2.0, "least_per_image": True}, 4),  # of the four images of both
    ],
)
def test_lower_bounds_apply_to_all_processes(two_alike, parts, divided_by):
    """Three positives in each: max(6, least) / 2. Box weights are all 1, and so 3 in each, too."""
    alone = losses_with(box_weight=one_for_all)
    units = 4 if "least_per_image" in parts else 1
    bounds = {**parts, "box_least": 2.0 * divided_by / units}
    found = losses_with(box_weight=one_for_all, **bounds)
    for name, loss in found.items():
        assert loss == pytest.approx(alone[name] * 3 / divided_by), name


@pytest.mark.parametrize("per_image", [False, True])
def test_losses_without_gradient_use_one_process(monkeypatch, per_image):
    """The others need not measure anything now."""
    parts = {"least": 2.0, "least_per_image": per_image, "box_least": 4.0}
    alone = losses_with(**parts)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    with torch.no_grad():
        assert losses_with(**parts) == alone


def test_level_weight_multiplies_all_losses():
    """Linear in the weights; the last anchor has no object and so no loss but that of classes."""
    each = [losses_with(level_weight=lambda matched, r=r: torch.eye(4)[r]) for r in range(4)]
    weights = (0.5, 2.0, 3.0, 7.0)
    found = losses_with(level_weight=lambda matched: torch.tensor(weights))
    plain = losses_with()
    assert found.keys() == plain.keys() == each[0].keys()
    for name in plain:
        shares = [losses[name] for losses in each]
        assert sum(shares) == pytest.approx(plain[name], rel=1e-5)
        expected = sum(w * x for w, x in zip(weights, shares, strict=True))
        assert found[name] == pytest.approx(expected, rel=1e-5)
        assert (shares[3] == 0) == (name != "loss_cls")


def test_box_terms_have_their_own_weights():
    plain = losses_with()
    both = losses_with(box_terms={"giou": GIoULoss(weight=1.0), "again": GIoULoss(weight=0.25)})
    assert both["loss_box_reg"] == pytest.approx(plain["loss_box_reg"] / 2)
    assert both["loss_again"] == pytest.approx(plain["loss_box_reg"] / 8)


def levels_matched(*positives):
    """Return matched anchors on levels of 4, 1 and 1."""
    anchors = Anchors.grid((16, 16), strides=(8, 16, 32), scales=(2.0,))
    positive = torch.tensor([positives], dtype=torch.bool)
    return SimpleNamespace(anchors=anchors, positive=positive)


def test_levels_with_few_positives_have_larger_weights():
    """Since the training began: the one with most weighs 1, the one with fewest 2."""
    balance = Balance(3)
    weights = balance(levels_matched(1, 1, 1, 1, 0, 1))  # 4, 0 and 1
    torch.testing.assert_close(weights, torch.tensor([1.0] * 4 + [2.0, 1.75]))
    with torch.no_grad():  # as in validation
        balance(levels_matched(1, 1, 1, 1, 1, 1))
    weights = balance(levels_matched(0, 0, 0, 0, 1, 1))  # 4, 1 and 2
    torch.testing.assert_close(weights, torch.tensor([1.0] * 4 + [2.0, 2 - 1 / 3]))
    again = Balance(3)
    again.load_state_dict(balance.state_dict())
    torch.testing.assert_close(again(levels_matched(*[0] * 6)), weights)
    assert Balance(3)(levels_matched(*[0] * 6)).tolist() == [2.0] * 6  # none yet


def test_level_weights_count_all_processes(monkeypatch):
    """4, 0 and 1 here, 0, 1 and 5 in the other: 4, 1 and 6."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    other = torch.tensor([0, 1, 5])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(other))
    balance = Balance(3)
    weights = balance(levels_matched(1, 1, 1, 1, 0, 1))
    assert balance.counts.tolist() == [4, 1, 6]
    torch.testing.assert_close(weights, torch.tensor([2 - 3 / 5] * 4 + [2.0, 1.0]))
    with torch.no_grad():
        assert torch.equal(balance(levels_matched(*[0] * 6)), weights)


def test_branches_share_the_counts_of_a_level_weight():
    """As in mmdet's DDOD: positives of classes, then those of boxes too."""
    cfg = make_cfg("MODEL.ATSS.LEVEL_WEIGHT", "balance", config="successors/DDOD_R_50_FPN_1x.yaml")
    known = {"num_levels": 5, "num_classes": 3, "code": BoxDeltas()}
    main, box = (x.at(0).criterion.level_weight for x in build_branches(cfg, known).values())
    assert main is box
    assert isinstance(main, Balance)


@pytest.mark.parametrize(("arguments", "constant"), [({}, 12.8), ({"constant": 8.0}, 8.0)])
def test_nwd_loss_in_a_criterion(arguments, constant):
    """2 (1 - NWD), and nothing else about them changes. The default is AI-TOD's mean side."""
    output = random_output()
    boxes = BoxDeltas().decode(output.box_regression, ANCHORS.boxes, ANCHORS.stride)
    found = losses_with(box_terms={"nwd": NWDLoss(**arguments)}, box_weight=one_for_all)
    expected = 0.0
    for n, r in (GT_INDEX >= 0).nonzero().tolist():
        (a1, b1, a2, b2), (x1, y1, x2, y2) = (
            boxes[n, r].tolist(),
            GT.boxes[GT_INDEX[n, r]].tolist(),
        )
        apart = ((a1 + a2 - x1 - x2) / 2, (b1 + b2 - y1 - y2) / 2)
        sides = ((a2 - a1 - x2 + x1) / 2, (b2 - b1 - y2 + y1) / 2)
        expected += 1 - math.exp(-math.hypot(*apart, *sides) / constant)
    assert found["loss_box_reg"] == pytest.approx(2 * expected / 3, rel=1e-5)


def test_box_weight_other_than_quality():
    plain, one = losses_with(), losses_with(box_weight=one_for_all)
    assert one["loss_box_reg"] != pytest.approx(plain["loss_box_reg"], rel=1e-3)
    assert one["loss_centerness"] == plain["loss_centerness"]
    without = losses_with(quality=None)
    assert without.keys() == {"loss_cls", "loss_box_reg"}
    assert without["loss_box_reg"] == one["loss_box_reg"]
    by_score = losses_with(Assignment(GT_INDEX, torch.full((2, 4), 0.3)), box_weight=score)
    assert by_score["loss_box_reg"] == pytest.approx(one["loss_box_reg"])


def test_a_criterion_needs_one_loss():
    assert losses_with(cls_loss=None).keys() == {"loss_box_reg", "loss_centerness"}
    assert losses_with(box_terms={}).keys() == {"loss_cls", "loss_centerness"}
    with pytest.raises(ValueError, match="a branch has no loss"):
        losses_with(cls_loss=None, box_terms={}, quality=None)


def test_box_term_without_weight_has_weight_one():
    once = losses_with(box_terms={"function": lambda matched: GIoULoss()(matched)})
    assert GIoULoss().weight == 2
    assert losses_with()["loss_box_reg"] == pytest.approx(2 * once["loss_box_reg"])


@pytest.mark.parametrize("name", ["cls", "box_reg", "centerness"])
def test_box_term_names_must_be_unique(name):
    with pytest.raises(ValueError, match=f"box loss '{name}' has the name of another loss"):
        Criterion(box_terms={"giou": GIoULoss(), name: GIoULoss()})


@pytest.mark.parametrize(
    ("name", "bound", "beyond"),
    [("quality_weight", 1e6, 1.5e6), ("least", 1e-12, 5e-13), ("box_least", 1e-12, 5e-13)],
)
def test_arguments_out_of_range_are_refused(name, bound, beyond):
    Criterion(**{name: bound})
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {beyond}"):
        Criterion(**{name: beyond})
