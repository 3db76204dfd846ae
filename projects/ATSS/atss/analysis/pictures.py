"""Detections drawn on images and videos, and as COCO records."""

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
from ..predictor import Detections, Predictor, draw_detections

__getattr__ = renamed_names(__name__)


def annotate(
    predictor: Predictor, places: Mapping[Path, Path], threshold: float, batch: int = 4
) -> Iterator[list[dict]]:
    """Draw detections, and yield the records of each image or frame, with "file_name" and, for a
    video, "frame". Unreadable inputs are listed on standard error.

    Args:
        places: {input: picture to write}, from :func:`targets`, in folders that exist.
        threshold: least score.

    Raises:
        OSError: if a picture cannot be written.
    """
    images = [path for path in places if not media.is_video(path)]
    if images:
        yield from _annotate_images(predictor, images, places, threshold, batch)
    for path in filter(media.is_video, places):
        yield from _annotate_video(predictor, path, places[path], threshold, batch)


def targets(inputs: Mapping[Path, Path], output: Path) -> dict[Path, Path]:
    """Return {input: picture or video to write}, numbered if several inputs have one name.

    Raises:
        UserError: if a target would replace an input.
    """
    targets_of: dict[Path, Path] = {}
    files, taken = {path.resolve() for path in inputs}, set()
    for path, name in inputs.items():
        ending = ".mp4" if media.is_video(path) else ".png"
        stems = chain([name.stem], (f"{name.stem}_{i}" for i in count(1)))
        places = (output / name.with_name(f"{stem}{ending}") for stem in stems)
        target = next(place for place in places if place not in taken)
        if target.resolve() in files:
            raise UserError(f"{target} would replace an input: choose another --output")
        taken.add(target)
        targets_of[path] = target
    return targets_of


def image_ids(paths: Sequence[Path]) -> dict[Path, int | str]:
    """Guess image ids from file names: their numbers, if all are distinct, as in COCO; else the
    names, or paths if names repeat."""
    stems = [path.stem.lstrip("0") or "0" for path in paths]
    if all(x.isascii() and x.isdecimal() for x in stems) and len({*stems}) == len(stems):
        return {path: int(stem) for path, stem in zip(paths, stems, strict=True)}
    are_unique = len({path.name for path in paths}) == len(paths)
    return {path: path.name if are_unique else str(path) for path in paths}


def beside_truth(
    predictor: Predictor, records: Sequence[dict], threshold: float
) -> tuple[list[np.ndarray], list[list], list[list]]:
    images = [read_image(record["file_name"]) for record in records]
    truth, predicted = [], []
    for record, detections in zip(records, predictor(images), strict=True):
        objects = [(a["bbox"], str(a["category_id"])) for a in record["annotations"]]
        truth.append([((x, y, x + w, y + h), text) for (x, y, w, h), text in objects])
        best = zip(*detections.above(threshold), strict=True)
        predicted.append([(box, f"{k} {score:.2f}") for box, score, k in best])
    return images, truth, predicted


def as_records(
    detections: Detections, ids: Sequence[int], names: Sequence[str], **fields: object
) -> list:
    """Return detections in COCO's format of results (``COCO.loadRes``).

    Args:
        ids: of the classes in the training data; if empty, classes count from 1.
        names: of the classes; may be empty.
        fields: added to each record.
    """
    return [
        {
            **fields,
            "category_id": ids[k] if len(ids) else int(k) + 1,
            **({"category_name": names[k]} if len(names) else {}),
            "bbox": [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(float(score), 4),
        }
        for (x1, y1, x2, y2), score, k in zip(*detections, strict=True)
    ]


def _annotate_images(
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
        for batch_images in media.batches(readable(), batch):
            results = predictor([image for _, image in batch_images])
            for (path, image), detections in zip(batch_images, results, strict=True):
                shown = detections.above(threshold)
                drawn = draw_detections(image, shown, predictor.names)
                if not cv2.imwrite(str(places[path]), drawn):
                    raise OSError(f"cannot write the picture {places[path]}")
                fields = {"image_id": ids[path], "file_name": str(path)}
                yield as_records(shown, predictor.ids, predictor.names, **fields)
            progress.update(len(batch_images))


def _annotate_video(
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
            for batch_frames in media.batches(chain([first], frames), batch):
                for frame, detections in zip(batch_frames, predictor(batch_frames), strict=True):
                    shown = detections.above(threshold)
                    # OpenCV silently drops frames of another size than the first.
                    writer.write(cv2.resize(draw_detections(frame, shown, predictor.names), size))
                    fields = {"file_name": str(path), "frame": number}
                    yield as_records(shown, predictor.ids, predictor.names, **fields)
                    number += 1
                progress.update(len(batch_frames))
        finally:
            writer.release()
    if film.count and number < film.count:
        counts = f"{film.count} frames by its header, {number} could be read"
        print(f"incomplete: {path}: {counts}", file=sys.stderr)


def _skip(problem: object) -> None:
    tqdm.write(f"skipped: {problem}", file=sys.stderr)  # without breaking a progress bar
