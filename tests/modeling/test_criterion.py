import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import GOLDEN, make_cfg, make_gt
from detectron2.utils import comm

from atss import BACKGROUND, IGNORE, Anchors, Assignment, HeadOutput
from atss.config.branches import build_branches
from atss.config.build import build_postprocess
from atss.losses import giou_loss
from atss.modeling import BOX_CODES
from atss.modeling.box_coding import BoxDeltas
from atss.modeling.criterion import Criterion
from atss.modeling.head import flatten_levels
from atss.modeling.terms import GIoU, SmoothL1, score, targets
from atss.modeling.terms import one as one_for_all
from atss.structures import Predictions

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
    return [output.classes, output.numbers, output.quality]


def losses_of(output: HeadOutput, gt=GT, gt_index=GT_INDEX) -> dict[str, torch.Tensor]:
    boxes = BoxDeltas().decode(output.numbers, ANCHORS.boxes, ANCHORS.stride)
    return Criterion()(output, boxes, ANCHORS, gt, Assignment.hard(gt_index))


def spelled_out(output: HeadOutput) -> dict[str, float]:
    """The formulas of the paper's section 3.1, one anchor at a time, in Python's float64."""
    centres = [(4, 4), (12, 4), (4, 12), (12, 12)]
    boxes = BoxDeltas().decode(output.numbers, ANCHORS.boxes, ANCHORS.stride).tolist()
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


def test_without_a_quality_branch_boxes_weigh_alike():
    losses = losses_of(random_output(quality=False))
    assert losses.keys() == {"loss_cls", "loss_box_reg"}


@pytest.mark.parametrize("gt", [make_gt([], num_images=2), GT], ids=["no object", "no positive"])
def test_nothing_positive_gives_zero_losses_with_gradients(gt):
    output = random_output()
    losses = losses_of(output, gt, torch.full((2, 4), BACKGROUND))
    assert losses["loss_box_reg"] == losses["loss_centerness"] == 0
    assert losses["loss_cls"] > 0
    sum(losses.values()).backward()
    for x in tensors(output):
        assert torch.isfinite(x.grad).all()
    assert output.numbers.grad.abs().max() == 0


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


def _one_image(rank: int, port: int, queue: mp.SimpleQueue) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    output = random_output().map(lambda x: x[rank : rank + 1].detach().requires_grad_())
    mine = GT.image_index == rank
    gt = make_gt(GT.boxes[mine], [0] * int(mine.sum()), 1, GT.classes[mine])
    offset = 0 if rank == 0 else 2
    index = GT_INDEX[rank : rank + 1]
    losses = losses_of(output, gt, torch.where(index >= 0, index - offset, index))
    sum(losses.values()).backward()
    values = {name: value.item() for name, value in losses.items()}
    queue.put((rank, values, [x.grad.tolist() for x in tensors(output)]))
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_on_the_union(free_port):
    """Averaged over processes, as DDP does: the same losses and the same gradients."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_one_image, args=(r, free_port, queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    results = sorted(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0

    output = random_output()
    losses = losses_of(output)
    sum(losses.values()).backward()
    for name, value in losses.items():
        mean = sum(values[name] for _, values, _ in results) / 2
        assert mean == pytest.approx(value.item(), rel=1e-6)
    for rank, _, gradients in results:
        for gradient, x in zip(gradients, tensors(output), strict=True):
            torch.testing.assert_close(torch.tensor(gradient)[0] / 2, x.grad[rank])


def test_plain_retinanets_box_loss():
    """Smooth L1 of the deltas of positives, summed over 4 N_pos, without any weight."""
    output, coder = random_output(quality=False), BoxDeltas()
    boxes = coder.decode(output.numbers, ANCHORS.boxes, ANCHORS.stride)
    criterion = Criterion(box_terms={"smooth_l1": SmoothL1(code=coder, weight=1.0)})
    losses = criterion(output, boxes, ANCHORS, GT, Assignment.hard(GT_INDEX))
    expected, positives = 0.0, 0
    for n, r in (GT_INDEX >= 0).nonzero().tolist():
        target = coder.encode(GT.boxes[GT_INDEX[n, r]], ANCHORS.boxes[r], ANCHORS.stride[r])
        for x in (output.numbers[n, r] - target).abs().tolist():
            expected += x**2 / 0.22 if x < 0.11 else x - 0.055
        positives += 1
    assert losses["loss_box_reg"].item() == pytest.approx(expected / (4 * positives), rel=1e-5)
    assert "loss_centerness" not in losses


def test_deltas_of_negatives_do_not_matter():
    """However far out they are."""
    output = random_output(quality=False)
    wild = output.numbers.detach().clone()
    wild[GT_INDEX < 0] = torch.inf
    criterion = Criterion(box_terms={"smooth_l1": SmoothL1(code=BoxDeltas())})
    args = (ANCHORS.boxes.expand(2, 4, 4), ANCHORS, GT, Assignment.hard(GT_INDEX))
    tame = criterion(output, *args)["loss_box_reg"]
    torch.testing.assert_close(
        criterion(output._replace(numbers=wild), *args)["loss_box_reg"], tame
    )


def test_the_box_loss_is_a_mean_weighted_by_centerness():
    """One positive, far from its object's centre: what it weighs cancels, however little it is."""
    output = random_output()
    index = torch.full((2, 4), BACKGROUND)
    index[0, 0] = 0
    gt = make_gt([[3.9, 3.9, 30, 30]], [0], 2)
    boxes = BoxDeltas().decode(output.numbers, ANCHORS.boxes, ANCHORS.stride)
    loss = losses_of(output, gt, index)["loss_box_reg"]
    torch.testing.assert_close(loss, 2 * giou_loss(boxes[0, 0], gt.boxes[0]))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_outputs_that_do_not_count_change_nothing(value):
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
    """The focal loss has its minimum elsewhere: for a target of 0.7 at a probability of 0.88."""
    output = random_output()
    boxes = BoxDeltas().decode(output.numbers, ANCHORS.boxes, ANCHORS.stride)
    ones = torch.ones(2, 4)
    criterion = Criterion(cls_target=score)
    for target in (torch.zeros(2, 4), ones):
        criterion(output, boxes, ANCHORS, GT, Assignment(GT_INDEX, target))
    with pytest.raises(ValueError, match=r"class target is 0\.7, but .* for targets 0 and 1"):
        criterion(output, boxes, ANCHORS, GT, Assignment(GT_INDEX, ones * 0.7))
    with pytest.raises(ValueError, match="score of a rule that gives none"):
        criterion(output, boxes, ANCHORS, GT, Assignment(GT_INDEX))


