"""Rules that look at predictions, beside mmdet's, and the growth of their time."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from atss import Anchors, GroundTruth, assigners
from atss.losses import Focal, giou_loss
from atss.structures import Predictions

from .assignment import CPU
from .peers import import_mmdet
from .scenes import NUM_CLASSES, random_scene
from .timing import in_fresh_process, in_turn, peak_mebibytes, resident_mebibytes, table

# Rules that are compared with each other, and all rules.
LOOKING = ("ATSS", "TAL", "SimOTA", "SoftLabel", "OTA", "PAA")
RULES = (*LOOKING, "DDOD", "POTO", "MaxIoU", "SpatialScale")


def make_rule(name: str) -> Callable:
    """Return a rule with its defaults. In older commits DDOD is ATSS with an alpha."""
    if name == "DDOD" and not hasattr(assigners, name):
        return assigners.ATSS(alpha=0.8)
    return getattr(assigners, name)()


def mmdets(anchors: Anchors, gt: GroundTruth, predictions: Predictions) -> dict[str, Callable]:
    """Return calls of mmdet's assigners on one image, by the names of ours.

    Raises:
        ImportError: if mmdet is not installed.
    """
    import_mmdet()
    from mmdet.models.task_modules.assigners import (
        DynamicSoftLabelAssigner,
        SimOTAAssigner,
        TaskAlignedAssigner,
    )
    from mmengine.structures import InstanceData

    centre = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2
    points = torch.cat([centre, anchors.stride[:, None].expand(-1, 2)], dim=1)
    objects = InstanceData(bboxes=gt.boxes, labels=gt.classes)
    logits, boxes = predictions.output.classes[0], predictions.boxes[0]
    kinds = {
        "TAL": (TaskAlignedAssigner(topk=13), anchors.boxes, logits.sigmoid()),
        "SimOTA": (SimOTAAssigner(), points, logits.sigmoid()),
        "SoftLabel": (DynamicSoftLabelAssigner(), points, logits),
    }

    def call(assigner, priors, scores) -> Callable:
        instances = InstanceData(priors=priors, bboxes=boxes, scores=scores)
        return lambda: assigner.assign(instances, objects).gt_inds[None] - 1

    return {name: call(*kind) for name, kind in kinds.items()}


def sklearns_mixture(values: np.ndarray) -> None:
    """Fit PAA's mixtures object by object, as PAA's authors and mmdet do."""
    from sklearn.mixture import GaussianMixture

    for row in values:
        x = row[np.isfinite(row)][:, None]
        if len(x) > 1:
            model = GaussianMixture(
                2,
                weights_init=[0.5, 0.5],
                means_init=[x.min(axis=0), x.max(axis=0)],
                precisions_init=np.ones((2, 1)),
                covariance_type="diag",
            )
            model.fit(x)
            model.predict(x)
            model.score_samples(x)


def extra_mebibytes(name: str, count: int, num_images: int) -> float:
    """Return the increase of this process's peak memory by one call."""
    rule = make_rule(name)
    rule(*random_scene(3))  # loads libraries
    scene = random_scene(count, num_images)
    # Freed memory of making the scene would hide that of the rule.
    ballast = torch.ones(max(0, int((peak_mebibytes() - resident_mebibytes()) * 2**18)))
    before = peak_mebibytes()
    rule(*scene)
    del ballast
    return peak_mebibytes() - before


