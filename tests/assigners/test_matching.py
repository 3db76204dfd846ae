"""Rules that need predictions: reference vectors, brute force in float64, and by hand."""

from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
from conftest import make_gt
from predicted_scenes import (
    PLACES,
    VECTORS,
    by_hand,
    load_case,
    make_batch,
    overlaps,
    predict,
    scene_of,
)
from scipy.optimize import brentq

from atss import BACKGROUND, Anchors, HeadOutput
from atss.assigners import (
    DDOD,
    NWD,
    OTA,
    PAA,
    POTO,
    TAL,
    IoU,
    Matching,
    SimD,
    SimOTA,
    SoftLabel,
    use_engine,
)
from atss.assigners.lists import Lists
from atss.assigners.mixture import mixture
from atss.assigners.sim_ota import dynamic_k
from atss.assigners.tables import Tables
from atss.errors import UserError
from atss.geometry import nearest_side
from atss.losses import Focal, QualityFocal, cross_entropy
from atss.structures import Predictions

SLOW = pytest.mark.slow
CASES = ("typical", "crowded", "empty")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "rule"), [("tal", TAL()), ("simota", SimOTA())])
def test_reference_vectors(case, name, rule):
    """From mmdet, with scores as probabilities."""
    anchors, gt, scores, boxes = load_case(case)
    found = rule(anchors, gt, predict(scores, boxes, probabilities=True))
    np.testing.assert_array_equal(found.gt_index[0], VECTORS[f"{case}/{name}_matched"])


@pytest.mark.parametrize("case", CASES)
def test_scores_of_tal_are_the_reference_metric_scaled(case):
    anchors, gt, scores, boxes = load_case(case)
    found = TAL()(anchors, gt, predict(scores, boxes, probabilities=True))
    overlap = oracle.pairwise_iou(gt.boxes.double().numpy(), boxes[0].astype(np.float64))
    for g in range(len(gt)):
        positive = (found.gt_index[0] == g).numpy()
        if positive.any():
            metric = VECTORS[f"{case}/tal_metric"][positive].astype(np.float64)
            expected = metric / (metric.max() + 1e-7) * overlap[g, positive].max()
            np.testing.assert_allclose(found.score[0, positive], expected, rtol=1e-4, atol=1e-6)


# name -> rule, brute force, arguments of the latter.
BRUTE = {
    "TAL": (TAL(), oracle.tal, {}),
    "TAL of 3": (TAL(3, 0.5, 2.0), oracle.tal, {"k": 3, "alpha": 0.5, "beta": 2.0}),
    "TAL before": (TAL(inside="before"), oracle.tal, {"before": True}),
    "TAL by class": (TAL(beta=0.1), oracle.tal, {"beta": 0.1}),
    "SimOTA": (SimOTA(), oracle.simota, {}),
    "SimOTA of 3": (SimOTA(3, 1.5), oracle.simota, {"top_k": 3, "radius": 1.5}),
    "SoftLabel": (SoftLabel(), oracle.soft_label, {}),
    "SoftLabel of 3": (SoftLabel(3, 1.0), oracle.soft_label, {"top_k": 3, "radius": 1.0}),
    "OTA": (OTA(), oracle.ota, {}),
    "OTA of 3": (OTA(3, 1.3), oracle.ota, {"top_k": 3, "radius": 1.3}),
    "OTA in 23 steps": (
        OTA(regularisation=0.005, iterations=23),
        oracle.ota,
        {"regularisation": 0.005, "iterations": 23},
    ),
    "PAA": (PAA(), oracle.paa, {}),
    "PAA of all": (PAA(take="all"), oracle.paa, {"take": "all"}),
    "PAA of the authors": (
        PAA(box_weight=1.0, take="all", claims_go_to="best"),
        oracle.paa,
        {"box_weight": 1.0, "take": "all", "own": True},
    ),
    "PAA of 3": (PAA(3, box_weight=1.0), oracle.paa, {"k": 3, "box_weight": 1.0}),
    "ATSS of predictions": (DDOD(alpha=0.8), oracle.ddod, {}),
    "ATSS of boxes": (DDOD(4, alpha=0.5), oracle.ddod, {"k": 4, "alpha": 0.5}),
}
for rule, brute in {
    TAL: oracle.tal,
    SimOTA: oracle.simota,
    SoftLabel: oracle.soft_label,
    OTA: oracle.ota,
    PAA: oracle.paa,
}.items():
    for like, similarity in (("nwd", NWD()), ("simd", SimD())):
        BRUTE[f"{rule.__name__} by {like}"] = rule(similarity=similarity), brute, {"like": like}


