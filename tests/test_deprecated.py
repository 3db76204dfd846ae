"""Names of version 0.2, which are removed in 0.4.0."""

import pickle
import re
import warnings
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from pages import run_page, train

from atss import Anchors, Assignment, GroundTruth, HeadOutput, Predictions, deprecated
from atss.assigners import NWD, TAL, IoU, Matching, use_engine
from atss.assigners.conflicts import assign_best
from atss.assigners.lists import Lists
from atss.assigners.pairs import class_cost
from atss.assigners.sim_ota import DynamicMatching
from atss.losses import cross_entropy
from atss.structures import Matched

# Results of version 0.2 for each rule of its page: positives, the sum of place * (object + 1), and
# the sum of scores.
EXPECTED = {"NearestInside": (93, 1765397, None), "BestInside": (294, 5733655, 90.24851)}
WARNINGS = (
    "pairs.all_anchors is deprecated .* 0.4.0: use atss.assigners.locations.all_anchors",
    "pairs.nearest_locations .* use atss.assigners.locations.nearest_locations",
    "pairs.resolve .* use atss.assigners.conflicts.assign_best",
    r"Assignment.hard .* use Assignment\(gt_index\)",
    "pairs.overlap is deprecated .* use pairs.similarity",
    "cuts.Cheapest .* use the method select, .* with atss.assigners.matching.select_cheapest",
    "matching.overlap .* use a method that returns pairs.similarity",
    r"Matching\(cost=..., cut=...\) .* use the methods cost, select, rank and score",
)


def scene():
    """40 objects of 3 images, and predictions."""
    generator = torch.Generator().manual_seed(0)
    anchors = Anchors.grid((160, 224))
    corner = torch.rand(40, 2, generator=generator) * torch.tensor([200.0, 140.0])
    side = torch.rand(40, 2, generator=generator) * 80 + 4
    classes = torch.randint(5, (40,), generator=generator)
    image_index = torch.randint(3, (40,), generator=generator)
    gt = GroundTruth(torch.cat([corner, corner + side], dim=1), classes, image_index, 3)
    shape = 3, len(anchors.boxes)
    boxes = anchors.boxes + torch.randn(*shape, 4, generator=generator) * 8
    logits = torch.randn(*shape, 5, generator=generator)
    return anchors, gt, Predictions(HeadOutput(logits, torch.zeros_like(boxes), None), boxes)


def sums(found):
    gt_index = found.gt_index
    place = torch.arange(gt_index.numel()).view_as(gt_index)
    score = None if found.score is None else pytest.approx(found.score.sum().item())
    return found.positive.sum(), (place * (gt_index + 1)).sum(), score


@pytest.mark.parametrize("engine", ["lists", "tables"])
def test_rules_of_version_0_2_assign_as_before(engine, tmp_path):
    with (
        warnings.catch_warnings(record=True) as caught,
        run_page("tests/golden/own_assigner_0_2.md") as (names, codes),
        use_engine(engine),
    ):
        warnings.simplefilter("always")
        for name, expected in EXPECTED.items():
            assert sums(names[name]()(*scene())) == expected
        for i, code in enumerate(codes):
            train(tmp_path / f"{i}.yaml", code)
    deprecations = [x for x in caught if "goes with version 0.4.0" in str(x.message)]
    assert {x.filename for x in deprecations} == {"tests/golden/own_assigner_0_2.md"}
    for sentence in WARNINGS:
        assert any(re.search(sentence, str(x.message)) for x in deprecations), sentence


@pytest.mark.parametrize("engine", ["lists", "tables"])
def test_rule_of_the_page_assigns_as_in_version_0_2(engine):
    with run_page("docs/own_assigner.md") as (names, _), use_engine(engine):
        assert sums(names["BestInside"]()(*scene())) == EXPECTED["BestInside"]


@pytest.mark.parametrize("old", deprecated.NAMES)
def test_old_name_is_the_new_object(old):
    place, _, name = old.rpartition(".")
    target, _, instead = deprecated.NAMES[old].partition(" ")
    new_place, _, new_name = target.rpartition(".")
    module = import_module(place)
    with pytest.warns(DeprecationWarning, match="0.4.0") as caught:
        found = getattr(module, name)
    assert found is getattr(import_module(new_place), new_name)
    sentence = f"{old} is deprecated and goes with version 0.4.0: use {instead or target}"
    assert [str(x.message) for x in caught] == [sentence]
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("old", deprecated.MODULES)
def test_old_module_has_the_names_of_the_new_one(old):
    new = import_module(deprecated.MODULES[old])
    public = (n for n, x in vars(new).items() if getattr(x, "__module__", "") == new.__name__)
    name = next(x for x in public if not x.startswith("_") and f"{old}.{x}" not in deprecated.NAMES)
    with pytest.warns(DeprecationWarning, match=f"use {new.__name__}.{name}"):
        assert getattr(import_module(old), name) is getattr(new, name)


