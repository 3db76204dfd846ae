"""Outputs that learn: what a detector may have one or more of."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..anchors import Anchors
from ..structures import Assignment, GroundTruth, HeadOutput, Predictions
from .criterion import Criterion

Assigner = Callable[[Anchors, GroundTruth, Predictions], Assignment]
HeadOutputs = HeadOutput | Mapping[str, HeadOutput]


class Phase(NamedTuple):
    """How a branch learns until an iteration. ``assigner`` is None where the branch takes the
    assignment of another."""

    until: float
    assigner: Assigner | None
    criterion: Criterion


class Branch(nn.Module):
    """An output, and how it learns.

    Args:
        assigner: chooses its samples; None where it takes the assignment of another branch.
        criterion: makes the losses.
        assignment_of: the name of that branch.
        output: the name of the output that it reads, where the head gives several.
        head: its own, in place of the detector's: list of feature maps -> output.
        detached: whether its own head sees features through which nothing is learnt.
        earlier: phases before this one, with rising iterations.
    """

    def __init__(
        self,
        assigner: Assigner | None,
        criterion: Criterion,
        *,
        assignment_of: str = "",
        output: str = "",
        head: nn.Module | None = None,
        detached: bool = False,
        earlier: Sequence[Phase] = (),
    ):
        super().__init__()
        if (assigner is None) == (not assignment_of):
            raise ValueError("a branch has an assigner, or takes the assignment of another branch")
        if detached and head is None:
            raise ValueError("detached features are for a head of the branch's own")
        ends = [phase.until for phase in earlier]
        if ends != sorted(set(ends)) or any(end <= 0 for end in ends):
            raise ValueError(f"phases must end at rising iterations, not at {ends}")
        self.assigner, self.criterion = assigner, criterion
        self.assignment_of, self.output = assignment_of, output
        self.head, self.detached = head, detached
        self.earlier = list(earlier)
        # Known as modules, for what they may hold.
        self.earlier_criteria = nn.ModuleList(phase.criterion for phase in earlier)

    def at(self, iteration: int) -> tuple[Assigner | None, Criterion]:
        """Assigner and criterion of an iteration."""
        for phase in self.earlier:
            if iteration < phase.until:
                return phase.assigner, phase.criterion
        return self.assigner, self.criterion

    def read(self, outputs: HeadOutputs) -> HeadOutput:
        """The output that it reads.

        Raises:
            ValueError: where the head does not give it.
        """
        if isinstance(outputs, HeadOutput):
            named: Mapping[str, HeadOutput] = {"": outputs}
        else:
            named = outputs
        if self.output not in named:
            raise ValueError(
                f"a branch reads the output {self.output!r} of its head, which gives "
                f"{sorted(named)}"
            )
        return named[self.output]

    def own_output(self, features: Sequence[Tensor]) -> HeadOutputs:
        """What its own head makes of the features."""
        assert self.head is not None
        return self.head([x.detach() for x in features] if self.detached else list(features))