def expected(brute, arguments, anchors, objects, classes, logits, boxes):
    if not len(objects):
        return np.full(len(boxes), BACKGROUND), np.zeros(len(boxes))
    boxes, objects = boxes.astype(np.float64), objects.astype(np.float64)
    return brute(anchors, objects, classes, logits.astype(np.float64), boxes, **arguments)


def compare(name, place, seed):
    rule, brute, arguments = BRUTE[name]
    anchors, gt, predictions, predicted, owned = make_batch(place, seed)
    found = rule(anchors, gt, predictions)
    for i, (own, (logits, boxes)) in enumerate(zip(owned, predicted, strict=True)):
        objects, classes = gt.boxes.numpy()[own], gt.classes.numpy()[own]
        owner, score = expected(brute, arguments, anchors, objects, classes, logits, boxes)
        owner = np.where(owner >= 0, own[owner] if len(own) else 0, BACKGROUND)
        np.testing.assert_array_equal(found.gt_index[i], owner)
        assert (found.score is None) == (brute in (oracle.paa, oracle.ddod))
        if found.score is not None:
            np.testing.assert_allclose(found.score[i], score, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BRUTE)
@pytest.mark.parametrize("seed", [0, 2, *(pytest.param(s, marks=SLOW) for s in range(3, 20))])
def test_equals_brute_force(name, seed):
    compare(name, "plain", seed)


