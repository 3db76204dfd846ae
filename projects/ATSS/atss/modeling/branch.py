"""Branches: outputs of the heads, each with an assigner and a criterion, up to the losses."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property

import torch
from detectron2.utils.events import EventStorage, get_event_storage, has_event_storage
from torch import Tensor, nn

from ..anchors import Anchors
from ..errors import UserError
from ..geometry import area
from ..structures import Assigner, Assignment, GroundTruth, HeadOutput, Predictions
from .box_coding import BoxCode
from .criterion import Criterion, Quotient, divide

HeadOutputs = HeadOutput | Mapping[str, HeadOutput]
# (name of the branch whose head computes an output, "" for the detector's head; output's name).
Source = tuple[str, str]
# COCO's sizes: bounds of the square root of the area, in pixels.
SIZES = {"small": (0, 32), "medium": (32, 96), "large": (96, float("inf"))}
# Period of Detectron2's writers. Reading a number from a GPU waits for it, so statistics are
# computed only if they are written.
LOG_PERIOD = 20


class Phase(nn.Module):
    """Assigner and criterion of a branch until an iteration.

    Args:
        assigner: None if the branch takes another one's assignment.
        assignment_of: name of that branch.
        until: first iteration of the next phase.
    """

    def __init__(
        self,
        assigner: Assigner | None,
        criterion: Criterion,
        *,
        assignment_of: str = "",
        until: float = math.inf,
    ):
        super().__init__()
        if (assigner is None) == (not assignment_of):
            raise UserError("a branch has an assigner, or takes the assignment of another branch")
        self.assigner, self.criterion = assigner, criterion
        self.assignment_of, self.until = assignment_of, until


class Branch(nn.Module):
    """An output of a head with the phases of its training.

    Args:
        phases: with increasing ends; the last phase has none.
        output: its name, if the head computes several.
        head: of this branch, in place of the detector's.
        head_of: name of another branch, whose head computes the output.
        detached: whether no gradient flows from ``head`` into the features.
    """

    def __init__(
        self,
        *phases: Phase,
        output: str = "",
        head: nn.Module | None = None,
        head_of: str = "",
        detached: bool = False,
    ):
        super().__init__()
        ends = [phase.until for phase in phases]
        if not ends or ends != sorted({*ends}) or ends[0] <= 0 or ends[-1] < math.inf:
            raise UserError(f"phases must end at rising iterations, the last at none, got {ends}")
        if detached and head is None:
            raise UserError("detached features need a branch with a head of its own")
        if head_of and head is not None:
            raise UserError(f"a branch with a head of its own cannot use the head of {head_of}")
        self.phases = nn.ModuleList(phases)
        self.output, self.head, self.detached = output, head, detached
        self.head_of = head_of

    def at(self, iteration: int) -> Phase:
        return next(x for x in self.phases if isinstance(x, Phase) and iteration < x.until)

    def source(self, name: str) -> Source:
        """Return the source of the output, given the branch's name."""
        return self.head_of if self.head is None else name, self.output

    def own_outputs(self, features: Sequence[Tensor]) -> HeadOutputs:
        assert self.head is not None
        return self.head([x.detach() for x in features] if self.detached else features)

    def select_output(self, outputs: HeadOutputs) -> HeadOutput:
        named = outputs if isinstance(outputs, Mapping) else {"": outputs}
        if self.output not in named:
            raise UserError(
                f"unknown MODEL.ATSS.OUTPUT {self.output!r}: choose from {sorted(named)}"
            )
        return named[self.output]


