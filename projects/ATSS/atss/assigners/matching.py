"""Rules that look at what the network predicts, put together of functions of flat candidate pairs:
candidates, cost, cut, rank and score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..anchors import Anchors
from ..structures import BACKGROUND, Assignment, GroundTruth, Predictions
from .pairs import NOBODY, keep_best
from .scene import ClassLoss, Pairs, Scene, Segments
from .similarities import IOU, Similarity

Candidates = Callable[[Scene, Tensor], Pairs]  # of some objects, (g,) int64 into G
PerPair = Callable[[Pairs], Tensor]  # (P,)
Cut = Callable[[Pairs, Tensor], Tensor]  # of pairs and their costs, (P,) bool


class Matching:
    """A rule in steps. Each object has candidates, each of its pairs costs something, and a cut
    chooses among them. An anchor that several objects choose goes to the pair of highest rank, of
    equal ones to the lower object. What is matched in the end may have a score.

    Args:
        cost: of each pair; infinite for one that cannot be chosen.
        cut: which pairs an object chooses, by their costs.
        candidates: pairs of some objects, all that these may choose.
        farther: more candidates, for objects for which these are too few or too dear: (least cost
            of any pair that the candidates before left out, candidates) each. The cut then has a
            method ``wants``, (G,): how many an object chooses if there are as many.
        takes_part: which of the N * R anchors may be chosen; None for all.
        rank: of the pairs that chose an anchor; None: it goes to the cheapest of all its pairs,
            whether that chose it or not.
        score: of what is matched, in [0, 1]; None for none.
        together: all objects at once, because the choice of one depends on that of others.
        similarity: of predicted boxes and objects.
    """

    looks_at_predictions = True

    def __init__(
        self,
        *,
        cost: PerPair,
        cut: Cut,
        candidates: Candidates = Scene.near,
        farther: Sequence[tuple[float, Candidates]] = (),
        takes_part: Callable[[Scene], Tensor] | None = None,
        rank: PerPair | None = None,
        score: PerPair | None = None,
        together: bool = False,
        similarity: Similarity = IOU,
    ):
        self.cost, self.cut, self.takes_part = cost, cut, takes_part
        self.candidates, self.farther, self.together = candidates, tuple(farther), together
        self.wants: Callable[[Scene], Tensor] | None = getattr(cut, "wants", None)
        if farther and self.wants is None:
            raise ValueError("to look farther, a cut has to say how many an object wants")
        self.rank, self.score = rank, score
        self.similarity = similarity

    @torch.no_grad()
    def __call__(
        self, anchors: Anchors, gt: GroundTruth, predictions: Predictions | None = None
    ) -> Assignment:
        """Assigns the anchors of every image of the batch. The host waits for the number of pairs.

        Args:
            anchors: R anchors, the same for all images.
            gt: G objects of N images.
            predictions: of the images.
        Returns:
            the assignment, (N, R).

        Raises:
            ValueError: without predictions.
        """
        scene = Scene.of(self, anchors, gt, predictions, self.similarity)
        if self.takes_part is not None:
            scene = replace(scene, takes_part=self.takes_part(scene), _known={})
        contest = _Contest(scene)
        every = scene.every()
        for objects in [every] if self.together else scene.pieces(every, len(anchors.boxes)):
            self._choose(scene, objects, contest)
        if self.rank is None and self.farther:
            # Who chose these paid so much that somebody of whom nothing is known might pay less.
            for slots in scene.pieces(contest.dear(self.farther[0][0]), len(gt)):
                pairs = scene.all_objects(slots)
                contest.compete(pairs, -self._costs(pairs))
        gt_index = contest.settle()
        score = None if self.score is None else _score(scene, gt_index, self.score)
        return Assignment(gt_index.view(gt.num_images, -1), score)

    def _costs(self, pairs: Pairs) -> Tensor:
        """Of each pair; infinite where a prediction is not finite."""
        cost = self.cost(pairs)
        sound = pairs.boxes.isfinite().all(dim=1) & ~cost.isnan()
        return torch.where(sound, cost, torch.inf)

    def _choose(self, scene: Scene, objects: Tensor, contest: _Contest) -> None:
        """Of (g,) objects, from their candidates, and for some from more and more."""
        levels = [self.candidates, *(candidates for _, candidates in self.farther)]
        bounds = [bound for bound, _ in self.farther]
        for candidates, bound in zip(levels, [*bounds, torch.inf], strict=True):
            pairs = candidates(scene, objects)
            cost = self._costs(pairs)
            chosen = self.cut(pairs, cost)
            if self.wants is not None and self.farther:
                served = pairs.owner[chosen & (cost < bound)]
                wanted = self.wants(scene)
                count = torch.zeros_like(wanted).scatter_add_(0, served, torch.ones_like(served))
                content = (count >= wanted) | (bound == torch.inf)
                objects = objects[~content[objects]]
                settled = content[pairs.owner]
                pairs, cost, chosen = pairs.at(settled), cost[settled], chosen[settled]
            claims = pairs.at(chosen)
            contest.claim(claims)
            if self.rank is None:
                contest.compete(pairs, -cost)
            else:
                contest.compete(claims, self.rank(claims))
            if not len(objects):
                break


class _Contest:
    """Who chose each anchor of each image, and to whom it goes if several did. A rank is a cost,
    negated, where a rule has no other."""

    def __init__(self, scene: Scene):
        self.best = scene.objects.new_full((scene.num_slots,), -torch.inf)
        self.owner = scene.gt.image_index.new_full((scene.num_slots,), NOBODY)
        self.claims = torch.zeros_like(self.owner)
        self.claimant = torch.full_like(self.owner, BACKGROUND)

    def claim(self, pairs: Pairs) -> None:
        self.claims.scatter_add_(0, pairs.slot, torch.ones_like(pairs.slot))
        self.claimant[pairs.slot] = pairs.owner

    def compete(self, pairs: Pairs, rank: Tensor) -> None:
        keep_best(self.best, self.owner, pairs.slot, pairs.owner, rank)

    def dear(self, cost: float) -> Tensor:
        """Contested slots that would cost their owners so much or more."""
        return ((self.claims > 1) & (self.best <= -cost)).nonzero().squeeze(1)

    def settle(self) -> Tensor:
        """(N * R,) int64 into G, or BACKGROUND."""
        return torch.where(self.claims > 1, self.owner, self.claimant)


def _score(scene: Scene, gt_index: Tensor, score: PerPair) -> Tensor:
    """(N, R) float32 score of what is matched, 0 elsewhere."""
    slot = (gt_index >= 0).nonzero().squeeze(1)
    matched = Pairs(scene, gt_index[slot], slot % len(scene.anchors.boxes))
    scores = scene.gt.boxes.new_zeros(len(gt_index))
    scores[slot] = score(matched).float()
    return scores.view(scene.gt.num_images, -1)


def overlap(pairs: Pairs) -> Tensor:
    """Rank or score: (P,) similarity of predicted boxes and objects."""
    return pairs.overlap


def class_cost(pairs: Pairs, loss: ClassLoss, targets: Tensor) -> Tensor:
    """(P,) a class loss, all classes added up: the object's is to have the target (P,), others 0.
    So it is what an anchor without object costs, but for one class."""
    own = pairs.scene.class_loss(loss, pairs.classes, targets)
    nothing = pairs.scene.class_loss(loss, pairs.classes, torch.zeros_like(targets))
    return pairs.scene.without_object(loss, pairs.slot) + (own - nothing)


def cheapest(segments: Segments, cost: Tensor, k: Tensor) -> Tensor:
    """(P,) bool: the k of lowest cost of each segment, as far as they are finite; of equal costs
    the first.

    Args:
        k: (S,) int64.
    """
    chosen = torch.zeros_like(cost, dtype=torch.bool)
    if not len(cost):
        return chosen
    table = segments.table(cost, torch.inf)
    lowest = table.topk(min(int(k.max()), table.shape[1]), largest=False).values
    last = lowest.gather(1, k.clamp(max=lowest.shape[1])[:, None] - 1).squeeze(1)
    few = ((cost <= last[segments.row]) & (cost < torch.inf)).nonzero().squeeze(1)
    # They may be more where costs are equal.
    few = in_order(few, cost, segments.row)
    chosen[few[Segments(segments.row[few]).column < k[segments.row[few]]]] = True
    return chosen


def in_order(few: Tensor, cost: Tensor, segment: Tensor) -> Tensor:
    """Some pairs, sorted by segment, then cost, then as they were."""
    few = few[cost[few].sort(stable=True).indices]
    return few[segment[few].sort(stable=True).indices]
