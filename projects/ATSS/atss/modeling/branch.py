"""Outputs that learn: what a detector may have one or more of."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ..anchors import Anchors
from ..structures import Assignment, GroundTruth, HeadOutput, Predictions
from .criterion import Criterion

Assigner = Callable[[Anchors, GroundTruth, Predictions], Assignment]
HeadOutputs = HeadOutput | Mapping[str, HeadOutput]


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
            raise ValueError("a branch has an assigner, or takes the assignment of another branch")
        self.assigner, self.criterion = assigner, criterion
        self.assignment_of, self.until = assignment_of, until


class Branch(nn.Module):
    """An output, and how it learns.

    Args:
        phases: with rising ends, of which the last has none.
        output: the name of the output that it reads, where the head gives several.
        head: its own, in place of the detector's: list of feature maps -> output.
        detached: whether its own head sees features through which nothing is learnt.
    """

    def __init__(
        self,
        *phases: Phase,
        output: str = "",
        head: nn.Module | None = None,
        detached: bool = False,
    ):
        super().__init__()
        ends = [phase.until for phase in phases]
        if not ends or ends != sorted({*ends}) or ends[0] <= 0 or ends[-1] < math.inf:
            raise ValueError(f"phases must end at rising iterations, the last at none, not {ends}")
        if detached and head is None:
            raise ValueError("detached features are for a head of the branch's own")
        self.phases = nn.ModuleList(phases)
        self.output, self.head, self.detached = output, head, detached

    def at(self, iteration: int) -> Phase:
        """The phase of an iteration."""
        return next(x for x in self.phases if isinstance(x, Phase) and iteration < x.until)

    def read(self, features: Sequence[Tensor], shared: Callable[[], HeadOutputs]) -> HeadOutput:
        """The output that it reads.

        Args:
            shared: gives the output of the detector's head, or several by name.

        Raises:
            ValueError: where the head does not give it.
        """
        if self.head is None:
            outputs = shared()
        else:
            outputs = self.head([x.detach() for x in features] if self.detached else features)
        named = outputs if isinstance(outputs, Mapping) else {"": outputs}
        if self.output not in named:
            raise ValueError(
                f"a branch reads the output {self.output!r} of its head, which gives "
                f"{sorted(named)}"
            )
        return named[self.output]
