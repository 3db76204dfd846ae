"""ATSS beside dense implementations, and the growth of its time."""

from collections.abc import Callable
from pathlib import Path

import torch
from torchvision.ops import box_iou

from atss import Anchors, GroundTruth
from atss.assigners import ATSS

from .peers import import_mmdet
from .timing import in_fresh_process, in_turn, peak_mebibytes, table

CPU = torch.device("cpu")
SMALL, LARGE = (800, 1344), (2160, 3840)


def dense_atss(anchors: Anchors, gt: GroundTruth, k: int = 9) -> torch.Tensor:
    """Return gt_index by Algorithm 1 on dense (R, G) matrices, image by image."""
    result = []
    centre = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2
    for image in range(gt.num_images):
        of_image = (gt.image_index == image).nonzero().squeeze(1)
        boxes = gt.boxes[of_image]
        owner = torch.full((len(anchors.boxes),), -1)
        if len(boxes):
            overlap = box_iou(anchors.boxes, boxes)
            # torch.cdist expands the square, and loses the digits that order neighbours.
            difference = centre[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2
            distance = difference.square().sum(dim=2).sqrt()
            first, candidates = 0, []
            for level in distance.split(anchors.per_level):
                nearest = level.topk(min(k, len(level)), dim=0, largest=False).indices
                candidates.append(nearest + first)
                first += len(level)
            candidates = torch.cat(candidates)
            values = overlap.gather(0, candidates)
            threshold = values.mean(dim=0) + values.std(dim=0)
            points = centre[candidates]
            sides = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], dim=2)
            positive = (values >= threshold) & (sides.amin(dim=2) > 0.01)
            chosen = torch.full_like(overlap, -1)
            chosen.scatter_(0, candidates, torch.where(positive, values, -1))
            best, winner = chosen.max(dim=1)
            owner = torch.where(best >= 0, of_image[winner], -1)
        result.append(owner)
    return torch.stack(result)


def mmdet_atss() -> Callable[[Anchors, GroundTruth], torch.Tensor]:
    """Return mmdet's assigner, for one image.

    Raises:
        ImportError: if mmdet is not installed.
    """
    import_mmdet()
    from mmdet.models.task_modules.assigners import ATSSAssigner
    from mmengine.structures import InstanceData

    assigner = ATSSAssigner(topk=9)

    def assign(anchors: Anchors, gt: GroundTruth) -> torch.Tensor:
        priors = InstanceData(priors=anchors.boxes)
        objects = InstanceData(bboxes=gt.boxes, labels=gt.classes)
        return assigner.assign(priors, anchors.per_level, objects).gt_inds[None] - 1

    return assign


def random_objects(count: int, canvas_hw: tuple[int, int], num_images: int = 1) -> GroundTruth:
    """Return boxes of 8 to 512 pixels, log-uniform in size, uniform on the canvas; fixed seed."""
    generator = torch.Generator().manual_seed(0)
    height, width = canvas_hw
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    size = 8 * 64 ** torch.rand(count, 2, generator=generator)
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    image_index = torch.arange(count) * num_images // count  # sorted by image, as in training
    return GroundTruth(boxes, torch.zeros(count, dtype=torch.long), image_index, num_images)


def extra_mebibytes(count: int, canvas_hw: tuple[int, int], num_images: int) -> float:
    """Return the increase of this process's peak memory by one call, with its output."""
    anchors, gt = Anchors.grid(canvas_hw), random_objects(count, canvas_hw, num_images)
    ATSS()(anchors, random_objects(1, canvas_hw))  # loads libraries
    before = peak_mebibytes()
    ATSS()(anchors, gt)
    return peak_mebibytes() - before


