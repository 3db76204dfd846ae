"""The anchors that a rule assigns to each object of an image, and those it nearly assigns."""

from dataclasses import dataclass

import numpy as np
import torch

from ..anchors import Anchors
from ..assigners.trace import trace_rule
from ..geometry import iou
from ..structures import Assigner, GroundTruth, Predictions

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Explanation:
    """The R anchors of one image with G objects under one rule.

    Attributes:
        gt_index: (R,) object of each positive anchor, negative for the others.
        score: (R,) float32 soft target of each positive anchor, or None.
        pairs: (P,) "owner" and "index", objects in rising order, of the candidates; bool "chosen":
            the rule chooses the anchor for the object before conflicts are resolved; "similarity",
            with predictions also "probability" and "cost"; NaN if
            unknown. All positives are among them.
        objects: (G,) values of objects by name: "mean", "std" and "threshold" of similarities, or
            "k"; NaN for none.
    """

    gt_index: np.ndarray
    score: np.ndarray | None
    pairs: Arrays
    objects: Arrays

    @property
    def is_lost(self) -> np.ndarray:
        """(P,) bool: the object chooses the anchor, and another one has it."""
        has = self.gt_index[self.pairs["index"]]
        return self.pairs["chosen"] & (has >= 0) & (has != self.pairs["owner"])

    def of_object(self, number: int) -> Arrays:
        """Return the pairs of one object."""
        first, stop = np.searchsorted(self.pairs["owner"], [number, number + 1])
        return {name: values[first:stop] for name, values in self.pairs.items()}


def explain(
    rule: Assigner, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
) -> Explanation:
    """Assign the objects of one image, and collect the pairs that the rule records."""
    with trace_rule(rule) as trace:
        assignment = rule(anchors, gt, predictions)
    index = assignment.positive[0].nonzero()[:, 0]
    owner, count = assignment.gt_index[0][index], len(anchors.boxes)
    keys = [owner[:0], *(x["owner"] * count + x["index"] for x in trace.pairs)]
    # A rule may give an anchor to an object that did not choose it.
    others = ~torch.isin(owner * count + index, torch.cat(keys))
    rest = {"owner": owner[others], "index": index[others]}
    rest["chosen"] = torch.zeros_like(rest["index"]).bool()
    unknown = torch.full(rest["index"].shape, torch.nan, dtype=torch.float64)
    names = [*trace.pairs[0]] if trace.pairs else [*rest, "similarity"]
    records = [*trace.pairs, {name: rest.get(name, unknown) for name in names}]
    pairs = {name: torch.cat([x[name] for x in records]) for name in names}
    if predictions is None:
        boxes = anchors.boxes[pairs["index"]].double()
        overlap = getattr(rule, "similarity", iou)(boxes, gt.boxes.double()[pairs["owner"]])
        pairs["similarity"] = torch.where(pairs["similarity"].isnan(), overlap, pairs["similarity"])
    order = pairs["owner"].argsort(stable=True)
    objects: dict[str, np.ndarray] = {}
    for record in trace.objects:
        ids = record.pop("ids").numpy()
        for name, values in record.items():
            objects.setdefault(name, np.full(len(gt), np.nan))[ids] = values.numpy()
    return Explanation(
        assignment.gt_index[0].numpy(),
        None if assignment.score is None else assignment.score[0].numpy(),
        {name: values[order].numpy() for name, values in pairs.items()},
        objects,
    )
