"""Detections on images and films: drawn, and as records."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from tqdm import tqdm

from atss_runner import media

from ..predictor import Detections, Predictor


def annotate(
    predictor: Predictor, paths: Sequence[Path], output: Path, threshold: float, batch: int = 4
) -> list[dict]:
    """Draws what is found on images and videos into a folder.

    Args:
        paths: from :func:`atss_runner.media.find_media`. What cannot be read is named on standard
            error and skipped.
        output: the folder, which is made.
        threshold: least score that is drawn and recorded.
        batch: images at a time.
    Returns:
        detections in COCO's form with "file_name", and "frame" for a video; category_id counts the
        classes from 1.
    """
    output.mkdir(parents=True, exist_ok=True)
    images = [path for path in paths if not media.is_video(path)]
    records = _images(predictor, images, output, threshold, batch) if images else []
    for path in filter(media.is_video, paths):
        records += _video(predictor, path, output, threshold, batch)
    return records


def draw(image: np.ndarray, found: Detections, names: Sequence[str]) -> np.ndarray:
    """The BGR image with boxes, class names and scores on it."""
    labels = [
        f"{names[k] if names else k} {score:.0%}"
        for k, score in zip(found.classes, found.scores, strict=True)
    ]
    return media.draw(image, found.boxes, found.classes, labels)


def beside_truth(
    predictor: Predictor, records: Sequence[dict], threshold: float
) -> tuple[list[np.ndarray], list[list], list[list]]:
    """What :func:`atss.analysis.plots.plot_examples` draws of records in Detectron2's format: the
    images, BGR, and of each the objects and what is found, boxes (x1, y1, x2, y2) with labels."""
    images = [read_image(record["file_name"], format="BGR") for record in records]
    truth, found = [], []
    for record, detected in zip(records, predictor(images), strict=True):
        objects = [(a["bbox"], str(a["category_id"])) for a in record["annotations"]]
        truth.append([((x, y, x + w, y + h), text) for (x, y, w, h), text in objects])
        best = zip(*detected.above(threshold), strict=True)
        found.append([(box, f"{k} {score:.2f}") for box, score, k in best])
    return images, truth, found


def as_records(found: Detections, **where: object) -> list[dict]:
    """In COCO's form; category_id counts the classes from 1."""
    return [
        {
            **where,
            "category_id": int(k) + 1,
            "bbox": [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(float(score), 4),
        }
        for (x1, y1, x2, y2), score, k in zip(*found, strict=True)
    ]


def _images(
    predictor: Predictor, paths: Sequence[Path], output: Path, threshold: float, batch: int
) -> list[dict]:
    def readable() -> Iterator[tuple[Path, np.ndarray]]:
        for path in paths:
            try:
                yield path, read_image(str(path), format="BGR")
            except OSError as error:
                print(f"skipped {path}: {error}", file=sys.stderr)

    records = []
    stems: Counter[str] = Counter()
    with tqdm(total=len(paths), unit="image") as progress:
        for some in media.batches(readable(), batch):
            results = predictor([image for _, image in some])
            for (path, image), found in zip(some, results, strict=True):
                shown = found.above(threshold)
                # Two folders may hold images of one name.
                number = f"_{stems[path.stem]}" if stems[path.stem] else ""
                stems[path.stem] += 1
                target = output / f"{path.stem}{number}.png"
                cv2.imwrite(str(target), draw(image, shown, predictor.names))
                records += as_records(shown, file_name=str(path))
            progress.update(len(some))
    return records


def _video(
    predictor: Predictor, path: Path, output: Path, threshold: float, batch: int
) -> list[dict]:
    film = media.Film(path)
    target = film.writer(output / f"{path.stem}.mp4")
    records, number = [], 0
    with tqdm(total=film.count, unit="frame", desc=path.name) as progress:
        for some in media.batches(film, batch):
            for frame, found in zip(some, predictor(some), strict=True):
                shown = found.above(threshold)
                target.write(draw(frame, shown, predictor.names))
                records += as_records(shown, file_name=str(path), frame=number)
                number += 1
            progress.update(len(some))
    target.release()
    if number == 0:
        print(f"skipped {path}: no frame could be read", file=sys.stderr)
    return records
