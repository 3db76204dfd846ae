"""Configs of finished runs with the rules and arguments of version 0.2."""

import re
from dataclasses import dataclass

import pytest
import yaml
from conftest import ROOT, make_cfg
from pages import run_page

from atss import load_config
from atss.assigners import ASSIGNER_REGISTRY, ATSS, DDOD, NWD, TAL, IoU
from atss.config import build_assigner, build_branches, check_model, get_config, prune
from atss.config.build import build_box_coder, head_depth
from atss.config.files import get_config_file
from atss.errors import UserError

ARGUMENTS = {
    "ATSS": {"TOP_K": 7, "COUNT": "anchors", "SIMILARITY": "iou", "ALPHA": None},
    "TAL": {"TOP_K": 13, "ALPHA": 1.0, "BETA": 6.0, "INSIDE": "after", "SIMILARITY": "iou"},
    "TopK": {"TOP_K": 9, "SIMILARITY": "iou"},
}
BOX = {"ASSIGNERS": {"ATSS": {"ALPHA": 0.5}}, "CLS_LOSS": "", "QUALITY": "overlap"}
FIRST = {"PHASES": [["first", 3]]}


def load(tmp_path, alpha=None, **node):
    """Write and load the config.yaml of a run of version 0.2.

    Args:
        alpha: of ATSS.
        node: other keys of MODEL.ATSS.
    """
    content = yaml.safe_load(make_cfg().dump())
    rules = ARGUMENTS | {"ATSS": ARGUMENTS["ATSS"] | {"ALPHA": alpha}}
    content["MODEL"]["ATSS"] |= {"ASSIGNERS": rules} | node
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_config(path)


def build_rules(cfg):
    """Return {branch: rules of its phases}."""
    check_model(cfg, training=True)
    known = {"num_levels": 5, "num_classes": 3, "code": build_box_coder(cfg, 1)}
    branches = build_branches(cfg, known)
    return {name: [x.assigner for x in branch.phases] for name, branch in branches.items()}


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({}, {"main": [ATSS(7)]}),
        ({"ASSIGNER": "TAL"}, {"main": [TAL()]}),
        ({"alpha": 0.0}, {"main": [DDOD(7, alpha=0.0)]}),
        (
            {"alpha": 0.8, "BRANCHES": ["box"], "BRANCH": {"box": BOX}},
            {"main": [DDOD(7, alpha=0.8)], "box": [DDOD(7, alpha=0.5)]},
        ),
        (
            {"BRANCHES": ["box"], "BRANCH": {"box": BOX}},
            {"main": [ATSS(7)], "box": [DDOD(7, alpha=0.5)]},
        ),
        (
            {"ASSIGNER": "TAL", **FIRST, "BRANCH": {"first": {"ASSIGNER": "ATSS"}}},
            {"main": [ATSS(7), TAL()]},
        ),
        (
            {"alpha": 0.8, "ASSIGNER": "TAL", **FIRST, "BRANCH": {"first": {"ASSIGNER": "ATSS"}}},
            {"main": [DDOD(7, alpha=0.8), TAL()]},
        ),
        (
            {
                "alpha": 0.8,
                **FIRST,
                "BRANCH": {
                    "first": {
                        "ASSIGNERS": {"ATSS": {"ALPHA": None, "TOP_K": 5, "SIMILARITY": "nwd"}}
                    }
                },
            },
            {"main": [ATSS(5, similarity=NWD()), DDOD(7, alpha=0.8)]},
        ),
        (  # a phase of a branch inherits its arguments
            {
                "BRANCHES": ["box"],
                "BRANCH": {
                    "box": BOX | FIRST | {"ASSIGNER": "TAL"},
                    "first": {"ASSIGNER": "ATSS"},
                },
            },
            {"main": [ATSS(7)], "box": [DDOD(7, alpha=0.5), TAL()]},
        ),
    ],
)
def test_finished_run_keeps_its_rules(tmp_path, node, expected):
    cfg = load(tmp_path, **node)
    assert build_rules(cfg) == expected
    prune(cfg)
    (tmp_path / "again.yaml").write_text(cfg.dump())
    assert build_rules(load_config(tmp_path / "again.yaml")) == expected


