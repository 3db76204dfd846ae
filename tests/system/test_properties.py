"""Properties for any finite input: boxes tiny, huge, without area, inverted, duplicated or far
away, levels of any size, outputs of +-1e4 in any precision.

Coordinates are up to 1e8 pixels, because areas are squares, and float32 ends at 3e38.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atss import IGNORE, Anchors, ATSSDetector, GroundTruth
from atss.anchors import GridAnchorGenerator
from atss.assigners import ASSIGNER_REGISTRY
from atss.geometry import area, centres, iou, nearest_side
from atss.modeling import SCORES
from atss.modeling.box_coding import BoxDeltas, LogDistances, PointDistances
from atss.modeling.criterion import Criterion
from atss.modeling.postprocess import PostProcessor
from atss.modeling.terms import GIoULoss, IoULoss, SmoothL1Loss
from atss.structures import HeadOutput, Predictions

K = 3
LIMIT = 1e8
STRIDES = (8, 16, 32, 64, 128)


def examples(few: int, many: int):
    """Parametrise by the number of examples in `make test` and in `make test-full`."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def for_all(count: int, *strategies: st.SearchStrategy):
    """Run a function on examples, the same in each run."""
    checks = list(HealthCheck)
    same = settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=checks,
    )
    return lambda holds: same(given(*strategies)(holds))()


PLACES = st.one_of(
    st.integers(-20, 200).map(float),
    st.floats(-50, 300, width=32),
    st.floats(-LIMIT, LIMIT, width=32),
)
SIDES = st.one_of(
    st.sampled_from([0.0, -1.0, 1e-30, 1e-3, 0.02, 8.0, 64.0, 1e4, LIMIT]),
    st.floats(0, 300, width=32),
)


@st.composite
def boxes(draw):
    """Draw a few boxes, some of them twice."""
    drawn = draw(st.lists(st.tuples(PLACES, PLACES, SIDES, SIDES), max_size=5))
    kinds = [(x, y, x + width, y + height) for x, y, width, height in drawn]
    if kinds:
        kinds += draw(st.lists(st.sampled_from(kinds), max_size=3))
    return torch.tensor(kinds, dtype=torch.float32).reshape(-1, 4)


@st.composite
def grids(draw):
    """Draw arguments of Anchors.on_levels."""
    count = draw(st.integers(1, 5))
    side = st.integers(1, 7)
    return SimpleNamespace(
        sizes=draw(st.lists(st.tuples(side, side), min_size=count, max_size=count)),
        strides=STRIDES[:count],
        scales=draw(st.sampled_from([(8.0,), (1.0,), (4.0, 6.0)])),
        ratios=draw(st.sampled_from([(1.0,), (0.25,), (0.5, 1.0, 2.0)])),
        offset=draw(st.sampled_from([0.0, 0.5])),
    )


@st.composite
def truths(draw):
    """Draw the ground truth of one to three images."""
    num_images = draw(st.integers(1, 3))
    drawn = draw(boxes())
    which = st.lists(st.integers(0, num_images - 1), min_size=len(drawn), max_size=len(drawn))
    image_index = torch.tensor(draw(which), dtype=torch.long)
    return GroundTruth(drawn, torch.arange(len(drawn)) % K, image_index, num_images)


def of_levels(rule: str, levels: int):
    if rule == "SpatialScale":
        return ASSIGNER_REGISTRY.get(rule)(ranges=(64, 128, 256, 512)[: levels - 1])
    if rule == "Sampled":
        return ASSIGNER_REGISTRY.get(rule)(num=100_000, positive_fraction=1.0)  # all
    return ASSIGNER_REGISTRY.get(rule)()


def part(gt: GroundTruth, keep: torch.Tensor, num_images: int) -> GroundTruth:
    image_index = gt.image_index[keep] if num_images > 1 else torch.zeros_like(keep)
    return GroundTruth(gt.boxes[keep], gt.classes[keep], image_index, num_images)


