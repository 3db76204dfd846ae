import equality
import pytest
import rule_scenes
import torch


@pytest.fixture(scope="module")
def found():
    return equality.call_rules("MaxIoU", len(rule_scenes.TRAITS))


def copied(found):
    """Twice, of one engine."""
    return [
        {"scenes": found["scenes"], "lists": {name: list(x) for name, x in found["lists"].items()}}
        for _ in range(2)
    ]


def test_scenes_of_rules_have_every_trait(found):
    assert {x for traits, *_ in found["scenes"] for x in traits.split(" + ")} == {
        *rule_scenes.TRAITS
    }
    assert not any(isinstance(x, str) for calls in found["lists"].values() for x in calls)
    assert len({inputs for _, inputs, _ in found["scenes"]}) == len(found["scenes"])
    assert equality.call_rules("none", 3)["scenes"][2][1] == found["scenes"][2][1]


def test_equal_rules_are_equal(found, capsys):
    assert equality.compare_rules(*copied(found)) == 0
    assert f"{len(rule_scenes.TRAITS)} scenes: 0 calls differ" in capsys.readouterr().out


def test_one_anchor_that_differs_is_found(found, capsys):
    old, new = copied(found)
    gt_index, score = new["lists"]["MaxIoU"][1]
    other = gt_index.clone()
    other[0, 5] += 1
    new["lists"]["MaxIoU"][1] = other, score
    assert equality.compare_rules(old, new) == 1
    assert "scene 1 (crowded): MaxIoU: 1 anchors, 0 scores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("new", "wanted"),
    [
        ((torch.tensor([[0, 1, -1]]), torch.tensor([[0.5, 1.0, 0.0]])), (3, 0, 0, 0, 0.0, "")),
        ((torch.tensor([[2, 1, -1]]), torch.tensor([[0.5, 1.0, 0.0]])), (3, 1, 1, 0, 0.0, "")),
        ((torch.tensor([[1, 1, 0]]), torch.tensor([[0.5, 1.0, 0.0]])), (3, 2, 0, 0, 0.0, "")),
        ((torch.tensor([[0, 1, -1]]), torch.tensor([[0.5, 0.75, 0.0]])), (3, 0, 0, 1, 0.25, "")),
        ((torch.tensor([[0, 1, -1]]), None), (3, 0, 0, 3, torch.inf, "")),
        ("ValueError: x", (3, 3, 0, 0, 0.0, "ValueError: x")),
    ],
)
def test_differences_of_a_call(new, wanted):
    """Objects 0 and 2 are identical."""
    old = torch.tensor([[0, 1, -1]]), torch.tensor([[0.5, 1.0, 0.0]])
    assert equality.differences(old, new, torch.tensor([0, 1, 0])) == wanted
