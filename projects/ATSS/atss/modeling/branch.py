"""Outputs that learn: what a detector may have one or more of."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..anchors import Anchors
from ..errors import UserError
from ..structures import Assigner, Assignment, GroundTruth, HeadOutput, Predictions
from .box_coding import BoxCode
from .criterion import Criterion, Quotient

HeadOutputs = HeadOutput | Mapping[str, HeadOutput]
# The branch whose head gives an output, "" for the detector's head; the output's name there.
Source = tuple[str, str]


class Phase(nn.Module):
    """How a branch learns until an iteration.

    Args:
        assigner: chooses its samples; None where it takes the assignment of another branch.
        criterion: makes the losses.
        assignment_of: the name of that branch.
        until: the first iteration of the next phase.
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
    """An output, and how it learns.

    Args:
        phases: with rising ends, of which the last has none.
        output: the name of the output that it reads, where the head gives several.
        head: its own, in place of the detector's: list of feature maps -> output.
        head_of: the name of another branch, whose own head it reads.
        detached: whether its own head sees features through which nothing is learnt.
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
            raise UserError(f"phases must end at rising iterations, the last at none, not {ends}")
        if detached and head is None:
            raise UserError("detached features are for a head of the branch's own")
        if head_of and head is not None:
            raise UserError(f"a branch with a head of its own cannot have that of {head_of}")
        self.phases = nn.ModuleList(phases)
        self.output, self.head, self.detached = output, head, detached
        self.head_of = head_of

    def at(self, iteration: int) -> Phase:
        """The phase of an iteration."""
        return next(x for x in self.phases if isinstance(x, Phase) and iteration < x.until)

    def source(self, name: str) -> Source:
        """Which output it reads, if ``name`` is its own name. Branches may read the same one."""
        return self.head_of if self.head is None else name, self.output

    def own_outputs(self, features: Sequence[Tensor]) -> HeadOutputs:
        """What its own head makes of features."""
        assert self.head is not None
        return self.head([x.detach() for x in features] if self.detached else features)

    def select_output(self, outputs: HeadOutputs) -> HeadOutput:
        """The one that it reads.

        Args:
            outputs: of its head, one or several by name.

        Raises:
            ValueError: where the head does not give it.
        """
        named = outputs if isinstance(outputs, Mapping) else {"": outputs}
        if self.output not in named:
            raise UserError(
                f"a branch reads the output {self.output!r} of its head, which gives "
                f"{sorted(named)}"
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
    """Decode -> assign -> losses of each branch: the tail of a training step, after the network.

    A function of tensors and of what stays the same from step to step, so that torch.compile makes
    one graph of it: phases are chosen before, losses are divided and logged after.

    Args:
        phases: how each branch learns now, by its name.
        sources: what each branch reads, by its name: a key of outputs.
        outputs: of the heads; each is decoded once.
    Returns:
        the losses of each branch, not yet divided, and the assignment of each that has a rule.
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
    """An output in float32, and its boxes."""
    precise = output.map(Tensor.float)
    return Predictions(precise, code.decode(precise.box_regression, anchors.boxes, anchors.stride))
