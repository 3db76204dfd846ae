"""The optimizer; learning rate and weight decay of each parameter."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.optim import Optimizer

from ..errors import UserError

BACKBONE = "backbone.bottom_up."
# Moments that an optimizer keeps for each weight.
MOMENTS = {"SGD": 1, "AdamW": 2}
# Power of the batch by which an optimizer's learning rate grows (arXiv 1706.02677, 2205.10287).
RATE_EXPONENTS = {"SGD": 1.0, "AdamW": 0.5}
# Entries of an optimizer's groups that the config sets: name in messages, keys.
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
    """Build SGD or AdamW, with BACKBONE_LR_FACTOR and WEIGHT_DECAY_SCALE.

    Raises:
        UserError: naming the key.
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
    optimizer: Optimizer, names: list[str], state: dict, saved_names: list[str] | None
) -> dict:
    """Return a checkpoint's optimizer state, such as momenta, in the order and with the settings of
    this optimizer. The log names settings that differ.

    Args:
        names: parameters in the order of the optimizer's groups.
        state: state of the checkpoint's optimizer.
        saved_names: its parameters; None in older checkpoints.

    Raises:
        UserError: if the checkpoint's optimizer is of another kind or trains other parameters.
    """
    groups, saved_groups = optimizer.state_dict()["param_groups"], state["param_groups"]
    adaptive, was_adaptive = ("betas" in x[0] for x in (groups, saved_groups))
    if adaptive != was_adaptive:
        kinds = {True: "AdamW", False: "SGD"}
        raise UserError(
            f"SOLVER.OPTIMIZER is {kinds[adaptive]}, but the checkpoint of --resume has "
            f"{kinds[was_adaptive]}"
        )
    saved_sizes, sizes = ([len(group["params"]) for group in x] for x in (saved_groups, groups))
    if saved_names is None and saved_sizes != sizes:
        raise UserError(
            f"the checkpoint's optimizer has groups of {saved_sizes} parameters, but the config's "
            f"has {sizes}: --resume needs the MODEL and SOLVER of the interrupted run"
        )
    saved_names = names if saved_names is None else saved_names
    if differing := sorted({*names} ^ {*saved_names}):
        owner = "config" if differing[0] in names else "checkpoint"
        raise UserError(
            f"{len(differing)} parameters are trained by the checkpoint's optimizer or the "
            f"config's alone, such as {differing[0]} by the {owner}'s: --resume needs the MODEL "
            "and SOLVER of the interrupted run"
        )
    places = {name: place for place, name in enumerate(saved_names)}
    order = [places[name] for name in names]
    changes = []
    for key, (name, keys) in SETTINGS.items():
        was, now = (
            [x.get(key) for x in owner for _ in x["params"]] for owner in (saved_groups, groups)
        )
        if [was[place] for place in order] != now:
            before, after = (", ".join(map(str, sorted({*x}))) for x in (was, now))
            changes.append(f"{name} now {after}, was {before} (from {keys})")
    if changes:
        logging.getLogger(__name__).info("--resume follows the config: %s", "; ".join(changes))
    rates = [group["lr"] for group in saved_groups for _ in group["params"]]
    for group in groups:
        group["lr"] = rates[order[group["params"][0]]]
    moments = state["state"]
    return {
        "state": {new: moments[old] for new, old in enumerate(order) if old in moments},
        "param_groups": groups,
    }


def follow_schedule(scheduler: LRMultiplier, done: int, last: int) -> None:
    """Set the learning rates, in place, to the config's after ``done`` of ``last`` iterations."""
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    scheduler.last_epoch = min(done, last)
    for group, rate in zip(groups, scheduler.get_lr(), strict=True):
        group["lr"] = rate


def _backbone_factor(solver: CfgNode, model: nn.Module):
    """Return a function from a parameter's name to its factor, or None."""
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
            "SOLVER.BACKBONE_LR_FACTOR needs a backbone under an FPN, but this model has no "
            f"parameters in {BACKBONE[:-1]}"
        )
    return lambda name: factor if name.startswith(BACKBONE) else 1.0


def _scales(model: nn.Module, decay: float | None) -> dict[str, dict[str, float]]:
    """Return overrides for scalars and vectors that are neither weights nor biases."""
    if decay is None:
        return {}
    names = (name.rpartition(".")[2] for name, x in model.named_parameters() if x.ndim <= 1)
    return {name: {"weight_decay": decay} for name in names if name not in ("weight", "bias")}
