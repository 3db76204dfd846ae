"""The optimizer: which rate and which decay each parameter gets."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.optim import Optimizer

from ..errors import UserError

BACKBONE = "backbone.bottom_up."
# Numbers that an optimizer remembers of each weight.
MOMENTS = {"SGD": 1, "AdamW": 2}
# Entries of an optimizer's groups that the config sets: the name in messages, and the keys.
SETTINGS = {
    "initial_lr": ("learning rate", "SOLVER.BASE_LR, BIAS_LR_FACTOR, BACKBONE_LR_FACTOR"),
    "weight_decay": (
        "weight decay",
        "SOLVER.WEIGHT_DECAY, WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, WEIGHT_DECAY_SCALE",
    ),
    "momentum": ("momentum", "SOLVER.MOMENTUM"),
    "nesterov": ("Nesterov's momentum", "SOLVER.NESTEROV"),
}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Detectron2's, with SOLVER.OPTIMIZER, BACKBONE_LR_FACTOR and WEIGHT_DECAY_SCALE.

    Raises:
        ValueError: naming the key.
    """
    solver = cfg.SOLVER
    optimizers = {
        "SGD": (torch.optim.SGD, {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}),
        "AdamW": (torch.optim.AdamW, {}),
    }
    if solver.OPTIMIZER not in optimizers:
        raise UserError(
            f"unknown SOLVER.OPTIMIZER {solver.OPTIMIZER!r}: choose from {sorted(optimizers)}"
        )
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=_backbone_factor(solver, model),
        overrides=_scales(model, solver.WEIGHT_DECAY_SCALE),
    )
    kind, arguments = optimizers[solver.OPTIMIZER]
    optimizer = kind(
        groups,
        lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        foreach=True,
        **arguments,
    )
    return maybe_add_gradient_clipping(cfg, optimizer)


def carry_over(
    optimizer: Optimizer, names: list[str], state: dict, names_then: list[str] | None
) -> dict:
    """The state of a checkpoint's optimizer, such as momenta, for this optimizer, whose settings
    stay. The log names those that the checkpoint has otherwise.

    Args:
        names: of the optimizer's parameters, in the order of its groups.
        state: of the checkpoint's optimizer.
        names_then: of its parameters, in the same way; None in older checkpoints.

    Raises:
        ValueError: naming what differs, if the state is of another kind of optimizer, or of other
            parameters: torch would meet it in a bug of its own, or begin anew silently.
    """
    own, groups = optimizer.state_dict()["param_groups"], state["param_groups"]
    adaptive, was_adaptive = ("betas" in x[0] for x in (own, groups))
    if adaptive != was_adaptive:
        raise UserError(
            f"SOLVER.OPTIMIZER is {'AdamW' if adaptive else 'SGD'}, but the checkpoint that "
            "--resume goes on with is of the other"
        )
    was, now = ([len(group["params"]) for group in x] for x in (groups, own))
    if names_then is None and was != now:
        raise UserError(
            f"the optimizer of the checkpoint has groups of {was} parameters, but the config's "
            f"has {now}: --resume needs the MODEL and SOLVER of the run that it goes on with"
        )
    names_then = names if names_then is None else names_then
    if others := sorted({*names} ^ {*names_then}):
        owner = "config" if others[0] in names else "checkpoint"
        raise UserError(
            f"{len(others)} parameters are trained by the checkpoint's optimizer or the config's "
            f"alone, such as {others[0]} by the {owner}'s: --resume needs the MODEL and SOLVER of "
            "the run that it goes on with"
        )
    places = {name: place for place, name in enumerate(names_then)}
    order = [places[name] for name in names]
    different = []
    for key, (name, keys) in SETTINGS.items():
        then, new = ([x.get(key) for x in of for _ in x["params"]] for of in (groups, own))
        if [then[place] for place in order] != new:
            before, after = (", ".join(map(str, sorted({*x}))) for x in (then, new))
            different.append(f"{name} now {after}, was {before} (from {keys})")
    if different:
        logging.getLogger(__name__).info("--resume follows the config: %s", "; ".join(different))
    rates = [group["lr"] for group in groups for _ in group["params"]]
    for group in own:
        group["lr"] = rates[order[group["params"][0]]]
    numbers = state["state"]
    return {
        "state": {new: numbers[then] for new, then in enumerate(order) if then in numbers},
        "param_groups": own,
    }


def follow_schedule(scheduler: LRMultiplier, done: int, last: int) -> None:
    """Sets the rates to those of the config's schedule.

    Args:
        done: so many iterations have been made.
        last: so many there are.
    """
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    scheduler.last_epoch = min(done, last)
    for group, rate in zip(groups, scheduler.get_lr(), strict=True):
        group["lr"] = rate


def _backbone_factor(solver: CfgNode, model: nn.Module):
    """Of a parameter's name, or None where all rates are alike."""
    factor = solver.BACKBONE_LR_FACTOR
    if factor == 1.0:
        return None
    if solver.BIAS_LR_FACTOR != 1.0:
        # Detectron2 would give the backbone's biases the full rate.
        raise UserError(
            "SOLVER.BACKBONE_LR_FACTOR and SOLVER.BIAS_LR_FACTOR cannot both differ from 1"
        )
    if not any(name.startswith(BACKBONE) for name, _ in model.named_parameters()):
        raise UserError(
            "SOLVER.BACKBONE_LR_FACTOR needs a backbone under an FPN, with parameters in "
            f"{BACKBONE[:-1]}, which this model has none of"
        )
    return lambda name: factor if name.startswith(BACKBONE) else 1.0


def _scales(model: nn.Module, decay: float | None) -> dict[str, dict[str, float]]:
    """Numbers and vectors that are neither weights nor biases, by the last part of their names, as
    Detectron2 takes them."""
    if decay is None:
        return {}
    names = (name.rpartition(".")[2] for name, x in model.named_parameters() if x.ndim <= 1)
    return {name: {"weight_decay": decay} for name in names if name not in ("weight", "bias")}