def beside_mmdet(runs: int, against_mmdet: bool, crowd: bool) -> dict:
    """Print tables of milliseconds, ratios and memory; return their values."""
    # Imported here because against.py runs this file with packages of other commits.
    from atss.assigners.mixture import mixture

    rules = {name: make_rule(name) for name in LOOKING}
    report: dict = {"ms": {}, "mmdet": {}, "MiB": {}}
    rows = []
    for count in (7, 100, 1000, 5000):
        scene = random_scene(count)
        functions = {n: lambda r=rule, s=scene: r(*s) for n, rule in rules.items()}
        seconds = in_turn(functions, runs, CPU)
        report["ms"][count] = {name: s.median * 1e3 for name, s in seconds.items()}
        rows.append([count, *(f"{s.median * 1e3:.1f}" for s in seconds.values())])
    print("\nmilliseconds, one image of 800 x 1344 by number of objects\n")
    print(table(["objects", *rules], rows))
    ms = report["ms"]
    growth = {name: ms[5000][name] / ms[1000][name] for name in rules}
    print("\n5,000 against 1,000:", ", ".join(f"{n} {x:.1f}" for n, x in growth.items()))

    rows = []
    for count in (100, 1000) if against_mmdet else ():
        scene = random_scene(count)
        theirs = mmdets(*scene)
        # At 1,000 objects the other rules of mmdet need more than 23 GB.
        for name in theirs if count == 100 else ["TAL"]:
            rule = rules[name]
            functions = {"ours": lambda r=rule, s=scene: r(*s), "mmdet": theirs[name]}
            seconds = in_turn(functions, runs, CPU)
            ours, mmdet = (seconds[x].median * 1e3 for x in functions)
            differ = int((rule(*scene).gt_index != theirs[name]()).sum())
            rows.append([name, count, f"{ours:.1f}", f"{mmdet:.1f}", f"{mmdet / ours:.1f}", differ])
            report["mmdet"][f"{name}, {count}"] = {"ours": ours, "mmdet": mmdet, "differ": differ}
    if rows:
        header = ["rule", "objects", "ours [ms]", "mmdet [ms]", "ratio", "anchors that differ"]
        print("\n" + table(header, rows))

    for count in (100, 1000):
        values = paa_costs(*random_scene(count))
        functions = {
            "ours": lambda v=values: mixture(v),
            "scikit-learn": lambda v=values: sklearns_mixture(v.numpy()),
        }
        with warnings.catch_warnings(action="ignore"):
            seconds = in_turn(functions, runs, CPU)
        ours, loop = seconds["ours"].median * 1e3, seconds["scikit-learn"].median * 1e3
        print(
            f"\nPAA's mixture of {count} objects: {ours:.2f} ms, "
            f"scikit-learn's loop {loop:.0f} ms, {loop / ours:.0f} times"
        )
        report[f"mixture of {count}"] = {"ours": ours, "scikit-learn": loop}

    memory = {n: in_fresh_process(extra_mebibytes, n, 1000, 1) for n in rules}
    print("\nMiB at 1,000 objects:", ", ".join(f"{n} {x:.0f}" for n, x in memory.items()))
    report["MiB"]["1,000"] = memory
    if crowd:
        memory = {n: in_fresh_process(extra_mebibytes, n, 75000, 128) for n in rules}
        print("MiB at 75,000 objects on 128 images:", end=" ")
        print(", ".join(f"{n} {x:.0f}" for n, x in memory.items()))
        report["MiB"]["75,000"] = memory
    return report


def paa_costs(anchors: Anchors, gt: GroundTruth, predictions: Predictions) -> torch.Tensor:
    """Return the (G, M) values to which PAA fits its mixtures: the costs of the 9 cheapest
    candidates of each object and level, ascending, padded by infinity."""
    first = assigners.MaxIoU(0.1, 0.1, claims_go_to="claimant")(anchors, gt).gt_index
    image, index = (first >= 0).nonzero(as_tuple=True)
    owner, level = first[image, index], anchors.level_of(index)
    output = predictions.output.map(lambda x: x[image, index].double())
    targets = one_hot(gt.classes[owner], NUM_CLASSES).double()
    cost = Focal()(output.probability(), output.cross_entropy(targets), targets).sum(dim=1)
    cost += 1.3 * giou_loss(output.box_regression, gt.boxes[owner].double())
    rows = []
    for g in owner.unique():
        levels = (cost[(owner == g) & (level == i)] for i in range(len(anchors.strides)))
        rows.append(torch.cat([x.sort().values[:9] for x in levels]).sort().values)
    return pad_sequence(rows, batch_first=True, padding_value=torch.inf)