class Branches(nn.ModuleDict):
    """Branches by name, which share features and the detector's head.

    Args:
        inference: name of the branch that detects; losses of the others are called <name>/...
    """

    inference = "main"  # so that no branch has this name

    def __init__(self, branches: Mapping[str, Branch], inference: str = "main"):
        super().__init__(branches)
        if inference not in branches:
            raise UserError(f"unknown branch {inference!r}: choose from {sorted(branches)}")
        self.inference = inference

    def named(self) -> Iterator[tuple[str, Branch]]:
        for name, branch in self.items():
            assert isinstance(branch, Branch)
            yield name, branch

    def outputs(
        self, head: nn.Module, features: Sequence[Tensor], training: bool
    ) -> dict[str, HeadOutput]:
        """Return the outputs of all branches in training, else of the one that detects. Each head
        runs once."""
        heads: dict[str, HeadOutputs] = {}
        outputs = {}
        for name, branch in self.named():
            if not training and name != self.inference:
                continue
            owner, _ = branch.source(name)
            if owner not in heads:
                heads[owner] = self._run_head(head, features, owner)
            outputs[name] = branch.select_output(heads[owner])
        return outputs

    def _run_head(self, head: nn.Module, features: Sequence[Tensor], owner: str) -> HeadOutputs:
        """Return the outputs of a branch's own head, or of the detector's head for ""."""
        try:
            return dict(self.named())[owner].own_outputs(features) if owner else head(features)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # of torch's norms
                raise
            raise UserError(
                "MODEL.ATSS.NORM has too few values on a level of 1 x 1 locations: raise "
                "MODEL.FPN.OUT_CHANNELS, which GN divides into 32 groups, the size of images or "
                f"their number ({error})"
            ) from error

    def losses(
        self,
        code: BoxCode,
        outputs: Mapping[str, HeadOutput],
        anchors: Anchors,
        gt: GroundTruth,
        iteration: int = 0,
        compiled: bool = False,
    ) -> dict[str, Tensor]:
        """Return the losses of all branches, in float32 also under autocast: decode -> assign ->
        losses. Detectron2's event storage gets statistics of the assignments.

        Args:
            iteration: of the training, for phases, if no event storage counts iterations.
            compiled: whether torch.compile compiles :func:`compute_quotients`, for any canvas and
                number of objects.
        """
        storage = get_event_storage() if has_event_storage() else None
        phases = self._phases(iteration if storage is None else storage.iter)
        sources = {name: branch.source(name) for name, branch in self.named()}
        by_source = {sources[name]: output for name, output in outputs.items()}
        with torch.autocast(anchors.boxes.device.type, enabled=False):
            tail = _compiled_tail(anchors, gt) if compiled else compute_quotients
            quotients, assignments = tail(code, phases, sources, by_source, anchors, gt)
            losses = divide(
                {
                    loss if name == self.inference else f"{name}/{loss}": quotient
                    for name, losses_of_branch in quotients.items()
                    for loss, quotient in losses_of_branch.items()
                }
            )
        if storage is not None and storage.iter % LOG_PERIOD == 0 and len(gt):
            for name, assignment in assignments.items():
                group = "assignment" if name == self.inference else f"{name}/assignment"
                _log(storage, group, assignment, gt)
        return losses

    def _phases(self, iteration: int) -> dict[str, Phase]:
        phases = {name: branch.at(iteration) for name, branch in self.named()}
        assigned = sorted(name for name, phase in phases.items() if phase.assigner is not None)
        for name, phase in phases.items():
            if phase.assignment_of and phase.assignment_of not in assigned:
                raise UserError(
                    f"branch {name!r} takes the assignment of {phase.assignment_of!r}: choose from "
                    f"{assigned}"
                )
        return phases


def _log(storage: EventStorage, group: str, assignment: Assignment, gt: GroundTruth) -> None:
    side = area(gt.boxes.cpu()).sqrt()  # on the canvas
    counts = assignment.positives_per_object(len(gt)).cpu()
    storage.put_scalar(f"{group}/positives_per_object", counts.float().mean().item())
    without = counts == 0
    statistic = f"{group}/objects_without_positive"
    storage.put_scalar(statistic, without.sum().item())
    for size, (low, high) in SIZES.items():
        of_size = without & (side >= low) & (side < high)
        storage.put_scalar(f"{statistic}_{size}", of_size.sum().item())


def _compiled_tail(anchors: Anchors, gt: GroundTruth) -> Callable:
    """Return the compiled :func:`compute_quotients`."""
    # Compute the anchors' cached properties (functools') here. Otherwise torch.compile would make a
    # graph for the first step of a canvas, which computes them, and another for the next steps.
    for name, value in vars(Anchors).items():
        if isinstance(value, cached_property):
            getattr(anchors, name)
    # Without the mark torch.compile assumes that sizes that are equal in the first batch are always
    # equal, such as 4 objects and the 4 sides of a box.
    for tensor in (gt.boxes, gt.classes, gt.image_index):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compile(compute_quotients)


@cache
def _compile(function: Callable) -> Callable:
    # Shared by all models, and no attribute of a model, because it cannot be pickled.
    return torch.compile(function, dynamic=True)


def compute_quotients(
    code: BoxCode,
    phases: Mapping[str, Phase],
    sources: Mapping[str, Source],
    outputs: Mapping[Source, HeadOutput],
    anchors: Anchors,
    gt: GroundTruth,
) -> tuple[dict[str, dict[str, Quotient]], dict[str, Assignment]]:
    """Decode, assign and compute the losses of each branch: a training step after the network.

    Arguments are tensors, or the same in each step, so that torch.compile makes one graph.

    Args:
        phases: {branch: current phase}.
        sources: {branch: key in outputs}.

    Returns:
        losses before their division, and assignments, by branch.
    """
    decoded = {source: decode(code, output, anchors) for source, output in outputs.items()}
    assignments = {}
    for name, phase in phases.items():
        if phase.assigner is not None:
            output, boxes = decoded[sources[name]]
            detached = Predictions(output.map(Tensor.detach), boxes.detach())
            assignments[name] = phase.assigner(anchors, gt, detached)
    quotients = {}
    for name, phase in phases.items():
        output, boxes = decoded[sources[name]]
        assignment = assignments[phase.assignment_of or name]
        quotients[name] = phase.criterion.quotients(output, boxes, anchors, gt, assignment)
    return quotients, assignments


def decode(code: BoxCode, output: HeadOutput, anchors: Anchors) -> Predictions:
    """Return the output in float32, with its boxes."""
    precise = output.map(Tensor.float)
    return Predictions(precise, code.decode(precise.box_regression, anchors.boxes, anchors.stride))