@pytest.mark.parametrize("rule", [name for name, _ in ASSIGNER_REGISTRY])
@examples(100, 1250)
def test_assignment(rule, count):
    @for_all(count, grids(), truths(), st.randoms(use_true_random=False))
    def holds(grid, gt, random):
        assign = of_levels(rule, len(grid.sizes))
        anchors = Anchors.on_levels(**vars(grid))
        output = outputs(grid, gt.num_images, random.getrandbits(30), torch.float32, False)
        decoded = BoxDeltas().decode(output.box_regression, anchors.boxes, anchors.stride)
        predictions = Predictions(output, decoded)
        dynamic = getattr(assign, "looks_at_predictions", False)
        found = assign(anchors, gt, predictions)
        index = found.gt_index
        assert index.shape == (gt.num_images, len(anchors.boxes))
        assert index.min() >= IGNORE
        assert index.max() < len(gt)
        assert (found.score is None) == (not dynamic or rule in ("PAA", "DDOD"))
        if found.score is not None:
            assert ((found.score >= 0) & (found.score <= 1)).all()
            assert (found.score[index < 0] == 0).all()
        image, anchor = (index >= 0).nonzero(as_tuple=True)
        owner = index[image, anchor]
        assert torch.equal(gt.image_index[owner], image)
        owned, claimed = gt.boxes[owner].double(), anchors.boxes[anchor].double()
        if (not dynamic and rule not in ("MaxIoU", "Matcher")) or rule == "TAL":
            assert (nearest_side(centres(claimed), owned) > 0).all()

        # An image's assignment does not depend on the others.
        for i in range(gt.num_images):
            keep = (gt.image_index == i).nonzero().squeeze(1)
            single = Predictions(output.at(slice(i, i + 1)), decoded[i : i + 1])
            alone = assign(anchors, part(gt, keep, 1), single).gt_index[0]
            if len(keep):
                alone = torch.where(alone >= 0, keep[alone.clamp(min=0)], alone)
            assert torch.equal(alone, index[i])

        # Nor on the order of objects, except for ties, which predictions cause more often.
        if dynamic:
            return
        order = list(range(len(gt)))
        random.shuffle(order)
        order = torch.tensor(order, dtype=torch.long)
        other = GroundTruth(
            gt.boxes[order], gt.classes[order], gt.image_index[order], gt.num_images
        )
        shuffled = assign(anchors, other).gt_index
        assert torch.equal(shuffled.clamp(max=0), index.clamp(max=0))
        new_owned = other.boxes[shuffled[image, anchor]].double()
        if rule == "SpatialScale":
            assert torch.equal(area(owned), area(new_owned))
        else:
            assert torch.equal(iou(claimed, owned), iou(claimed, new_owned))


LOSSES = {
    "giou": lambda coder: GIoULoss(),
    "iou": lambda coder: IoULoss(),
    "smooth_l1": lambda coder: SmoothL1Loss(code=coder),
}
PARTS = [
    ("box", "giou"),
    ("box", "iou"),
    ("box", "smooth_l1"),
    ("point", "giou"),
    ("point", "iou"),
    ("log_point", "giou"),
    ("log_point", "iou"),
]


def detector_of(grid, coder: str, loss: str, rule: str, score: str = "sqrt") -> ATSSDetector:
    """Make a detector whose backbone and head are identities."""
    coder = {"box": BoxDeltas, "point": PointDistances, "log_point": LogDistances}[coder]()
    kinds = vars(grid).items()
    return ATSSDetector(
        backbone=torch.nn.Identity(),
        head=torch.nn.Identity(),
        head_in_features=["p"] * len(grid.sizes),
        anchor_generator=GridAnchorGenerator(**{k: v for k, v in kinds if k != "sizes"}),
        assigner=of_levels(rule, len(grid.sizes)),
        box_coder=coder,
        criterion=Criterion(box_terms={loss: LOSSES[loss](coder)}),
        postprocess=PostProcessor(topk_candidates=20, max_detections=30, score=SCORES.get(score)),
        num_classes=K,
        pixel_mean=[0.0],
        pixel_std=[1.0],
    )


PALETTE = torch.tensor([-1e4, -1e3, -60, -5, -1, -1e-6, 0, 1e-3, 1, 5, 60, 1e3, 1e4])