# Other rules depend on the last bits here: of exponentials that tie, of squares of odd strides.
@pytest.mark.parametrize("place", list(PLACES)[1:])
@pytest.mark.parametrize("name", [x for x in BRUTE if not x.startswith(("PAA by", "ATSS"))])
def test_equals_brute_force_on_other_grids(name, place):
    compare(name, place, 1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("like", ["iou", "nwd", "simd"])
@pytest.mark.parametrize("arguments", [{}, {"alpha": 0.5, "radius": 4.0}])
@pytest.mark.parametrize("seed", range(3))
def test_poto_is_the_best_matching(place, like, arguments, seed):
    """An object without an anchor counts as -1, as in the authors' code; identical objects have
    different anchors, in either order."""
    similarity = {"iou": IoU(), "nwd": NWD(), "simd": SimD()}[like]
    anchors, gt, predictions, predicted, owned = make_batch(place, seed)
    found = POTO(**arguments, similarity=similarity)(anchors, gt, predictions)
    assert found.positives_per_object(len(gt)).max() == 1
    matched = 0
    for i, (own, (logits, boxes)) in enumerate(zip(owned, predicted, strict=True)):
        objects = gt.boxes[own].double().numpy()
        quality = oracle.poto_qualities(
            anchors,
            objects,
            gt.classes[own].numpy(),
            logits.astype(np.float64),
            boxes.astype(np.float64),
            **arguments,
            like=like,
        )
        positive = (found.gt_index[i] >= 0).nonzero().squeeze(1).numpy()
        rows = [own.tolist().index(g) for g in found.gt_index[i, positive].tolist()]
        values = quality[rows, positive]
        assert (values >= 0).all()
        total = values.sum() - (len(own) - len(positive))
        assert total == pytest.approx(oracle.best_total(quality), abs=1e-9)
        matched += len(positive)
    assert matched > 8


@pytest.mark.parametrize("similarity", [IoU(), NWD(), SimD()])
@pytest.mark.parametrize("some_eligible", [False, True])
def test_near_lists_all_similar_boxes(similarity, some_eligible):
    """Predictions that are equal in a block, and others; some of them inverted."""
    generator = torch.Generator().manual_seed(0)
    anchors = Anchors.grid((256, 320))
    count = len(anchors.boxes)
    size = (torch.rand(2, count, 2, generator=generator) * 7 - 1).exp()
    size[:, 64:] = size[:, 64 + torch.arange(count - 64).div(16, rounding_mode="floor") * 16 % 64]
    middle = anchors.points.float() + 6 * torch.randn(2, count, 2, generator=generator)
    boxes = torch.cat([middle - size / 2, middle + size / 2], dim=-1)
    boxes[:, ::37] = boxes[:, ::37].flip(-1)
    corner = 300 * torch.rand(60, 2, generator=generator)
    side = (torch.rand(60, 2, generator=generator) * 6).exp()
    gt = make_gt(torch.cat([corner, corner + side], dim=1), torch.arange(60) % 2, 2)
    eligible = torch.rand(2 * count, generator=generator) < 0.7 if some_eligible else None
    logits = torch.zeros(2, count, 1)
    predictions = Predictions(HeadOutput(logits, boxes, None), boxes)
    batch = Lists(anchors, gt, predictions, similarity)
    batch.__dict__["eligible"] = eligible
    dense = similarity(boxes[gt.image_index].double(), gt.boxes[:, None].double())
    if eligible is not None:
        dense = dense * eligible.view(2, count)[gt.image_index]
    for least in (0.0, 1e-6, 0.02, 0.3, 0.7, 0.95):
        near = batch.near(batch.all_objects, torch.full((60,), least))
        found = torch.zeros_like(dense, dtype=torch.bool)
        found[near.owner, near.index] = True
        missed = (dense >= max(least, 1e-12)) & ~found
        assert not missed.any(), least
        assert (dense[found] >= 0.99 * least).all()
    near = batch.near(batch.all_objects)
    found = torch.zeros_like(dense, dtype=torch.bool)
    found[near.owner, near.index] = True
    x = anchors.points
    low, high = gt.boxes[:, None, :2], gt.boxes[:, None, 2:]
    wanted = ((x > low) & (x < high)).all(dim=-1) | (dense > 0)
    if eligible is not None:
        wanted = wanted & eligible.view(2, count)[gt.image_index]
    assert not (wanted & ~found).any()


def test_near_lists_centres_inside_by_a_float32_step():
    """Objects of one float32 step around the coordinate of a column or row: 0.1 strides are not
    exact. Rows are blocks of 16, whose boxes are far away."""
    anchors = Anchors.grid((40, 112), strides=(7,), scales=(1.0,), offset=0.1)
    lines = []
    for axis, end in ((0, 40.0), (1, 112.0)):
        for at in anchors.points[:, axis].unique():
            near = at.float()
            steps = near, torch.nextafter(near, near + (1 if near < at else -1))
            low, high = sorted(x.item() for x in steps)
            lines.append([low, 0, high, end] if axis == 0 else [0, low, end, high])
    gt = make_gt(lines)
    far = torch.full_like(anchors.boxes, 900.0) + torch.tensor([0.0, 0, 9, 9])
    batch = Lists(anchors, gt, predict(torch.zeros(1, len(far), 2), far[None]))
    near = batch.near(batch.all_objects)
    found = torch.zeros(len(gt), len(far), dtype=torch.bool)
    found[near.owner, near.index] = True
    inside = oracle.inside_distance(anchors.points.numpy(), gt.boxes.double().numpy()) > 0
    assert inside.sum() > 80
    assert found[torch.from_numpy(inside)].all()


@pytest.mark.parametrize("rule", [TAL(), SimOTA(), SoftLabel(), OTA(), PAA(), POTO()])
def test_boxes_that_are_not_finite_are_background(rule):
    """Also if an object has no other candidates."""
    rng = np.random.default_rng(0)
    anchors = Anchors.grid((160, 224))
    gt = make_gt(oracle.random_boxes(rng, 25, (160, 224)), classes=rng.integers(3, size=25))
    boxes = anchors.boxes + 9 * torch.randn(anchors.boxes.shape, generator=torch.manual_seed(0))
    spoilt = torch.rand(len(boxes), generator=torch.manual_seed(1)) < 0.5
    boxes[spoilt, 2] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(len(boxes))[
        : spoilt.sum()
    ]
    logits = torch.randn(len(boxes), 3, generator=torch.manual_seed(2)) - 3
    found = rule(anchors, gt, predict(logits[None], boxes[None])).gt_index[0]
    assert (found >= 0).any()
    assert (found[spoilt] < 0).all()


def test_tal_by_hand():
    """Predictions moved by 0, 1 or 2 px are those of columns 0 to 2 of even rows: only 18 and 34
    lie inside the object."""
    anchors, gt, predictions = by_hand()
    found = TAL(top_k=12)(anchors, gt, predictions)
    # Columns 0, 1 and 2 of rows 0, 2, 4 and 6 are the best 12.
    assert (found.gt_index[0] == 0).nonzero().squeeze(1).tolist() == [18, 34]
    # Before: the best 12 of the 16 inside; predictions of rows 3 and 5 are moved by 8 px more.
    before = TAL(top_k=12, inside="before")(anchors, gt, predictions)
    inside = {row * 8 + column for row in (2, 3, 4, 5) for column in (2, 3, 4, 5)}
    kept = sorted(inside, key=lambda i: (i % 16, i))[:12]
    assert (before.gt_index[0] == 0).nonzero().squeeze(1).tolist() == sorted(kept)
    # Scores are proportional to the metric; the best one is the highest IoU.
    best = overlaps(2)
    np.testing.assert_allclose(found.score[0, [18, 34]], [best, best], rtol=1e-5)
    expected = best * (overlaps(5) / best) ** 6
    assert before.score[0, 21].item() == pytest.approx(expected, rel=1e-5)


def above_tals_bound():
    """Central anchors have an IoU of 0.8 and a probability of 0.97; one far away has a probability
    of 1 and an IoU slightly above 0.97^(1 / 6) * 0.8."""
    boxes = torch.tensor([[0.0, 0, 64, 64]])
    predicted, logits = boxes.repeat(64, 1), torch.full((64, 2), np.log(0.97 / 0.03))
    predicted[:, 3] = 0.8 * 64
    logits[9], predicted[9, 3] = 20.0, 0.9951 * 0.8 * 64
    return scene_of(boxes, [0], logits, predicted), 9


def beyond_soft_labels_distance():
    """First candidates are up to 3.75 strides from the centre, and a column beyond; others cost
    10^1.75. The class of nearer ones costs 0.1 % more; one 4.7504 strides away has no other
    cost."""
    boxes = torch.tensor([[13.997, 20, 93.997, 100]])
    predicted, logits = boxes.repeat(256, 1), torch.full((256, 2), -100.0)
    near, far = 7 * 16 + 6, 7 * 16 + 11  # at (52, 60) and (92, 60), around (53.997, 60)
    cost = 1.001 * 10**1.75 - 10 ** (1.997 / 8 - 3)
    logits[near, 0] = -brentq(
        lambda x: np.log1p(np.exp(x)) / (1 + np.exp(-x)) ** 2 - cost, 1, 99, xtol=1e-12
    )
    logits[far, 0] = 30.0
    return scene_of(boxes, [0], logits, predicted, (128, 128)), far


def beyond_soft_labels_iou():
    """An anchor without overlap costs at least -3 ln 1e-7 = 48.354. The one inside the object costs
    0.07 % more for its class; the one below it, which only the other object contains, costs 0.01
    more for its distance."""
    boxes = torch.tensor([[59.5, 59.5, 60.5, 60.5], [0, 0, 128, 128]])
    predicted = torch.tensor([0.0, 0, 10, 10]).repeat(256, 1)
    logits = torch.tensor([3.0, -30.0]).repeat(256, 1)
    inside, below, other = 7 * 16 + 7, 8 * 16 + 7, 9 * 16 + 8
    logits[inside, 0], logits[below, 0] = np.log(0.3 / 0.7), -30.0
    logits[other, 1], predicted[other] = 30.0, torch.tensor([0.0, 0, 128, 58])
    return scene_of(boxes, [0, 1], logits, predicted, (128, 128)), below


def at_simotas_penalty():
    """Two anchors outside the object predict it perfectly. The lower index wins: the one two rows
    above, which is no first candidate."""
    boxes = torch.tensor([[61.0, 57, 63, 63]])
    logits = torch.tensor([100.0, -100.0]).repeat(256, 1)
    predicted = torch.tensor([0.0, 0, 10, 10]).repeat(256, 1)
    above, near = 5 * 16 + 7, 7 * 16 + 7
    predicted[[above, near]] = boxes[0]
    return scene_of(boxes, [0], logits, predicted, (128, 128)), above


@pytest.mark.parametrize(
    ("rule", "brute", "arguments", "make"),
    [
        (TAL(1), oracle.tal, {"k": 1}, above_tals_bound),
        (TAL(1, inside="before"), oracle.tal, {"k": 1, "before": True}, above_tals_bound),
        (SimOTA(1), oracle.simota, {"top_k": 1}, at_simotas_penalty),
        (SoftLabel(1), oracle.soft_label, {"top_k": 1}, beyond_soft_labels_distance),
        (SoftLabel(1), oracle.soft_label, {"top_k": 1}, beyond_soft_labels_iou),
    ],
)
def test_candidates_beyond_the_bound_are_compared(rule, brute, arguments, make):
    """The best anchor is better than the rule's bound for other pairs by 0.1 % or less."""
    (anchors, gt, predictions), best = make()
    logits, boxes = (x[0].double().numpy() for x in (predictions.output.classes, predictions.boxes))
    owner, _ = brute(
        anchors, gt.boxes.double().numpy(), gt.classes.numpy(), logits, boxes, **arguments
    )
    assert np.flatnonzero(owner == 0).tolist() == [best]  # checks the example
    np.testing.assert_array_equal(rule(anchors, gt, predictions).gt_index[0], owner)


@pytest.mark.parametrize(
    ("rule", "counts"),
    [
        (TAL(1), 0),
        (TAL(1, inside="before"), 0),
        (SimOTA(1), 1),
        (SoftLabel(1), 1),
        (OTA(), 0),
        (POTO(), 1),
        (DDOD(alpha=0.5), 0),
    ],
)
def test_margin_of_inside(rule, counts):
    """A centre 0.005 px inside. As in the references, OTA, TOOD and ATSS have a margin of 0.01 px,
    others none."""
    boxes = torch.tensor([[27.995, 20.5, 35.9, 35.5]])  # contains only (28, 28)
    logits = torch.full((64, 2), 2.0)
    anchors, gt, predictions = scene_of(boxes, [0], logits, boxes.repeat(64, 1))
    chosen = (rule(anchors, gt, predictions).gt_index[0] == 0).nonzero().squeeze(1)
    assert chosen.tolist() == [27] * counts


def test_ota_with_a_supply_above_the_number_of_anchors():
    """The background supplies nothing."""
    rng = np.random.default_rng(0)
    anchors = Anchors.grid((24, 24), strides=(8,), scales=(2.0,))
    boxes = torch.tensor([0.0, 0, 24, 24]) + torch.from_numpy(rng.uniform(-2, 2, (4, 4))).float()
    predicted = boxes[torch.arange(9) % 4] + torch.from_numpy(rng.normal(0, 1, (9, 4))).float()
    logits = torch.from_numpy(rng.normal(0, 1, (9, 2))).float()
    anchors, gt, predictions = scene_of(boxes, [0, 1, 0, 1], logits, predicted, (24, 24))
    assert dynamic_k(Lists(anchors, gt, predictions).highest_similarities(20)).sum() > 9
    args = (gt.boxes.numpy(), gt.classes.numpy(), logits.numpy(), predicted.numpy())
    owner, _ = oracle.ota(anchors, *args)
    assert (owner >= 0).sum() > 5
    np.testing.assert_array_equal(OTA()(anchors, gt, predictions).gt_index[0], owner)


@pytest.mark.parametrize(
    "rule", [TAL(), SimOTA(), SoftLabel(), OTA(), PAA(), POTO(), DDOD(alpha=0.5)]
)
def test_rule_needs_predictions(rule):
    assert rule.looks_at_predictions
    with pytest.raises(
        ValueError, match=rf"{type(rule).__name__} needs the predictions of a model, got none"
    ):
        rule(Anchors.grid((64, 64)), make_gt([[0, 0, 9, 9]]))


@pytest.mark.parametrize("engine", ["lists", "tables"])
@pytest.mark.parametrize(
    ("method", "made", "sentence"),
    [
        ("cost", lambda pairs: pairs.probability[..., :3], "must return a tensor of shape"),
        ("select", lambda pairs: pairs.probability[..., :3] > 0, "must return a tensor of shape"),
        ("select", lambda pairs: pairs.probability, "must return a tensor of bool, got"),
        ("rank", lambda pairs: 1.0, "must return a tensor of shape .*, got float"),
    ],
)
def test_wrong_shape_of_an_own_method_is_named(engine, method, made, sentence):
    wrong = type("Wrong", (TAL,), {method: lambda self, pairs, *cost: made(pairs)})
    with use_engine(engine), pytest.raises(UserError, match=rf"^Wrong\.{method} {sentence}"):
        wrong()(*by_hand())


@pytest.mark.parametrize(
    "rule", [TAL(), SimOTA(), SoftLabel(), OTA(), PAA(), POTO(), DDOD(alpha=0.5)]
)
def test_scores_are_detached(rule):
    anchors, gt, predictions = by_hand()
    with_grad = Predictions(
        predictions.output.map(lambda x: x.requires_grad_()), predictions.boxes.requires_grad_()
    )
    found = rule(anchors, gt, with_grad)
    assert (found.gt_index >= 0).any()
    assert found.score is None or not found.score.requires_grad


@pytest.mark.parametrize("rule", [TAL(), SimOTA(), SoftLabel(), OTA(), PAA(), POTO()])
def test_probabilities_equal_logits(rule):
    anchors, gt, scores, boxes = load_case("crowded")
    p = torch.from_numpy(scores).double().clamp(1e-3, 1 - 1e-3)
    of_logits = rule(anchors, gt, predict((p / (1 - p)).log(), boxes))
    of_probabilities = rule(anchors, gt, predict(p, boxes, probabilities=True))
    assert torch.equal(of_logits.gt_index, of_probabilities.gt_index)


@pytest.mark.parametrize("loss", [Focal(), QualityFocal(), cross_entropy])
def test_anchors_of_equal_logits_have_equal_background_losses(loss):
    """At any place in memory, in lists and tables: float32 terms must not break ties."""
    anchors, classes = Anchors.grid((64, 64)), 1203
    logits = torch.randn(classes, generator=torch.manual_seed(0)).expand(2, len(anchors.boxes), -1)
    predictions = predict(logits, anchors.boxes.expand(2, -1, 4))
    gt = make_gt([[8, 8, 40, 40]], num_images=2)
    whole = Tables(anchors, gt, predictions).background(loss).flatten()
    few = Lists(anchors, gt, predictions).background_at(loss, torch.tensor([3, 5, 90]))
    assert len({*whole.tolist(), *few.tolist()}) == 1


@pytest.mark.parametrize(
    "rule", [TAL(inside="before"), SimOTA(), SoftLabel(), OTA(), PAA(), POTO()]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_change_no_others(rule, value):
    """Boxes and classes of background anchors."""
    anchors, gt, scores, boxes = load_case("typical")
    p = torch.from_numpy(scores).clamp(1e-6, 1 - 1e-6)
    logits, boxes = (p / (1 - p)).log(), torch.from_numpy(boxes).clone()
    plain = rule(anchors, gt, predict(logits, boxes))
    unwanted = (plain.gt_index[0] < 0).nonzero()[::50].squeeze(1)
    boxes[0, unwanted, 2] = value
    found = rule(anchors, gt, predict(logits, boxes))
    assert torch.equal(found.gt_index, plain.gt_index)
    if value is torch.nan:
        logits[0, unwanted] = value
        assert torch.equal(rule(anchors, gt, predict(logits, boxes)).gt_index, plain.gt_index)


@pytest.mark.parametrize(
    "rule", [TAL(), SimOTA(), SoftLabel(), OTA(), PAA(), POTO(), DDOD(alpha=0.5)]
)
def test_pieces_equal_the_whole_batch(rule, monkeypatch):
    """Few pairs at a time, as in crowds; shuffled objects of several images."""
    anchors, gt, predictions, *_ = make_batch("plain", 2)
    whole = rule(anchors, gt, predictions)
    monkeypatch.setattr("atss.assigners.lists.PIECE", 7 * len(anchors.boxes))
    monkeypatch.setattr("atss.assigners.atss.ATSS.CHUNK", 7)
    with use_engine("auto", limit=7 * len(anchors.boxes)):
        in_pieces = rule(anchors, gt, predictions)
    assert torch.equal(whole.gt_index, in_pieces.gt_index)
    assert whole.score is None or torch.equal(whole.score, in_pieces.score)


def test_paa_selects_the_cheaper_component():
    """Costs in two clusters: the component of the lower one, and the place of its peak."""
    values = torch.tensor([[0.9, 1.0, 1.02, 1.04, 1.2, 4.8, 5.0, 5.1, torch.inf]]).double()
    good, density = mixture(values)
    assert good.tolist() == [[True] * 5 + [False] * 4]
    assert density[0, :5].argmax() in (2, 3)
    assert density[0, 8] == -torch.inf


def test_refuses_arguments_out_of_range():
    for rule, argument, value, sentence in (
        (TAL, "top_k", 0, "top_k must be >= 1, got 0"),
        (TAL, "inside", "never", r"inside is 'never': choose from \['after', 'before'\]"),
        (TAL, "beta", 0.0, "beta must be >= 0.1"),
        (PAA, "take", "some", "take is 'some'"),
        (OTA, "regularisation", 0.0, "regularisation must be >= 0.001"),
        (POTO, "alpha", -0.1, "alpha must be between 0 and 1, got -0.1"),
        (POTO, "radius", 0, "radius must be >= 1e-06"),
        (DDOD, "alpha", 1.5, "alpha must be between 0 and 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=sentence):
            rule(**{argument: value})


@dataclass(frozen=True)
class Careless(Matching):
    """Selects all pairs, with costs and ranks of float32 and infinite costs outside the object."""

    def cost(self, pairs):
        least = -pairs.highest_of_object(-pairs.similarity)
        cost = torch.where(pairs.inside(), 1 + least, torch.inf)
        return cost.float()

    def select(self, pairs, cost):
        return torch.ones_like(cost, dtype=torch.bool)

    def rank(self, pairs):
        return pairs.similarity.float()


def test_pairs_of_infinite_cost_are_never_selected():
    anchors, gt, scores, boxes = load_case("typical")
    found = {}
    for engine in ("lists", "tables"):
        with use_engine(engine):
            found[engine] = Careless()(anchors, gt, predict(scores, boxes, True)).gt_index[0]
    assert torch.equal(found["lists"], found["tables"])
    positive = found["lists"] >= 0
    inside = nearest_side(anchors.points[:, None], gt.boxes.double()) > 0
    assert positive.any()
    assert inside[positive, found["lists"][positive]].all()


def test_rule_without_cost_is_named():
    @dataclass(frozen=True)
    class Empty(Matching):
        pass

    anchors, gt, scores, boxes = load_case("typical")
    with pytest.raises(NotImplementedError, match="Empty must define the methods cost and select"):
        Empty()(anchors, gt, predict(scores, boxes, True))