def cost(pairs):
    assert pairs.similarity.dim() == 1
    return class_cost(pairs, cross_entropy, pairs.similarity) - pairs.similarity


def score(pairs):
    return pairs.probability


def test_rule_of_functions_assigns_as_rule_of_methods():
    """With any engine, on lists; also after pickling."""

    @dataclass(frozen=True)
    class New(DynamicMatching):
        def cost(self, pairs):
            return cost(pairs)

        def candidates(self, batch, ids):
            return batch.all_pairs(ids)

        def score(self, pairs):
            return score(pairs)

    with pytest.warns(DeprecationWarning, match=r"DynamicK .* atss.assigners.sim_ota.dynamic_k"):
        from atss.assigners.cuts import DynamicK
    with pytest.warns(DeprecationWarning, match="Matching"):
        old = Matching(cost=cost, cut=DynamicK(10), candidates=Lists.all_pairs, score=score)
    expected = New()(*scene())
    with use_engine("tables"):
        found = pickle.loads(pickle.dumps(old))(*scene())
    assert expected.positive.any()
    assert torch.equal(found.gt_index, expected.gt_index)
    assert torch.equal(found.score, expected.score)


def test_old_attributes_are_the_new_ones():
    batch = Lists(*scene())
    with pytest.warns(DeprecationWarning, match="Lists.around .* use Lists.near_centre"):
        pairs = batch.around(batch.all_objects, 2.0)
    assert len(pairs.owner)
    for old, new in (("overlap", "similarity"), ("around", "is_near_centre")):
        with pytest.warns(DeprecationWarning, match=f"pairs.{old} .* use pairs.{new}"):
            value = getattr(pairs, old)
        assert value is getattr(pairs, new) or value(1.0) is pairs.is_near_centre(1.0)
    least = torch.tensor([0.5])
    for similarity in (IoU(), NWD()):
        with pytest.warns(DeprecationWarning, match=r"\.reach .* use \w+\.max_distance"):
            bound = similarity.reach(least)
        assert all(torch.equal(*x) for x in zip(bound, similarity.max_distance(least), strict=True))
    matched = Matched(*range(8))
    with pytest.warns(DeprecationWarning, match=r"Matched.counts .* use Matched.not_ignored"):
        assert matched.counts == matched.not_ignored == 1


def test_similarity_with_reach_finds_the_same_pairs():
    class OldIoU:
        def __call__(self, a, b):
            return IoU()(a, b)

        def reach(self, least):
            return IoU().max_distance(least)

    with use_engine("lists"):
        with pytest.warns(DeprecationWarning, match="OldIoU.reach .* use the name max_distance"):
            found = TAL(similarity=OldIoU())(*scene())
        assert torch.equal(found.gt_index, TAL()(*scene()).gt_index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resolve_takes_affinities_of_either_dtype(dtype):
    anchors, gt, _ = scene()
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(len(anchors.boxes), 40, generator=generator).argsort(dim=0)[:50]
    affinity = torch.rand(50, 40, generator=generator).masked_fill(index % 3 == 0, -torch.inf)
    with pytest.warns(DeprecationWarning, match="resolve"):
        from atss.assigners.pairs import resolve
    found = resolve(anchors, gt, index, affinity.to(dtype))
    assert (found >= 0).any()
    assert torch.equal(found, assign_best(gt, index, affinity.double(), len(anchors.boxes)))


def test_matching_refuses_unknown_functions():
    with (
        pytest.warns(DeprecationWarning, match="Matching"),
        pytest.raises(TypeError, match=r"Matching takes cost, cut, .*, got \['costs'\]"),
    ):
        Matching(cost=None, cut=None, farther=(), takes_part=None, costs=len)
    with (
        pytest.warns(DeprecationWarning, match="Matching"),
        pytest.raises(TypeError, match="the methods fallbacks and num_wanted, and the attribute"),
    ):
        Matching(cost=None, cut=None, takes_part=len)


def test_assignment_hard_is_the_constructor():
    gt_index = torch.zeros(1, 4, dtype=torch.long)
    with pytest.warns(DeprecationWarning, match="Assignment.hard"):
        assert Assignment.hard(gt_index) == Assignment(gt_index)
