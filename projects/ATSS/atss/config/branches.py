"""Builds what learns: branches, their phases, rules and criteria; which parts a config names."""

import math
from collections.abc import Collection, Iterator
from typing import Any

from detectron2.config import CfgNode, get_cfg
from torch import nn

from .. import assigners, modeling
from ..assigners import ASSIGNER_REGISTRY, SIMILARITIES
from ..errors import UserError
from ..modeling.branch import Branch, Phase
from ..modeling.criterion import Criterion
from ..registry import OWN_PARTS, Registry, overlay
from .checks import rename_errors
from .keys import add_atss_config

# What a branch is, beside parts: the keys, with the values that they have where a branch of
# MODEL.ATSS.BRANCHES does not say otherwise.
OF_BRANCHES = {
    "OUTPUT": "",
    "OWN_HEAD": False,
    "HEAD_OF": "",
    "DETACHED": False,
    "ASSIGNMENT_OF": "",
    "PHASES": [],
}
OF_CRITERIA = (
    "QUALITY_LOSS_WEIGHT",
    "NORMALISER_MIN",
    "NORMALISER_PER_IMAGE",
    "BOX_NORMALISER_MIN",
)
KINDS_OF_PHASES = (
    *(ASSIGNER_REGISTRY, SIMILARITIES, modeling.CLS_LOSSES, modeling.CLS_TARGETS),
    *(modeling.BOX_LOSSES, modeling.BOX_WEIGHTS, modeling.QUALITIES, modeling.NORMALISERS),
    modeling.LEVEL_WEIGHTS,
)
KINDS_OF_HEADS = (modeling.HEAD_REGISTRY, modeling.TOWERS)


def build_branches(cfg: CfgNode, known: dict[str, Any]) -> dict[str, Branch]:
    """The branch of the plain keys, "main", and those of MODEL.ATSS.BRANCHES.

    Raises:
        ValueError: naming the branch, or the key.
    """
    node = cfg.MODEL.ATSS
    for key in ("OWN_HEAD", "HEAD_OF"):
        if node[key]:
            raise UserError(
                f"MODEL.ATSS.{key} is for branches of MODEL.ATSS.BRANCHES: main has the detector's"
            )
    branches = {"main": _build_branch(node, {**known, "cfg": cfg})}
    # A level weight may count: branches that do not name one of their own share that of main.
    known = {
        **known,
        "level_weight": branches["main"].at(cfg.SOLVER.MAX_ITER).criterion.level_weight,
    }
    plain = node.clone()
    plain.defrost()
    for key, value in OF_BRANCHES.items():
        plain[key] = value
    for name in node.BRANCHES:
        if not isinstance(name, str) or name in branches or hasattr(nn.ModuleDict, name):
            raise UserError(f"MODEL.ATSS.BRANCHES holds {name!r}, which is no new name")
        allowed = {*OF_BRANCHES, *OF_CRITERIA, *_keys_of(*KINDS_OF_HEADS, *KINDS_OF_PHASES)}
        allowed &= {*node}
        over = _overlay(plain, name, allowed, "a branch")
        own = cfg.clone()
        own.defrost()
        own.MODEL.ATSS = over
        try:
            branches[name] = _build_branch(over, {**known, "cfg": own}, node.BRANCH[name])
        except ValueError as error:
            raise UserError(f"branch {name}: {error}") from error
    owners = sorted(name for name, branch in branches.items() if branch.head is not None)
    for name, branch in branches.items():
        if branch.head_of not in ("", *owners):
            raise UserError(
                f"branch {name}: MODEL.ATSS.HEAD_OF is {branch.head_of!r}; those with a head of "
                f"their own are {owners}"
            )
        for giver in {phase.assignment_of for phase in branch.phases} - {""}:
            if giver not in branches or giver == name:
                raise UserError(
                    f"branch {name}: MODEL.ATSS.ASSIGNMENT_OF is {giver!r}; the others are "
                    f"{sorted({*branches} - {name})}"
                )
    if node.INFERENCE not in branches:
        raise UserError(
            f"MODEL.ATSS.INFERENCE is {node.INFERENCE!r}; the branches are {sorted(branches)}"
        )
    return branches