PAGE = r"choose from .*; docs/own_assigner.md has the code of TopK$"


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"ASSIGNER": "TopK"}, f"unknown MODEL.ATSS.ASSIGNER 'TopK': {PAGE}"),
        (
            {"BRANCHES": ["box"], "BRANCH": {"box": {"ASSIGNER": "TopK"}}},
            f"branch box: unknown MODEL.ATSS.ASSIGNER 'TopK': {PAGE}",
        ),
        (
            {**FIRST, "BRANCH": {"first": {"ASSIGNER": "TopK"}}},
            f"phase first: unknown MODEL.ATSS.ASSIGNER 'TopK': {PAGE}",
        ),
        (
            {"ASSIGNER": "DDOD", "alpha": 0.7},
            "MODEL.ATSS.ASSIGNERS.ATSS.ALPHA is ignored, because ASSIGNER is 'DDOD': set "
            "ASSIGNERS.DDOD.ALPHA",
        ),
        (
            {"ASSIGNER": "DDOD", "BRANCHES": ["box"], "BRANCH": {"box": BOX}},
            "MODEL.ATSS.BRANCH.box.ASSIGNERS.ATSS.ALPHA is ignored, because ASSIGNER is 'DDOD'",
        ),
        (
            {"alpha": 0.5, "ASSIGNERS": {"ATSS": {"ALPHA": 0.5}, "DDOD": {"ALPHA": 0.7}}},
            "MODEL.ATSS.ASSIGNERS.ATSS.ALPHA is an older key of DDOD, whose arguments are set as",
        ),
        ({"alpha": 2.0}, "MODEL.ATSS.ASSIGNERS.DDOD.ALPHA must be between 0 and 1, got 2.0"),
    ],
)
def test_unsupported_legacy_config_is_reported(tmp_path, node, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_rules(load(tmp_path, **node))


def test_legacy_keys_of_a_rule_within_a_rule():
    @dataclass(frozen=True)
    class Same:
        first: object = "ATSS"

    ASSIGNER_REGISTRY.register(Same, parts={"first": ASSIGNER_REGISTRY})
    try:
        cfg = make_cfg("MODEL.ATSS.ASSIGNER", "Same")
        cfg.MODEL.ATSS.ASSIGNERS.ATSS.ALPHA = 0.5
        assert build_assigner(cfg).first == DDOD(alpha=0.5)
        cfg.MODEL.ATSS.ASSIGNERS.Same = type(cfg)({"FIRST": "TopK"})
        with pytest.raises(
            ValueError, match=f"unknown MODEL.ATSS.ASSIGNERS.Same.FIRST 'TopK': {PAGE}"
        ):
            build_assigner(cfg)
    finally:
        del ASSIGNER_REGISTRY.entries["Same"]


def test_the_command_line_sets_legacy_keys(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(make_cfg().dump())
    opts = ["MODEL.ATSS.ASSIGNERS.ATSS.ALPHA", "0.5", "MODEL.ATSS.ASSIGNERS.ATSS.TOP_K", "7"]
    assert build_rules(load_config(base, opts=opts)) == {"main": [DDOD(7, alpha=0.5)]}
    opts = ["MODEL.ATSS.ASSIGNERS.TopK.TOP_K", "5"]
    assert build_rules(load_config(base, opts=opts)) == {"main": [ATSS()]}
    cfg = load_config(base, opts=[*opts, "MODEL.ATSS.ASSIGNER", "TopK"])
    with pytest.raises(ValueError, match=PAGE):
        build_rules(cfg)


def test_run_of_topk_continues_with_the_pages_code(tmp_path):
    cfg = load(tmp_path, ASSIGNER="TopK")
    with run_page("docs/own_assigner.md") as (names, _):
        (rule,) = build_rules(cfg)["main"]
    assert isinstance(rule, names["TopK"])
    assert (rule.top_k, rule.similarity) == (9, IoU())


def test_own_configs_have_no_legacy_key():
    cfg = get_config("successors/DDOD_R_50_FPN_1x")
    assert cfg.MODEL.ATSS.ASSIGNER == "DDOD"
    assert cfg.MODEL.ATSS.ASSIGNERS.ATSS == {"TOP_K": 9, "COUNT": "anchors", "SIMILARITY": "iou"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["val=val.json:images"], r"KEY VALUE, got 'val=.*'; repeat --register before each NAME"),
        (["a=a.json:images", "b=b.json:images"], "unknown key a=a.json:images; repeat --register"),
        (["SOLVER.MAX_ITER"], "KEY VALUE, got 'SOLVER.MAX_ITER'$"),
    ],
)
def test_data_set_among_options_names_register(options, message):
    with pytest.raises(UserError, match=message):
        load_config(get_config_file("ATSS_R_50_FPN_1x"), opts=options)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("MODEL.ATSS.K", "; did you mean MODEL.ATSS.ASSIGNERS.ATSS.TOP_K?"),
        ("SOLVER.LR", "; did you mean SOLVER.BASE_LR?"),
        ("MODEL.ATSS.NMS_THRESH", "; did you mean MODEL.ATSS.NMS_THRESH_TEST?"),
        ("MODEL.RETINANET.NMS_THRESH", "; did you mean MODEL.ATSS.NMS_THRESH_TEST?"),
        ("MODEL.ATSS.FOO", ""),
        ("LR", ""),
    ],
)
def test_unknown_key_suggests_one_with_its_word(key, hint):
    with pytest.raises(UserError, match=rf"^unknown key {key}{re.escape(hint)}$"):
        load_config(get_config_file("ATSS_R_50_FPN_1x"), opts=[key, 3])


