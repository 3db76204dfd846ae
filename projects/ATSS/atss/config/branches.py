"""Builds branches with their phases, rules and criteria; prunes configs."""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode, get_cfg
from torch import nn

from .. import assigners, modeling
from ..assigners import ASSIGNER_REGISTRY, SIMILARITIES
from ..errors import UserError, with_message
from ..modeling.branch import Branch, Branches, Phase
from ..modeling.criterion import Criterion
from ..registry import OWN_PARTS, Registry, overlay
from .checks import flatten
from .keys import add_atss_config

# Keys of a branch that name no parts. A branch of MODEL.ATSS.BRANCHES begins with these values.
BRANCH_KEYS = {
    "OUTPUT": "",
    "OWN_HEAD": False,
    "HEAD_OF": "",
    "DETACHED": False,
    "ASSIGNMENT_OF": "",
    "PHASES": [],
}


def build_branches(cfg: CfgNode, injected: Mapping[str, Any]) -> dict[str, Branch]:
    """Build the branch of the plain keys, "main", and those of MODEL.ATSS.BRANCHES.

    Args:
        injected: values for parameters of parts. Without "in_channels", which a backbone sets, a
            branch's own head is a placeholder.

    Raises:
        UserError: naming the branch or the key.
    """
    node = cfg.MODEL.ATSS
    for key in ("OWN_HEAD", "HEAD_OF"):
        if node[key]:
            raise UserError(
                f"MODEL.ATSS.{key} is for branches of MODEL.ATSS.BRANCHES: main has the detector's"
            )
    branches = {"main": _build_branch(node, {**injected, "cfg": cfg})}
    # A level weight may count positives: branches share that of main, unless they set their own.
    last = branches["main"].at(cfg.SOLVER.MAX_ITER)
    injected = {**injected, "level_weight": last.criterion.level_weight}
    plain = node.clone()
    plain.defrost()
    for key, value in BRANCH_KEYS.items():
        plain[key] = value
    heads = modeling.HEAD_REGISTRY.all_keys() | modeling.TOWERS.all_keys()
    nodes = {"": node}  # by the branch whose head they describe, as in Source
    for name in node.BRANCHES:
        if not isinstance(name, str) or name in branches or hasattr(Branches, name):
            raise UserError(f"MODEL.ATSS.BRANCHES: {name!r} is not a name, or already in use")
        allowed = {*BRANCH_KEYS, *heads, *_training_keys()} & {*node}
        branch_cfg = cfg.clone()
        branch_cfg.defrost()
        branch_cfg.MODEL.ATSS = nodes[name] = over = _overlay(plain, name, allowed, "a branch")
        try:
            branches[name] = _build_branch(
                over, {**injected, "cfg": branch_cfg}, own_keys=node.BRANCH[name]
            )
        except ValueError as error:
            raise with_message(error, f"branch {name}: {error}") from error
    owners = sorted(name for name, branch in branches.items() if branch.head is not None)
    for name, branch in branches.items():
        if branch.head_of not in ("", *owners):
            raise UserError(
                f"branch {name}: unknown MODEL.ATSS.HEAD_OF {branch.head_of!r}: choose from the "
                f"branches with OWN_HEAD, {owners}"
            )
        others = sorted({*branches} - {name})
        for source in {phase.assignment_of for phase in branch.phases} - {"", *others}:
            raise UserError(
                f"branch {name}: unknown MODEL.ATSS.ASSIGNMENT_OF {source!r}: choose from {others}"
            )
    if node.INFERENCE not in branches:
        raise UserError(
            f"unknown MODEL.ATSS.INFERENCE {node.INFERENCE!r}: choose from {sorted(branches)}"
        )
    _check_quality(branches, node.INFERENCE, nodes)
    return branches


