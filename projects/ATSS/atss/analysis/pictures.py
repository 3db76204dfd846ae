"""Detections on images and films: drawn, and as records."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from atss_runner import media

from ..data.images import read_image
from ..deprecated import renamed_names
from ..errors import UserError
from ..labels.headers import too_thin
from ..predictor import Detections, Predictor

__getattr__ = renamed_names(__name__)


def annotate(
    predictor: Predictor, places: Mapping[Path, Path], threshold: float, batch: int = 4
) -> Iterator[list[dict]]:
    """Draws what is found on images and videos.

    Args:
        places: {input: where it is drawn}, from :func:`targets`, in folders that exist. An input
            that cannot be read is named on standard error and skipped.
        threshold: least score that is drawn and recorded.
        batch: images at a time.
    Yields:
        for each image or frame that was read, detections as of :func:`as_records`, with
        "file_name", and "frame" for a video.

    Raises:
        OSError: where a picture cannot be written.
    """
    images = [path for path in places if not media.is_video(path)]
    if images:
        yield from _images(predictor, images, places, threshold, batch)
    for path in filter(media.is_video, places):
        yield from _video(predictor, path, places[path], threshold, batch)


def targets(inputs: Mapping[Path, Path], output: Path) -> dict[Path, Path]:
    """Where the pictures and films of inputs are written: under their names, numbered where several
    have one.

    Args:
        inputs: {file: its name}, from :func:`atss_runner.media.find_media`.

    Raises:
        ValueError: where that would replace an input.
    """
    found: dict[Path, Path] = {}
    files, taken = {path.resolve() for path in inputs}, set()
    for path, name in inputs.items():
        ending = ".mp4" if media.is_video(path) else ".png"
        stems = chain([name.stem], (f"{name.stem}_{i}" for i in count(1)))
        places = (output / name.with_name(f"{stem}{ending}") for stem in stems)
        target = next(place for place in places if place not in taken)
        if target.resolve() in files:
            raise UserError(f"{target} would replace an input: choose another --output")
        taken.add(target)
        found[path] = target
    return found


def image_ids(paths: Sequence[Path]) -> dict[Path, int | str]:
    """The numbers that all names are, without their endings, as COCO's; else the names, or the
    paths if names are not unique: a guess, because images do not tell their ids in a json."""
    stems = [path.stem.lstrip("0") or "0" for path in paths]
    if all(x.isascii() and x.isdecimal() for x in stems) and len({*stems}) == len(stems):
        return {path: int(stem) for path, stem in zip(paths, stems, strict=True)}
    are_apart = len({path.name for path in paths}) == len(paths)
    return {path: path.name if are_apart else str(path) for path in paths}


def draw_detections(image: np.ndarray, found: Detections, names: Sequence[str]) -> np.ndarray:
    """The BGR image with boxes, class names and scores on it."""
    labels = [
        f"{names[k] if names else k} {score:.0%}"
        for k, score in zip(found.classes, found.scores, strict=True)
    ]
    return media.draw_boxes(image, found.boxes, found.classes, labels)


def beside_truth(
    predictor: Predictor, records: Sequence[dict], threshold: float
) -> tuple[list[np.ndarray], list[list], list[list]]:
    """What :func:`atss.analysis.plots.plot_examples` draws of records in Detectron2's format: the
    images, BGR, and of each the objects and what is found, boxes (x1, y1, x2, y2) with labels."""
    images = [read_image(record["file_name"]) for record in records]
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
                yield path, read_image(str(path), [predictor.size])
            except (ValueError, OSError) as error:
                _skip(error)

    ids = image_ids(paths)
    with tqdm(total=len(paths), unit="image") as progress:
        for some in media.batches(readable(), batch):
            results = predictor([image for _, image in some])
            for (path, image), found in zip(some, results, strict=True):
                shown = found.above(threshold)
                drawn = draw_detections(image, shown, predictor.names)
                if not cv2.imwrite(str(places[path]), drawn):
                    raise OSError(f"cannot write the picture {places[path]}")
                where = {"image_id": ids[path], "file_name": str(path)}
                yield as_records(shown, predictor.ids, predictor.names, **where)
            progress.update(len(some))


def _video(
    predictor: Predictor, path: Path, target: Path, threshold: float, batch: int
) -> Iterator[list[dict]]:
    try:
        film = media.Film(path)
    except OSError as error:
        _skip(error)
        return
    frames = iter(film)
    first = next(frames, None)
    if first is None:
        _skip(f"{path} has no frame that can be read")
        return
    size = first.shape[1], first.shape[0]
    if thin := too_thin(size, [predictor.size]):
        _skip(f"the film {path} {thin}")
        return
    writer = film.writer(target, size)
    if not writer.isOpened():
        _skip(f"cannot write the film {target} of {size[0]} x {size[1]} pixels")
        return
    number = 0
    with tqdm(total=film.count, unit="frame", desc=path.name) as progress:
        try:
            for some in media.batches(chain([first], frames), batch):
                for frame, found in zip(some, predictor(some), strict=True):
                    shown = found.above(threshold)
                    # A writer drops frames of another size than the first, without a word.
                    writer.write(cv2.resize(draw_detections(frame, shown, predictor.names), size))
                    where = {"file_name": str(path), "frame": number}
                    yield as_records(shown, predictor.ids, predictor.names, **where)
                    number += 1
                progress.update(len(some))
        finally:
            writer.release()
    if film.count and number < film.count:
        counts = f"its header says {film.count} frames, {number} could be read"
        print(f"incomplete: {path}: {counts}", file=sys.stderr)


def _skip(problem: object) -> None:
    tqdm.write(f"skipped: {problem}", file=sys.stderr)  # on a line of its own beside a bar