def outputs(grid, n: int, seed: int, dtype: torch.dtype, quality: bool) -> HeadOutput:
    """Make outputs of any size; logits and quality have the dtype, box_regression float32."""
    generator = torch.Generator().manual_seed(seed)
    anchors = Anchors.on_levels(**vars(grid))
    shape = (n, len(anchors.boxes), K + 5)
    plain = torch.randn(shape, generator=generator)
    chosen = PALETTE[torch.randint(len(PALETTE), shape, generator=generator)]
    values = torch.where(torch.rand(shape, generator=generator) < 0.5, plain, chosen)
    logits, deltas = values[..., :K].to(dtype), values[..., K : K + 4].clone()
    return HeadOutput(logits, deltas, values[..., -1].to(dtype) if quality else None)


def features(grid, n: int) -> list[torch.Tensor]:
    return [torch.zeros(n, 1, *size) for size in grid.sizes]


DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@pytest.mark.parametrize(("coder", "loss"), PARTS)
@examples(40, 500)
def test_losses_and_gradients(coder, loss, count):
    rules = st.sampled_from([name for name, _ in ASSIGNER_REGISTRY])

    @for_all(count, grids(), truths(), rules, st.integers(0, 1 << 30), DTYPES, st.booleans())
    def holds(grid, gt, rule, seed, dtype, quality):
        if coder != "box":
            grid.scales, grid.ratios = grid.scales[:1], grid.ratios[:1]
        detector = detector_of(grid, coder, loss, rule).train()
        output = outputs(grid, gt.num_images, seed, dtype, quality)
        leaves = [x.requires_grad_() for x in output[:3] if x is not None]
        losses = detector.forward_training(
            None, features(grid, gt.num_images), {"main": output}, gt
        )
        for name, value in losses.items():
            assert torch.isfinite(value), (name, value)
            assert value >= 0, (name, value)
        sum(losses.values()).backward()
        assert all(torch.isfinite(x.grad).all() for x in leaves)


@pytest.mark.parametrize("coder", ["box", "point", "log_point"])
@examples(60, 1000)
def test_detections(coder, count):
    sizes = st.tuples(st.integers(1, 200), st.integers(1, 200))
    scores = st.sampled_from(sorted(SCORES.entries))

    @for_all(count, grids(), sizes, scores, st.integers(0, 1 << 30), DTYPES, st.booleans())
    def holds(grid, size, score, seed, dtype, quality):
        detector = detector_of(grid, coder, "giou", "ATSS", score).eval()
        output = outputs(grid, 2, seed, dtype, quality)
        images = SimpleNamespace(image_sizes=[size, (64, 32)])
        results = detector.forward_inference(images, features(grid, 2), {"main": output})
        for i, (found, (height, width)) in enumerate(zip(results, images.image_sizes, strict=True)):
            corners = found.pred_boxes.tensor
            assert len(found) <= 30
            assert torch.isfinite(corners).all()
            assert (corners >= 0).all()
            assert (corners <= torch.tensor([width, height, width, height])).all()
            assert (corners[:, 2:] >= corners[:, :2]).all()
            assert ((found.scores >= 0) & (found.scores <= 1)).all()
            assert (found.scores[:-1] >= found.scores[1:]).all()
            assert ((found.pred_classes >= 0) & (found.pred_classes < K)).all()
            # Suppression offsets boxes by class, which drops smaller sides in float64.
            visible = found[(corners[:, 2:] - corners[:, :2]).amin(dim=1) > 1e-6]
            sides = visible.pred_boxes.tensor.double()
            overlap = iou(sides[:, None], sides).fill_diagonal_(0)
            rivals = visible.pred_classes[:, None] == visible.pred_classes
            assert (overlap[rivals] <= 0.6 + 1e-6).all()

            one = output.map(lambda x, i=i: x[i : i + 1])
            single = SimpleNamespace(image_sizes=[(height, width)])
            (alone,) = detector.forward_inference(single, features(grid, 1), {"main": one})
            assert torch.equal(alone.pred_boxes.tensor, corners)
            assert torch.equal(alone.scores, found.scores)