def beside_dense(runs: int, against_mmdet: bool) -> dict:
    """Print a table of milliseconds and ratios; return its values."""
    others = {"dense": dense_atss} | ({"mmdet": mmdet_atss()} if against_mmdet else {})
    rows, report = [], []
    for count, canvas_hw in ((7, SMALL), (100, SMALL), (1000, SMALL), (1000, LARGE)):
        anchors, gt = Anchors.grid(canvas_hw), random_objects(count, canvas_hw)
        ours = ATSS()
        functions = {"ours": lambda f=ours, a=anchors, g=gt: f(a, g)}
        for name, other in others.items():
            functions[name] = lambda f=other, a=anchors, g=gt: f(a, g)
        seconds = in_turn(functions, runs, CPU)
        entry = {"boxes": count, "canvas": "x".join(map(str, canvas_hw)), "seconds": {}}
        row = [count, entry["canvas"], f"{seconds['ours'].median * 1e3:.2f}"]
        entry["seconds"] = {name: s.median for name, s in seconds.items()}
        for name, other in others.items():
            differ = (ours(anchors, gt).gt_index != other(anchors, gt)).sum().item()
            entry[f"differ from {name}"] = differ
            row += [
                f"{seconds[name].median * 1e3:.1f}",
                f"{seconds[name].over(seconds['ours']).median:.1f}",
                differ,
            ]
        rows.append(row)
        report.append(entry)
    header = ["boxes", "canvas", "ours [ms]"]
    for name in others:
        header += [f"{name} [ms]", "ratio", "anchors that differ"]
    print(table(header, rows))
    growth = report[-1]["seconds"]["ours"] / report[-2]["seconds"]["ours"]
    print(f"ours, 1,000 boxes on 2160x3840 against 800x1344: {growth:.2f} times the seconds")

    anchors, gt = Anchors.grid(SMALL), random_objects(75000, SMALL, 128)
    crowd = in_turn({"ours": lambda: ATSS()(anchors, gt)}, runs, CPU)["ours"]
    memory = in_fresh_process(extra_mebibytes, 75000, SMALL, 128)
    low, high = crowd.interval
    print(
        f"75,000 boxes on 128 images of 800x1344: {crowd.median:.3f} s ({low:.3f} to {high:.3f}), "
        f"{memory:.0f} MiB"
    )
    return {"one image": report, "75,000 boxes": {"seconds": crowd.median, "MiB": memory}}


def scaling(runs: int, folder: Path) -> dict:
    """Print milliseconds by boxes, image size and batch, and draw them to ``scaling.png``."""

    def milliseconds(count: int, side: int, batch: int, dense: bool) -> dict[str, float]:
        anchors = Anchors.grid((side, side))
        gt = random_objects(count * batch, (side, side), batch)
        functions = {"ours": lambda: ATSS()(anchors, gt)}
        if dense:
            functions["dense"] = lambda: dense_atss(anchors, gt)
        return {k: s.median * 1e3 for k, s in in_turn(functions, runs, CPU).items()}

    def study(name: str, values: tuple[int, ...], largest_dense: int, **fixed) -> dict:
        return {v: milliseconds(**fixed, **{name: v}, dense=v <= largest_dense) for v in values}

    studies = {
        "boxes on one image of 1024 x 1024": study(
            "count", (1, 3, 10, 30, 100, 300, 1000, 3000, 10000), 1000, side=1024, batch=1
        ),
        "side of one image with 100 boxes [px]": study(
            "side", (512, 1024, 2048, 4096, 8192), 4096, count=100, batch=1
        ),
        "images of 1024 x 1024 with 100 boxes each": study(
            "batch", (1, 2, 4, 8, 16, 32), 16, count=100, side=1024
        ),
    }
    for title, points in studies.items():
        rows = [
            [v, *(f"{points[v].get(k, float('nan')):.2f}" for k in ("ours", "dense"))]
            for v in points
        ]
        print(table([title, "ours [ms]", "dense [ms]"], rows), end="\n\n")
    _draw(studies, folder / "scaling.png")
    return studies


def _draw(studies: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(studies), figsize=(12, 3.6), sharey=True)
    for axis, (title, points) in zip(axes, studies.items(), strict=True):
        for name, style in (("ours", "o-"), ("dense", "s--")):
            curve = {v: times[name] for v, times in points.items() if name in times}
            axis.plot(list(curve), list(curve.values()), style, label=name)
        axis.set(xscale="log", yscale="log", xlabel=title)
        ticks = list(points) if len(points) < 8 else list(points)[::2]
        axis.set_xticks(ticks, [f"{v:,}" for v in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("assignment [ms]")
    axes[0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
