"""Plans of experiments."""

import re

import pytest
from conftest import ROOT

from atss.analysis.plans import paper_ap, read_plan
from atss.errors import UserError

PLAN = """
data: {train: "train.json:train", test: "test.json:test"}
recipe: [ablation]
keys: {SOLVER.MAX_ITER: 4}
rows:
  plain: tables/iou_box
  longer: {config: tables/atss_box, SOLVER.MAX_ITER: 9, data: {digits: {train: 8, test: 4}}}
compare:
  longer over plain: [longer, plain]
"""


@pytest.fixture
def read(tmp_path):
    def call(content, *opts):
        (tmp_path / "plan.yaml").write_text(content)
        return read_plan(tmp_path / "plan.yaml", opts)

    return call


def test_rows_have_the_keys_of_the_plan_below_their_own(read):
    plan = read(PLAN, "SEED", "7")
    plain, longer = plan.rows["plain"], plan.rows["longer"]
    assert plain.opts == ["SOLVER.MAX_ITER", 4, "SEED", "7"]
    assert longer.opts == ["SOLVER.MAX_ITER", 9, "SEED", "7"]
    assert [x.rpartition("/")[2] for x in plain.configs] == ["iou_box.yaml", "ablation.yaml"]
    assert (plain.data["test"], longer.data) == (
        "test.json:test",
        {"digits": {"train": 8, "test": 4}},
    )
    assert (plan.seeds, plan.compare) == ([1], {"longer over plain": ("longer", "plain")})


def test_rows_and_seeds_are_chosen_in_the_order_of_the_command(read):
    plan = read(PLAN)
    assert plan.choose(["longer", "plain"], [3]) == [("longer", 3), ("plain", 3)]
    assert plan.choose([], []) == [("plain", 1), ("longer", 1)]
    with pytest.raises(UserError, match=r"--seeds must be a list of different numbers from 0 on"):
        plan.choose([], [1, 1])
    with pytest.raises(UserError, match=r"unknown row 'short': choose from \['plain', 'longer'\]"):
        plan.choose(["short"], [])


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("recipe: [ablation]", "recipes: []", "unknown key 'recipes': choose from"),
        ("keys: {SOLVER.MAX_ITER: 4}", "keys: [1]", "keys must be keys with values, got [1]"),
        (
            "keys: {SOLVER.MAX_ITER: 4}",
            "seeds: 3",
            "seeds must be a list of different numbers from",
        ),
        ("keys: {SOLVER.MAX_ITER: 4}", "seeds: [1, true]", "seeds must be a list of different"),
        ("keys: {SOLVER.MAX_ITER: 4}", "evaluations: {7: {}}", "evaluation 7 names a folder"),
        ("keys: {SOLVER.MAX_ITER: 4}", "evaluations: {test: {}}", "'test': choose another name"),
        ("recipe: [ablation]", "recipe: []", "row longer has no config"),
        ("plain: tables", "../plain: tables", "row '../plain' names a folder: use a text"),
        ("plain: tables/iou_box", "plain: 3", "row plain must be keys with values, got 3"),
        ('test: "test', 'val: "test', "data of row plain must be {train: annotations:images"),
        ("[longer, plain]", "[longer]", "'longer over plain' must have two rows, got ['longer']"),
        ("[longer, plain]", "[longer, atss]", "has the unknown row 'atss'"),
        ("rows:", "rows: [", "is not valid yaml"),
        (PLAN, "3", "the plan must be keys with values, got 3"),
        (PLAN, "rows: {}", "it has no rows"),
    ],
)
def test_faults_are_named(read, before, after, message):
    with pytest.raises(UserError, match=rf"plan\.yaml.*{re.escape(message)}"):
        read(PLAN.replace(before, after).replace("{config: tables/atss_box, ", "{"))


def test_missing_plan(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the plan .*none\.yaml: No such file"):
        read_plan(tmp_path / "none.yaml")


@pytest.mark.parametrize("file", sorted(ROOT.glob("docs/ablation/*.yaml")), ids=lambda x: x.stem)
def test_committed_plan_can_be_read(file):
    assert read_plan(file).compare


def test_published_ap_of_a_config():
    folder = ROOT / "configs/tables"
    assert paper_ap(str(folder / "atss_A9.yaml")) == "39.2"
    assert paper_ap(str(folder / "atss_A9_locations.yaml")) == ""  # not the paper's
