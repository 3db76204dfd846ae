"""TOOD's rule: task alignment learning."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import arg
from .lists import ListPairs, Lists
from .locations import INSIDE_MARGIN
from .matching import Matching, select_cheapest
from .pairs import CandidatePairs, alignment
from .similarities import IOU, Similarity

# Keeps a quotient finite, as in the references.
EPS = 1e-7


@dataclass(frozen=True)
class TAL(Matching):
    """Task alignment learning (TOOD, arXiv 2108.07755, section 3.2): an object selects its
    ``top_k`` anchors of highest p^alpha * IoU^beta; those inside it are positive.

    Conflicts: the highest IoU. Score: that metric, scaled to a maximum of the object's highest IoU.

    Args:
        top_k: anchors per object, of all levels.
        alpha, beta: exponents of the class probability and of the IoU of the predicted box.
        inside: whether anchors outside the object are dropped "after" the selection (mmdet) or
            "before" (PP-YOLOE, YOLOv8).
    """

    top_k: int = arg(13, low=1)
    alpha: float = arg(1.0, low=0)
    beta: float = arg(6.0, low=0.1)  # an object selects no pair without overlap
    inside: str = arg("after", choices=("after", "before"))
    similarity: Similarity = IOU

    def candidates(self, batch: Lists, ids: Tensor) -> ListPairs:
        """List the pairs that can be among the top k: even with a probability of 1, others have a
        lower metric than the k-th of the object's central anchors."""
        central = batch.near_centre(ids, 1.5)
        if self.inside == "before":
            central = central.at(central.inside(INSIDE_MARGIN))
        last = central.kth_highest(self.metric(central), self.top_k)[ids]
        return batch.near(ids, last ** (1 / self.beta))

    def metric(self, pairs: CandidatePairs) -> Tensor:
        """Return (...) p^alpha * IoU^beta."""
        return alignment(pairs, self.alpha, self.beta)

    def cost(self, pairs: CandidatePairs) -> Tensor:
        metric = self.metric(pairs)
        possible = metric > 0
        if self.inside == "before":
            possible = possible & pairs.inside(INSIDE_MARGIN)
        return torch.where(possible, -metric, torch.inf)

    def select(self, pairs: CandidatePairs, cost: Tensor) -> Tensor:
        return select_cheapest(pairs, cost, self.top_k) & pairs.inside(INSIDE_MARGIN)

    def rank(self, pairs: CandidatePairs) -> Tensor:
        return pairs.similarity

    def score(self, pairs: CandidatePairs) -> Tensor:
        metric, owner = self.metric(pairs), pairs.owner
        zero = torch.zeros_like(pairs.batch.objects[:, 0])
        highest, best = (
            zero.scatter_reduce(0, owner.flatten(), x.flatten(), "amax")[owner]
            for x in (metric, pairs.similarity)
        )
        return metric / (highest + EPS) * best
