import equality
import pytest
import rule_scenes
import torch

from atss.assigners import ASSIGNER_REGISTRY
from atss.geometry import iou


@pytest.fixture(scope="module")
def calls():
    return equality.call_rules("MaxIoU", len(rule_scenes.TRAITS))


def copied(calls):
    """Return two copies, with the results of one engine."""
    return [
        {"scenes": calls["scenes"], "lists": {name: list(x) for name, x in calls["lists"].items()}}
        for _ in range(2)
    ]


def test_every_rule_is_compared():
    assert {name for name, _ in ASSIGNER_REGISTRY} == rule_scenes.ARGUMENTS.keys()


def test_every_trait_has_a_scene(calls):
    assert {x for traits, *_ in calls["scenes"] for x in traits.split(" + ")} == {
        *rule_scenes.TRAITS
    }
    assert not any(isinstance(x, str) for results in calls["lists"].values() for x in results)
    assert len({inputs for _, inputs, _ in calls["scenes"]}) == len(calls["scenes"])
    assert equality.call_rules("none", 3)["scenes"][2][1] == calls["scenes"][2][1]


def test_equal_rules_are_equal(calls, capsys):
    assert equality.compare_rules(*copied(calls)) == 0
    assert f"{len(rule_scenes.TRAITS)} scenes: 0 calls differ" in capsys.readouterr().out


def test_one_different_anchor_is_reported(calls, capsys):
    old, new = copied(calls)
    gt_index, score = new["lists"]["MaxIoU"][1]
    other = gt_index.clone()
    other[0, 5] += 1
    new["lists"]["MaxIoU"][1] = other, score
    assert equality.compare_rules(old, new) == 1
    assert "scene 1 (crowded): MaxIoU: 1 anchors, 0 scores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ((torch.tensor([[0, 1, -1]]), torch.tensor([[0.5, 1.0, 0.0]])), (3, 0, 0, 0, 0.0, "")),
        ((torch.tensor([[2, 1, -1]]), torch.tensor([[0.5, 1.0, 0.0]])), (3, 1, 1, 0, 0.0, "")),
        ((torch.tensor([[1, 1, 0]]), torch.tensor([[0.5, 1.0, 0.0]])), (3, 2, 0, 0, 0.0, "")),
        ((torch.tensor([[0, 1, -1]]), torch.tensor([[0.5, 0.75, 0.0]])), (3, 0, 0, 1, 0.25, "")),
        ((torch.tensor([[0, 1, -1]]), None), (3, 0, 0, 3, torch.inf, "")),
        ("ValueError: x", (3, 3, 0, 0, 0.0, "ValueError: x")),
    ],
)
def test_differences_of_a_call(new, expected):
    """Objects 0 and 2 are identical."""
    old = torch.tensor([[0, 1, -1]]), torch.tensor([[0.5, 1.0, 0.0]])
    assert equality.differences(old, new, torch.tensor([0, 1, 0])) == expected


def sides(boxes):
    return boxes[..., 2:] - boxes[..., :2]


def best_overlaps(scene):
    overlap = iou(scene.gt.boxes[:, None].double(), scene.anchors.boxes.double())
    return overlap.amax(dim=1).tolist()


@pytest.fixture(scope="module")
def scenes():
    return [rule_scenes.make_scene(i) for i in range(4 * len(rule_scenes.TRAITS))]


# True for most scenes of a trait and false for most others.
HAVE = {
    "crowded": lambda s: len(s.gt) > 20,
    "several images": lambda s: (s.gt.image_index.diff() < 0).any(),
    "empty images": lambda s: s.gt.num_images == 3 and len(s.gt.image_index.unique()) < 3,
    "empty batch": lambda s: len(s.gt) == 0,
    "tiny": lambda s: len(s.gt) and sides(s.gt.boxes).median() < 7,
    "beyond the canvas": lambda s: (s.gt.boxes < 0).any(),
    "without area": lambda s: (sides(s.gt.boxes) == 0).any(),
    "duplicates": lambda s: len(equality._alike(s.gt).unique()) < len(s.gt),
    "ties": lambda s: {0.5, 1.0} & set(best_overlaps(s)),
    "not finite": lambda s: not s.predictions.boxes.isfinite().all(),
    "far predictions": lambda s: (s.predictions.boxes.nan_to_num(0, 0, 0) > 1e4).any(),
    "constant predictions": lambda s: (s.predictions.boxes.diff(dim=1) == 0).float().mean() > 0.5,
    "probabilities": lambda s: s.predictions.output.probabilities,
    "nine anchors": lambda s: s.anchors.num_anchors == 9,
    "one level": lambda s: len(s.anchors.strides) == 1,
    "odd strides": lambda s: s.anchors.offset == 0,
    "large canvas": lambda s: len(s.anchors.boxes) / s.anchors.num_anchors > 1200,
}


@pytest.mark.parametrize("trait", rule_scenes.TRAITS[1:])
def test_scenes_have_the_traits_that_they_name(trait, scenes):
    shares = []
    for named in (True, False):
        having = [bool(HAVE[trait](s)) for s in scenes if (trait in s.traits) == named]
        shares.append(sum(having) / len(having))
    assert shares[0] >= 0.5, shares
    assert shares[1] < 0.5, shares