def _check_quality(
    branches: Mapping[str, Branch], inference: str, nodes: Mapping[str, CfgNode]
) -> None:
    """Check that a loss trains the quality with which detections are scored."""
    owner, output = branches[inference].source(inference)
    head = modeling.HEAD_REGISTRY.entries.get(nodes[owner].HEAD)
    source = nodes[owner].CENTERNESS
    # That of distributions is a factor of class probabilities, which the class loss trains.
    if head is None or "centerness" not in head.keys or source not in ("box", "cls"):
        return
    trained = (
        any(isinstance(x, Phase) and x.criterion.quality is not None for x in branch.phases)
        for name, branch in branches.items()
        if branch.source(name) == (owner, output)
    )
    if not any(trained):
        raise UserError(
            f"MODEL.ATSS.CENTERNESS {source!r} predicts a quality for the scores of detections, "
            "but no loss trains it: set MODEL.ATSS.QUALITY, or MODEL.ATSS.CENTERNESS ''"
        )


def _build_branch(
    node: CfgNode, injected: Mapping[str, Any], own_keys: Collection[str] = ()
) -> Branch:
    last = _build_phase(node, injected, own_keys)
    injected = {**injected, "level_weight": last.criterion.level_weight}
    phases = []
    for entry in node.PHASES:
        name, until = _parse_phase(entry, injected["cfg"].SOLVER.MAX_ITER)
        over = _overlay(node, name, {"ASSIGNMENT_OF", *_training_keys()}, "a phase")
        try:
            phases.append(_build_phase(over, injected, node.BRANCH[name], until))
        except ValueError as error:
            raise with_message(error, f"phase {name}: {error}") from error
    head = None
    if node.OWN_HEAD:
        is_whole = "in_channels" in injected
        head = modeling.HEAD_REGISTRY.build(node, **injected) if is_whole else nn.Identity()
    return Branch(
        *phases,
        last,
        output=node.OUTPUT,
        head=head,
        head_of=node.HEAD_OF,
        detached=node.DETACHED,
    )


def scale_phases(cfg: CfgNode, factor: float) -> None:
    """Scale the ends of phases that are iterations, in place, if the length was scaled."""
    for node in (cfg.MODEL.ATSS, *cfg.MODEL.ATSS.BRANCH.values()):
        if factor != 1 and isinstance(node, CfgNode) and node.get("PHASES"):
            node.PHASES = [
                [name, max(round(until * factor), 1) if isinstance(until, int) else until]
                for name, until in node.PHASES
            ]


def _parse_phase(entry: Any, max_iter: int) -> tuple[str, float]:
    """Return name and last iteration of an entry of MODEL.ATSS.PHASES."""
    if isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str):
        name, until = entry
        if isinstance(until, float) and 0 < until < 1:
            return name, until * max_iter
        if isinstance(until, int) and not isinstance(until, bool) and until > 0:
            return name, until
    raise UserError(
        "MODEL.ATSS.PHASES must contain pairs of a name in MODEL.ATSS.BRANCH and the iteration, or "
        f"the share of the training between 0 and 1, at which the phase ends, got {entry!r}"
    )


def _build_phase(
    node: CfgNode,
    injected: Mapping[str, Any],
    own_keys: Collection[str],
    until: float = math.inf,
) -> Phase:
    if {"LEVEL_WEIGHT", "LEVEL_WEIGHTS"} & {*own_keys}:  # not the shared one
        injected = {k: x for k, x in injected.items() if k != "level_weight"}
    criterion = modeling.CRITERION.build(node, injected)
    if node.ASSIGNMENT_OF:
        return Phase(None, criterion, assignment_of=node.ASSIGNMENT_OF, until=until)
    return Phase(ASSIGNER_REGISTRY.build(node, **injected), criterion, until=until)


def build_criterion(node: CfgNode, injected: Mapping[str, Any]) -> Criterion:
    """Build the losses of MODEL.ATSS or an overlay. An injected "level_weight" is shared."""
    return modeling.CRITERION.build(node, injected)


def _training_keys() -> set[str]:
    kinds = (ASSIGNER_REGISTRY, SIMILARITIES, *modeling.CRITERION.parts.values())
    return set(modeling.CRITERION.keys.values()).union(*(kind.all_keys() for kind in kinds))


