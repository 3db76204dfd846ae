"""Rules start few operators on a GPU and do not make the host wait; counted on a CPU by
tools/benchmarks/operators.py."""

from functools import cache

import pytest
import torch
from benchmarks.model import OURS, Case
from benchmarks.operators import Counts, count_rule, count_step, registered_rules
from benchmarks.scenes import random_scene
from conftest import THIN

from atss import model_zoo
from atss.assigners import use_engine

# Operators of one call for two images whose objects fit one table.
LIMITS = {
    "ATSS": 110,
    "DDOD": 160,
    "MaxIoU": 70,
    "OTA": 1010,
    "PAA": 220,
    "POTO": 160,
    "SimOTA": 180,
    "SoftLabel": 180,
    "SpatialScale": 50,
    "TAL": 130,
}
# These match or fit on the host.
ON_HOST = ("PAA", "POTO")
RANDOM = ("Sampled",)
# Operators of a step of Detectron2's RetinaNet, R-50, two images.
RETINANET = {"fp32": 1152, "bf16": 1457}
RULES = dict(registered_rules())


@cache
def scene(objects):
    return random_scene(objects, 2, (256, 384))


@pytest.mark.parametrize("objects", [14, 200])
@pytest.mark.parametrize("name", RULES)
def test_call_starts_few_operators_and_never_waits(name, objects):
    on_host = int(name in ON_HOST)
    counts, assignment = count_rule(RULES[name], scene(objects), "auto", may_wait=False)
    assert (counts.to_host, counts.to_gpu, counts.waits) == (on_host, on_host, on_host)
    assert counts.operators <= LIMITS.get(name, 200)
    with use_engine("tables"):
        expected = RULES[name](*scene(objects))
        assert name in RANDOM or torch.equal(assignment.gt_index, expected.gt_index)


@pytest.mark.parametrize("name", RULES)
def test_each_piece_of_a_crowd_starts_few_operators(name):
    """2,000 objects of a large canvas are six pieces."""
    pieces, per_object = 3, len(scene(14)[0].boxes)
    limit = -(-14 // pieces) * per_object
    counts, _ = count_rule(RULES[name], scene(14), "tables", limit=limit, may_wait=False)
    assert counts.operators <= pieces * LIMITS.get(name, 200)


def case(precision):
    config = model_zoo.get_config_file("ATSS_R_50_FPN_1x.yaml")
    thin = tuple(x for item in THIN.items() for x in item)
    return Case(precision, False, 2, 128, 128, 7, "cpu", config, thin)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_starts_no_more_operators_than_retinanet(precision):
    """It copies only two images and three tensors of ground truth."""
    counts = sum(count_step(OURS, case(precision)).values(), Counts())
    assert (counts.waits, counts.to_host, counts.to_gpu) == (0, 0, 5)
    assert counts.operators <= RETINANET[precision]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_retinanet_starts_as_many_operators_as_listed(precision):
    counts = sum(count_step("detectron2-retinanet", case(precision)).values(), Counts())
    assert counts.operators == RETINANET[precision]
