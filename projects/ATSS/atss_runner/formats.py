"""Files of detections: COCO's list of results, a COCO data set, YOLO's labels, a table."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .annotate import Annotated
from .detections import Detections, as_records
from .media import FileError, Source, is_video


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


def check_names(formats: Collection[str], places: Mapping[Source, Path], output: Path) -> None:
    """Check that no two images have one file of labels.

    Args:
        places: {input: its picture}, from :func:`~atss_runner.annotate.targets`.

    Raises:
        FileError: naming both images.
    """
    first: dict[str, Source] = {}
    for source, target in places.items():
        if "yolo" not in formats or is_video(source):
            continue
        label = _label(_name(source, target, output))
        if other := first.get(label):
            raise FileError(
                f"--format yolo: {other} and {source} would have one file of labels, {label}: "
                "rename one of them, or use --format dataset"
            )
        first[label] = source


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
    folders, or as passed if two folders have the same name; ids count from 1."""
    names_within = [_name_of(x, run.output) for x in run.results]
    count = Counter(names_within)
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id, result in enumerate(run.results, start=1):
        height, width = result.size
        name = names_within[image_id - 1]
        name = name if count[name] == 1 else Path(result.source).as_posix()
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
        files[_label(_name_of(result, run.output))] = "".join(_yolo_lines(result))
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


def _label(name: str) -> str:
    return Path("labels", name).with_suffix(".txt").as_posix()


def _name_of(result: Annotated, output: Path) -> str:
    """Return the path of an image within its folder, or one for a frame of a film."""
    if (frame := result.fields.get("frame")) is not None:
        path = result.target.relative_to(output)
        return (path.with_suffix("") / f"frame_{frame:06d}.png").as_posix()
    return _name(result.source, result.target, output)


def _name(source: Source, target: Path, output: Path) -> str:
    """Return the path of an image within its folder. Its picture has the same folders, but may have
    a number."""
    return target.relative_to(output).with_name(Path(source).name).as_posix()


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
