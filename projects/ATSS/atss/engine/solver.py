"""The optimizer: which rate and which decay each parameter gets."""

import torch
from detectron2.config import CfgNode
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

BACKBONE = "backbone.bottom_up."
# Numbers that an optimizer remembers of each weight.
MOMENTS = {"SGD": 1, "AdamW": 2}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
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
        raise ValueError(
            f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; known are {sorted(optimizers)}"
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


def refuse_other_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Whether the state of a checkpoint is one of this optimizer: torch meets another in a bug of
    its own, or begins anew silently.

    Raises:
        ValueError: naming what differs.
    """
    adaptive, was_adaptive = (
        "betas" in groups[0] for groups in (optimizer.param_groups, state["param_groups"])
    )
    if adaptive != was_adaptive:
        raise ValueError(
            f"SOLVER.OPTIMIZER is {'AdamW' if adaptive else 'SGD'}, but the checkpoint that "
            "--resume goes on with is of the other"
        )
    was, now = (
        [len(group["params"]) for group in groups]
        for groups in (state["param_groups"], optimizer.param_groups)
    )
    if was != now:
        raise ValueError(
            f"the optimizer of the checkpoint has groups of {was} parameters, but the config's "
            f"has {now}: --resume needs the MODEL and SOLVER of the run that it goes on with"
        )


def _backbone_factor(solver: CfgNode, model: nn.Module):
    """Of a parameter's name, or None where all rates are alike."""
    factor = solver.BACKBONE_LR_FACTOR
    if factor == 1.0:
        return None
    if solver.BIAS_LR_FACTOR != 1.0:
        # Detectron2 would give the backbone's biases the full rate.
        raise ValueError(
            "SOLVER.BACKBONE_LR_FACTOR and SOLVER.BIAS_LR_FACTOR cannot both differ from 1"
        )
    if not any(name.startswith(BACKBONE) for name, _ in model.named_parameters()):
        raise ValueError(
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