def _build_branch(node: CfgNode, known: dict[str, Any], own: Collection[str] = ()) -> Branch:
    """What a node of MODEL.ATSS says of a branch, and an overlay by the keys in ``own``."""
    last = _build_phase(node, known, own)
    known = {**known, "level_weight": last.criterion.level_weight}
    phases = []
    for entry in node.PHASES:
        name, until = _phase_of(entry, known["cfg"].SOLVER.MAX_ITER)
        over = _overlay(
            node, name, {"ASSIGNMENT_OF", *OF_CRITERIA, *_keys_of(*KINDS_OF_PHASES)}, "a phase"
        )
        try:
            phases.append(_build_phase(over, known, node.BRANCH[name], until))
        except ValueError as error:
            raise UserError(f"phase {name}: {error}") from error
    head = None
    if node.OWN_HEAD:
        # Where rules alone are asked for, something in its place.
        head = modeling.HEAD_REGISTRY.build(node, **known) if "head" in known else nn.Identity()
    return Branch(
        *(*phases, last),
        output=node.OUTPUT,
        head=head,
        head_of=node.HEAD_OF,
        detached=node.DETACHED,
    )


def _phase_of(entry: Any, max_iter: int) -> tuple[str, float]:
    """Name and end of an entry of MODEL.ATSS.PHASES: a whole number of iterations, or a share of
    the training."""
    if isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str):
        name, until = entry
        if isinstance(until, float) and 0 < until < 1:
            return name, until * max_iter
        if isinstance(until, int) and not isinstance(until, bool) and until > 0:
            return name, until
    raise UserError(
        "MODEL.ATSS.PHASES holds pairs of a name in MODEL.ATSS.BRANCH and the iteration, or a "
        f"share of the training between 0 and 1, at which it ends, not {entry!r}"
    )


def _build_phase(
    node: CfgNode, known: dict[str, Any], own: Collection[str], until: float = math.inf
) -> Phase:
    known = dict(known)
    if {"LEVEL_WEIGHT", "LEVEL_WEIGHTS"} & {*own}:
        del known["level_weight"]
    criterion = build_criterion(node, known)
    if node.ASSIGNMENT_OF:
        return Phase(None, criterion, assignment_of=node.ASSIGNMENT_OF, until=until)
    return Phase(ASSIGNER_REGISTRY.build(node, **known), criterion, until=until)


def _keys_of(*some: Registry) -> set[str]:
    """The keys of kinds of parts, and of their arguments."""
    shared = (kind.shared_keys() for kind in some)
    return {x for kind in some for x in (kind.key, kind.group)}.union(*shared)


def _overlay(node: CfgNode, name: str, allowed: Collection[str], what: str) -> CfgNode:
    """The node with what BRANCH.<name> says over it.

    Raises:
        ValueError: for a key that would not be looked at, or a part that nobody knows.
    """
    over = overlay(node, name)
    for key in node.BRANCH[name]:
        if key not in allowed:
            raise UserError(
                f"MODEL.ATSS.BRANCH.{name}.{key}: {what} has none of its own; what it may have is "
                f"{sorted(allowed)}"
            )
    return over


def build_criterion(node: CfgNode, known: dict[str, Any]) -> Criterion:
    """What becomes of an assignment.

    Args:
        node: MODEL.ATSS, or an overlay of it.
        known: what parts may ask for; with "level_weight", where it is shared.
    """
    level_weight = known.get("level_weight")
    if "level_weight" not in known:
        level_weight = modeling.LEVEL_WEIGHTS.build(node, **known)
    with rename_errors(
        cls_target=f"MODEL.ATSS.CLS_TARGET {node.CLS_TARGET}",
        quality_weight="MODEL.ATSS.QUALITY_LOSS_WEIGHT",
        least="MODEL.ATSS.NORMALISER_MIN",
        box_least="MODEL.ATSS.BOX_NORMALISER_MIN",
    ):
        return Criterion(
            cls_loss=modeling.CLS_LOSSES.build(node, **known),
            cls_target=modeling.CLS_TARGETS.build(node, **known),
            box_terms=modeling.BOX_LOSSES.build(node, **known),
            box_weight=modeling.BOX_WEIGHTS.build(node, **known),
            quality=modeling.QUALITIES.build(node, **known),
            quality_name=node.QUALITY,
            quality_weight=node.QUALITY_LOSS_WEIGHT,
            normaliser=modeling.NORMALISERS.build(node, **known),
            least=node.NORMALISER_MIN,
            least_per_image=node.NORMALISER_PER_IMAGE,
            box_least=node.BOX_NORMALISER_MIN,
            level_weight=level_weight,
        )