def _overlay(node: CfgNode, name: str, allowed: Collection[str], user: str) -> CfgNode:
    """Return :func:`overlay`.

    Raises:
        UserError: for a key that the branch or phase would ignore.
    """
    over = overlay(node, name)
    for key in node.BRANCH[name]:
        if key not in allowed:
            raise UserError(
                f"MODEL.ATSS.BRANCH.{name}.{key} cannot be set for {user}: choose from "
                f"{sorted(allowed)}"
            )
    return over


def kinds() -> list[Registry]:
    exported = [*vars(assigners).values(), *vars(modeling).values()]
    return [x for x in exported if isinstance(x, Registry)]


def prune(cfg: CfgNode) -> None:
    """Delete, in place, the arguments of parts that the config does not name, so that the
    config.yaml of a run loads without their imports."""
    node = cfg.MODEL.ATSS
    nodes = [node, *(overlay(node, name) for name in node.BRANCH)]
    chosen = {(kind.group, name) for x in nodes for kind, name in _chosen(x)}
    for kind in kinds():
        group = node.get(kind.group, {})
        for name in [x for x in group if (kind.group, x) not in chosen]:
            del group[name]
        if kind.group in node and not group and not node.BRANCH:  # overlays may hold it
            del node[kind.group]


def unread_keys(cfg: CfgNode) -> set[str]:
    """Return the keys of MODEL.ATSS that parts share, but none that the config names reads."""
    node = cfg.MODEL.ATSS
    nodes = [node, *(overlay(node, name) for name in node.BRANCH)]
    chosen = {kind.entries[name] for x in nodes for kind, name in _chosen(x)}
    parts = {part for kind in kinds() for part in kind.entries.values()}
    keys, read = ({key for x in of for key in x.keys.values()} for of in (parts, chosen))
    return keys - read


def unnamed_overlays(cfg: CfgNode) -> list[str]:
    """Return the names in MODEL.ATSS.BRANCH that no branch, phase or part names."""
    named = {x for _, value in flatten(cfg.MODEL.ATSS) for x in _texts(value)}
    return [name for name in cfg.MODEL.ATSS.BRANCH if name not in named]


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in a value, also of lists in lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _texts(x)


def _chosen(node: CfgNode) -> Iterator[tuple[Registry, str]]:
    for kind in kinds():
        if kind.key in node:
            yield from kind.chosen(node)
    yield from modeling.SUPPRESSIONS.chosen(node, "TTA.MERGE")


def for_inference(cfg: CfgNode) -> CfgNode:
    """Return a copy with default rules, criteria and phases, and the detecting branch only, which
    needs no import of its rule."""
    cfg, fresh = cfg.clone(), get_cfg()
    add_atss_config(fresh)
    cfg.defrost()
    cfg.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING = False  # export would trace it
    node, defaults = cfg.MODEL.ATSS, fresh.MODEL.ATSS
    training = {"ASSIGNMENT_OF", "PHASES", *_training_keys()}
    for key in training & {*defaults}:
        node[key] = defaults[key]
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
    """Check MODEL.ATSS and its overlays.

    Raises:
        UserError: for arguments of an unknown part, or a legacy key beside its new part.
    """
    overlays = {f"BRANCH.{name}.": x for name, x in node.BRANCH.items() if isinstance(x, CfgNode)}
    for where, values in {"": node, **overlays}.items():
        for kind in kinds():
            chosen = values.get(kind.key, node.get(kind.key))
            for name, arguments in values.get(kind.group, {}).items():
                if name not in kind and name not in kind.removed:
                    raise UserError(
                        f"unknown {kind.key} MODEL.ATSS.{where}{kind.group}.{name}: choose from "
                        f"{sorted(kind.entries)}{OWN_PARTS}"
                    )
                legacy = kind.entries[name].legacy if name in kind else {}
                for argument, other in legacy.items():
                    if chosen == other and arguments.get(argument) is not None:
                        raise UserError(
                            f"MODEL.ATSS.{where}{kind.group}.{name}.{argument} is ignored, because "
                            f"{kind.key} is {other!r}: set {kind.group}.{other}.{argument}"
                        )