# head -> (kinds of output, names of losses, config, keys that mmdet has otherwise).
MMDETS = {
    "atss": (
        {"cls": 8, "box": 4, "centerness": 1},
        {"loss_box_reg": "loss_bbox"},
        "ATSS_R_50_FPN_1x.yaml",
        ("MODEL.ATSS.SCORE", "product", "MODEL.ATSS.RANK_BY_CLASS", True),
    ),
    "paa": (
        {"cls": 8, "box": 4, "iou": 1},
        {"loss_box_reg": "loss_bbox", "loss_overlap": "loss_iou"},
        "successors/PAA_R_50_FPN_1x.yaml",
        ("MODEL.ATSS.NORMALISER_PER_IMAGE", True),
    ),
    "gfl": (
        {"cls": 8, "distribution": 68},
        {"loss_box_reg": "loss_bbox"},
        "successors/GFL_R_50_FPN_1x.yaml",
        (),
    ),
}


@pytest.mark.parametrize("head", MMDETS)
def test_losses_gradients_and_detections_equal_mmdets(head):
    """mmdet 3.3.0's heads on given outputs, with anchors from offset 0: what configs say becomes
    their losses, and their detections."""
    reference = np.load(GOLDEN / "successor_losses.npz")
    kinds, names, config, opts = MMDETS[head]
    cfg = make_cfg(*opts, "MODEL.ATSS.NUM_CLASSES", 8, config=config)
    code = BOX_CODES.build(cfg.MODEL.ATSS)
    known = {"num_levels": 5, "num_classes": 8, "code": code}
    phase = build_branches(cfg, known)["main"].at(0)
    maps = {
        kind: [torch.from_numpy(reference[f"{head}/{kind}_{i}"]).requires_grad_() for i in range(5)]
        for kind in kinds
    }
    classes, numbers, *more = (flatten_levels(maps[kind], dim) for kind, dim in kinds.items())
    output = HeadOutput(classes, numbers, more[0].squeeze(-1) if more else None)
    hw = tuple(reference["image_size"].tolist())
    anchors = Anchors.grid(hw, offset=0.0)
    boxes = [torch.from_numpy(reference[f"gt_boxes_{i}"]).float() for i in range(2)]
    labels = [torch.from_numpy(reference[f"gt_classes_{i}"]).long() for i in range(2)]
    image_index = [i for i, x in enumerate(boxes) for _ in x]
    gt = make_gt(torch.cat(boxes), image_index, 2, torch.cat(labels))

    decoded = code.decode(output.numbers, anchors.boxes, anchors.stride)
    seen = Predictions(output.map(torch.Tensor.detach), decoded.detach())
    losses = phase.criterion(output, decoded, anchors, gt, phase.assigner(anchors, gt, seen))
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

    detect = build_postprocess(cfg)
    for i, found in enumerate(detect(seen.output, anchors, code, [hw] * 2)):
        theirs = [torch.from_numpy(reference[f"{head}/det_{x}_{i}"]) for x in DETECTED]
        assert len(found) == len(theirs[0])
        order = theirs[1].argsort(descending=True, stable=True)  # PAA's come class by class
        boxes, scores, classes = (x[order] for x in theirs)
        torch.testing.assert_close(found.scores, scores, atol=1e-6, rtol=1e-5)
        assert torch.equal(found.pred_classes, classes)
        torch.testing.assert_close(found.pred_boxes.tensor, boxes, atol=1e-3, rtol=0)


