"""Branches: outputs of the heads, each with an assigner and a criterion."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..anchors import Anchors
from ..errors import UserError
from ..structures import Assigner, Assignment, GroundTruth, HeadOutput, Predictions
from .box_coding import BoxCode
from .criterion import Criterion, Quotient

HeadOutputs = HeadOutput | Mapping[str, HeadOutput]
# (name of the branch whose head computes an output, "" for the detector's head; output's name).
Source = tuple[str, str]


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
