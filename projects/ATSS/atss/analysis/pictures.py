"""Detections on images and films: drawn, and as records."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from atss_runner import media

from ..data.images import read
from ..predictor import Detections, Predictor


def annotate(
    predictor: Predictor, paths: Sequence[Path], output: Path, threshold: float, batch: int = 4
) -> Iterator[list[dict]]:
    """Draws what is found on images and videos into a folder.

    Args:
        paths: from :func:`atss_runner.media.find_media`. What cannot be read is named on standard
            error and skipped.
        output: the folder; see :func:`targets`.
        threshold: least score that is drawn and recorded.
        batch: images at a time.
    Yields:
        for each image or frame that was read, detections as of :func:`as_records`, with
        "file_name", and "frame" for a video.

    Raises:
        OSError: where a picture cannot be written.
    """
    places = targets(paths, output)
    images = [path for path in paths if not media.is_video(path)]
    if images:
        yield from _images(predictor, images, places, threshold, batch)
    for path in filter(media.is_video, paths):
        yield from _video(predictor, path, places[path], threshold, batch)


def targets(paths: Sequence[Path], output: Path) -> dict[Path, Path]:
    """Where the pictures and films of inputs are written: under their names, numbered where several
    have one.

    Raises:
        ValueError: where that would replace an input.
    """
    found: dict[Path, Path] = {}
    inputs, taken = {path.resolve() for path in paths}, set()
    for path in paths:
        ending = ".mp4" if media.is_video(path) else ".png"
        names = chain([path.stem], (f"{path.stem}_{i}" for i in count(1)))
        target = next(x for name in names if (x := output / f"{name}{ending}") not in taken)
        if target.resolve() in inputs:
            raise ValueError(f"{target} would replace an input: choose another --output")
        taken.add(target)
        found[path] = target
    return found


def image_ids(paths: Sequence[Path]) -> dict[Path, int | str]:
    """The numbers that all names are, without their endings, as COCO's, or else the names: a guess,
    because images do not tell their ids in a json."""
    stems = [path.stem.lstrip("0") or "0" for path in paths]
    if all(x.isascii() and x.isdecimal() for x in stems) and len({*stems}) == len(stems):
        return {path: int(stem) for path, stem in zip(paths, stems, strict=True)}
    return {path: path.name for path in paths}


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
    images = [read(record["file_name"]) for record in records]
    truth, found = [], []
    for record, detected in zip(records, predictor(images), strict=True):
        objects = [(a["bbox"], str(a["category_id"])) for a in record["annotations"]]
        truth.append([((x, y, x + w, y + h), text) for (x, y, w, h), text in objects])
        best = zip(*detected.above(threshold), strict=True)
        found.append([(box, f"{k} {score:.2f}") for box, score, k in best])
    return images, truth, found


def as_records(
    found: Detections, ids: Sequence[int], names: Sequence[str], **where: object
) -> list:
    """In COCO's form, which ``COCO.loadRes`` takes.

    Args:
        ids: of the classes in the data that they were learnt from; empty: they are counted from 1.
        names: of the classes; empty where they are not known.
        where: what else each record holds.
    """
    return [
        {
            **where,
            "category_id": ids[k] if len(ids) else int(k) + 1,
            **({"category_name": names[k]} if len(names) else {}),
            "bbox": [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(float(score), 4),
        }
        for (x1, y1, x2, y2), score, k in zip(*found, strict=True)
    ]


def _images(
    predictor: Predictor,
    paths: Sequence[Path],
    places: Mapping[Path, Path],
    threshold: float,
    batch: int,
) -> Iterator[list[dict]]:
    def readable() -> Iterator[tuple[Path, np.ndarray]]:
        for path in paths:
            try:
                yield path, read(str(path), [predictor.size])
            except (ValueError, OSError) as error:
                print(f"skipped: {error}", file=sys.stderr)

    ids = image_ids(paths)
    with tqdm(total=len(paths), unit="image") as progress:
        for some in media.batches(readable(), batch):
            results = predictor([image for _, image in some])
            for (path, image), found in zip(some, results, strict=True):
                shown = found.above(threshold)
                drawn = draw(image, shown, predictor.names)
                if not cv2.imwrite(str(places[path]), drawn):
                    raise OSError(f"cannot write the picture {places[path]}")
                where = {"image_id": ids[path], "file_name": str(path)}
                yield as_records(shown, predictor.ids, predictor.names, **where)
            progress.update(len(some))


def _video(
    predictor: Predictor, path: Path, target: Path, threshold: float, batch: int
) -> Iterator[list[dict]]:
    film = media.Film(path)
    writer = film.writer(target)
    if not writer.isOpened():
        raise OSError(f"cannot write the film {target}")
    number = 0
    with tqdm(total=film.count, unit="frame", desc=path.name) as progress:
        try:
            for some in media.batches(film, batch):
                for frame, found in zip(some, predictor(some), strict=True):
                    shown = found.above(threshold)
                    writer.write(draw(frame, shown, predictor.names))
                    where = {"file_name": str(path), "frame": number}
                    yield as_records(shown, predictor.ids, predictor.names, **where)
                    number += 1
                progress.update(len(some))
        finally:
            writer.release()
    if number == 0:
        target.unlink(missing_ok=True)
        print(f"skipped: {path} has no frame that can be read", file=sys.stderr)