def kinds() -> list[Registry]:
    """Every kind of part that a config can name."""
    found = [*vars(assigners).values(), *vars(modeling).values()]
    return [x for x in found if isinstance(x, Registry)]


def prune(cfg: CfgNode) -> None:
    """Leaves, in place, the arguments of the parts that the config names, and no others: what a run
    says of itself can be read where parts that it did not use are not known."""
    node = cfg.MODEL.ATSS
    nodes = [node, *(overlay(node, name) for name in node.BRANCH)]
    chosen = {(kind.group, name) for x in nodes for kind, name in _chosen(x)}
    for kind in kinds():
        group = node.get(kind.group, {})
        for name in [x for x in group if (kind.group, x) not in chosen]:
            del group[name]
        if kind.group in node and not group and not node.BRANCH:  # overlays may hold it
            del node[kind.group]


def _chosen(node: CfgNode) -> Iterator[tuple[Registry, str]]:
    for kind in kinds():
        if kind.key in node:
            yield from kind.chosen(node)
    yield from modeling.SUPPRESSIONS.chosen(node, "TTA.MERGE")


def for_inference(cfg: CfgNode) -> CfgNode:
    """A copy without what only training has a use for: rules, criteria, phases, and branches that
    do not detect. A model that an own rule has trained detects where that is not known."""
    cfg, fresh = cfg.clone(), get_cfg()
    add_atss_config(fresh)
    cfg.defrost()
    node, usual = cfg.MODEL.ATSS, fresh.MODEL.ATSS
    training = {"ASSIGNMENT_OF", "PHASES", *OF_CRITERIA, *_keys_of(*KINDS_OF_PHASES)}
    for key in training & {*usual}:
        node[key] = usual[key]
    detects, over = {node.INFERENCE}, node.BRANCH.get(node.INFERENCE)
    if isinstance(over, CfgNode):
        detects.add(over.get("HEAD_OF"))
    node.BRANCHES = [x for x in node.BRANCHES if x in detects]
    for name, over in list(node.BRANCH.items()):
        if isinstance(over, CfgNode):
            for key in training & {*over}:
                del over[key]
            if not over and name not in node.BRANCHES:
                del node.BRANCH[name]
    return cfg


def check_groups(node: CfgNode) -> None:
    """That arguments are of parts that there are, and no legacy key stands beside the name of the
    part that has it now; those in overlays too.

    Args:
        node: MODEL.ATSS.

    Raises:
        ValueError: naming the group.
    """
    overlays = {f"BRANCH.{name}.": x for name, x in node.BRANCH.items() if isinstance(x, CfgNode)}
    for where, some in {"": node, **overlays}.items():
        for kind in kinds():
            chosen = some.get(kind.key, node.get(kind.key))
            for name, arguments in some.get(kind.group, {}).items():
                if name not in kind and name not in kind.gone:
                    raise UserError(
                        f"MODEL.ATSS.{where}{kind.group}.{name} is of no {kind.key}: choose from "
                        f"{sorted(kind.entries)}{OWN_PARTS}"
                    )
                legacy = kind.entries[name].legacy if name in kind else {}
                for argument, other in legacy.items():
                    if chosen == other and arguments.get(argument) is not None:
                        raise UserError(
                            f"MODEL.ATSS.{where}{kind.group}.{name}.{argument} is ignored, because "
                            f"{kind.key} is {other!r}: set {kind.group}.{other}.{argument}"
                        )