def matched_of(output, assignment):
    """What a criterion hands its parts."""
    seen = []

    def look(matched):
        seen.append(matched)
        return matched.positive.float()

    boxes = BoxDeltas().decode(output.numbers, ANCHORS.boxes, ANCHORS.stride)
    Criterion(cls_target=look)(output, boxes, ANCHORS, GT, assignment)
    return seen[0]


def test_what_parts_see():
    matched = matched_of(random_output(), Assignment(GT_INDEX, torch.full((2, 4), 0.25)))
    assert torch.equal(matched.target_boxes[0, 1], GT.boxes[1])
    assert torch.equal(matched.target_boxes[0, 2], ANCHORS.boxes[2])
    assert torch.equal(matched.boxes[0, 2], ANCHORS.boxes[2])
    assert matched.target_classes[0, :2].tolist() == [1, 0]
    assert matched.output.numbers[0, 2].abs().sum() == 0
    assert matched.output.classes[1, 0].abs().sum() == 0
    assert matched.anchors.stride.tolist() == [8] * 4
    assert score(matched)[0].tolist() == [0.25, 0.25, 0, 0]


def test_probabilities_are_no_logits():
    output = random_output()
    said = output._replace(classes=output.classes.sigmoid(), probabilities=True)
    for (name, a), b in zip(losses_of(output).items(), losses_of(said).values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def losses_with(assignment=None, **parts):
    output = random_output()
    boxes = BoxDeltas().decode(output.numbers, ANCHORS.boxes, ANCHORS.stride)
    assignment = assignment or Assignment.hard(GT_INDEX)
    losses = Criterion(**parts)(output, boxes, ANCHORS, GT, assignment)
    return {name: x.item() for name, x in losses.items()}


def test_bounds_and_weights_are_values():
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
    by_targets = losses_with(
        Assignment(GT_INDEX, (GT_INDEX >= 0) * 1.0), cls_target=score, normaliser=targets
    )
    assert by_targets == pytest.approx(plain)


def test_terms_act_together_each_with_its_weight():
    plain = losses_with()
    both = losses_with(box_terms={"giou": GIoU(weight=1.0), "again": GIoU(weight=0.25)})
    assert both["loss_box_reg"] == pytest.approx(plain["loss_box_reg"] / 2)
    assert both["loss_again"] == pytest.approx(plain["loss_box_reg"] / 8)


def test_the_box_weight_may_be_another_than_the_quality():
    plain, one = losses_with(), losses_with(box_weight=one_for_all)
    assert one["loss_box_reg"] != pytest.approx(plain["loss_box_reg"], rel=1e-3)
    assert one["loss_centerness"] == plain["loss_centerness"]
    without = losses_with(quality=None)
    assert without.keys() == {"loss_cls", "loss_box_reg"}
    assert without["loss_box_reg"] == one["loss_box_reg"]
    by_score = losses_with(Assignment(GT_INDEX, torch.full((2, 4), 0.3)), box_weight=score)
    assert by_score["loss_box_reg"] == pytest.approx(one["loss_box_reg"])


def test_a_criterion_may_lack_classes_or_boxes_but_not_all():
    assert losses_with(cls_loss=None).keys() == {"loss_box_reg", "loss_centerness"}
    assert losses_with(box_terms={}).keys() == {"loss_cls", "loss_centerness"}
    with pytest.raises(ValueError, match="a branch has no loss"):
        losses_with(cls_loss=None, box_terms={}, quality=None)
    with pytest.raises(ValueError, match="a box term cannot be called 'cls'"):
        Criterion(box_terms={"giou": GIoU(), "cls": GIoU()})
