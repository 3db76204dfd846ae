"""Files of detections: COCO's list of results, a COCO data set, YOLO's labels, a table."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .annotate import Annotated
from .detections import Detections, as_records


class Run(NamedTuple):
    """The detections of a command.

    Attributes:
        results: of all images and frames.
        output: folder of the results.
        names: of the classes; may be empty.
        ids: of the classes in the training data; may be empty.
    """

    results: Sequence[Annotated]
    output: Path
    names: Sequence[str]
    ids: Sequence[int]


def write(formats: Iterable[str], run: Run) -> list[str]:
    """Write files of formats into the output folder.

    Args:
        formats: of FORMATS.

    Returns:
        their names, and those of folders.
    """
    files: dict[str, str] = {}
    for name in formats:
        files |= FORMATS[name](run)
    for name, text in files.items():
        target = run.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # An interrupted command leaves the earlier file as it was.
        unfinished = target.with_name(f"{target.name}.unfinished")
        unfinished.write_text(text, encoding="utf-8", newline="")
        unfinished.replace(target)
    return [*dict.fromkeys(name.partition("/")[0] for name in files)]


def write_coco(run: Run) -> dict[str, str]:
    """Return the list that ``COCO.loadRes`` reads, in detections.json."""
    records = [
        record
        for x in run.results
        for record in as_records(x.detections, run.ids, run.names, **x.fields)
    ]
    return {"detections.json": json.dumps(records)}


def write_dataset(run: Run) -> dict[str, str]:
    """Return a data set in COCO's format, in dataset.json. File names are those within the inputs'
    folders; ids count from 1."""
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id, result in enumerate(run.results, start=1):
        height, width = result.size
        name = _name(result, run.output)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        found = _inside(result)
        for record in as_records(found, (), (), image_id=image_id):
            box = record["bbox"]
            fields = {"area": round(box[2] * box[3], 2), "iscrowd": 0, "segmentation": []}
            annotations.append({"id": len(annotations) + 1, **record, **fields})
    names = enumerate(_class_names(run), start=1)
    categories = [{"id": k, "name": name, "supercategory": ""} for k, name in names]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return {"dataset.json": json.dumps(content)}


def write_yolo(run: Run) -> dict[str, str]:
    """Return YOLO's labels, in a folder yolo: a file for each image, with a line "class x y w h
    score" for each detection (centre, width and height in sides of the image); class names."""
    names = _class_names(run)
    config = {"train": "images", "val": "images", "names": names}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())
    files = {"classes.txt": "".join(f"{name}\n" for name in names), "data.yaml": lines}
    for result in run.results:
        label = Path("labels", _name(result, run.output)).with_suffix(".txt").as_posix()
        files[label] = "".join(_yolo_lines(result))
    return {f"yolo/{name}": text for name, text in files.items()}


def _yolo_lines(result: Annotated) -> Iterator[str]:
    height, width = result.size
    for (x1, y1, x2, y2), score, k in zip(*_inside(result), strict=True):
        box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        yield f"{k} {' '.join(f'{v:.6f}' for v in box)} {score:.4f}\n"


def write_csv(run: Run) -> dict[str, str]:
    """Return a table with a row for each detection, in detections.csv."""
    names = _class_names(run)
    text = io.StringIO()
    table = csv.writer(text)
    box = ("xmin", "ymin", "xmax", "ymax")
    table.writerow(["file_name", "frame", "width", "height", "class", "score", *box])
    for result in run.results:
        height, width = result.size
        image = [result.fields["file_name"], result.fields.get("frame", ""), width, height]
        for corners, score, k in zip(*result.detections, strict=True):
            cells = [f"{score:.4f}", *(f"{x:.2f}" for x in corners)]
            table.writerow([*image, names[k], *cells])
    return {"detections.csv": text.getvalue()}


FORMATS: dict[str, Callable[[Run], dict[str, str]]] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "csv": write_csv,
    "dataset": write_dataset,
}


def _name(result: Annotated, output: Path) -> str:
    """Return the path of an image within its folder, or one for a frame of a film."""
    path = result.target.relative_to(output)
    if (frame := result.fields.get("frame")) is not None:
        return (path.with_suffix("") / f"frame_{frame:06d}.png").as_posix()
    return path.with_suffix(Path(result.source).suffix).as_posix()


def _inside(result: Annotated) -> Detections:
    """Return the detections, clipped to the image, without those that lose their area."""
    height, width = result.size
    boxes = result.detections.boxes.clip(0, [width, height] * 2)
    found = result.detections._replace(boxes=boxes)
    return found.take((boxes[:, 2:] - boxes[:, :2] >= 0.01).all(axis=1))


def _class_names(run: Run) -> list[str]:
    """Return the names of the classes, or numbers if there are none."""
    if len(run.names):
        return [*run.names]
    highest = max((int(x.detections.classes.max(initial=-1)) for x in run.results), default=-1)
    return [str(k) for k in range(highest + 1)]