def test_unknown_argument_lists_those_of_its_part():
    key = "MODEL.ATSS.ASSIGNERS.SpatialScale.SIMILARITY"
    choices = r"\['MARGIN', 'RADIUS', 'RANGES', 'TOP_K'\]"
    with pytest.raises(UserError, match=rf"^unknown key {key}: choose from {choices}$"):
        load_config(get_config_file("ATSS_R_50_FPN_1x"), opts=[key, "nwd"])


def test_depth_of_the_command_line_replaces_older_keys(tmp_path):
    heads = {"HEADS": {"TOODHead": {"NUM_CONVS": 5}}, "HEAD": "TOODHead"}
    load(tmp_path, **heads)
    depths = []
    for opts in ([], ["MODEL.ATSS.NUM_CONVS", 2]):
        cfg = load_config(tmp_path / "config.yaml", opts=opts)
        depths.append(head_depth(cfg))
    assert depths == [5, 2]


def test_lazy_config_is_refused():
    with pytest.raises(UserError, match=r"ATSS_R_50_FPN_1x\.py: a LazyConfig, expected a yaml"):
        load_config(ROOT / "configs" / "ATSS_R_50_FPN_1x.py")


@pytest.mark.parametrize("text", ["7", "1,2", "2026", "1e3", "None", "True", "()", "'7'", "a b"])
def test_texts_return_from_the_config_of_a_run(text, tmp_path):
    """`--output 7 --classes 1,2` write a config.yaml that yacs would read as numbers."""
    cfg = load_config("ATSS_R_50_FPN_1x")
    cfg.OUTPUT_DIR = cfg.DATASETS.CLASSES = text
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    again = load_config(str(file))
    if text == "'7'":
        text = "7"  # quoted already
    assert (text, text) == (again.OUTPUT_DIR, again.DATASETS.CLASSES)
    assert text == load_config(str(file), opts=["OUTPUT_DIR", text]).OUTPUT_DIR
