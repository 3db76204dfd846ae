"""Detections drawn on images and videos, and yielded as COCO records."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

from . import media
from .detections import as_records, draw_detections
from .images import too_thin

# An image, the function that writes its picture, and fields of its records.
Frame = tuple[np.ndarray, Callable[[np.ndarray], None], Mapping[str, object]]


def no_progress(**_: Any) -> Any:
    """Return a progress bar that shows nothing."""
    return nullcontext(SimpleNamespace(update=lambda count: None))


def annotate(
    predictor: Any,
    places: Mapping[Path, Path],
    threshold: float,
    batch: int = 4,
    *,
    read: Callable[[str], np.ndarray],
    progress: Callable[..., Any] = no_progress,
) -> Iterator[list[dict]]:
    """Draw detections, and yield the records of each image or frame, with "file_name" and, for a
    video, "frame". Unreadable inputs are listed on standard error.

    Args:
        predictor: list of (H, W, 3) BGR images -> list of :class:`Detections`; with ``names`` and
            ``ids`` of the classes.
        places: {input: picture to write}, from :func:`targets`, in folders that exist.
        threshold: least score of detections.
        read: path -> (H, W, 3) BGR image.
        progress: class of progress bars, such as tqdm.

    Raises:
        OSError: if a picture cannot be written.
    """

    def detect(frames: Iterable[Frame], **bar_options: object) -> Iterator[list[dict]]:
        with progress(**bar_options) as bar:
            for part in media.batches(frames, batch):
                results = predictor([image for image, _, _ in part])
                for (image, write, fields), detections in zip(part, results, strict=True):
                    shown = detections.above(threshold)
                    write(draw_detections(image, shown, predictor.names))
                    yield as_records(shown, predictor.ids, predictor.names, **fields)
                bar.update(len(part))

    images = {path: target for path, target in places.items() if not media.is_video(path)}
    if images:
        frames = _images(images, predictor.size, read, progress)
        yield from detect(frames, total=len(images), unit="image")
    for path in filter(media.is_video, places):
        try:
            film = media.Film(path)
            if thin := too_thin(*film.size, *predictor.size):
                raise media.FileError(f"the film {path} {thin}")
            writer = media.open_writer(places[path], film.rate, film.size)
        except OSError as error:
            _skip(error, progress)
            continue
        number, name = 0, str(path)
        frames = (
            (frame, writer.write, {"file_name": name, "frame": i}) for i, frame in enumerate(film)
        )
        with closing(writer):
            for records in detect(frames, total=film.count, unit="frame", desc=path.name):
                yield records
                number += 1
        if film.count and number < film.count:
            counts = f"{film.count} frames by its header, {number} could be read"
            print(f"incomplete: {path}: {counts}", file=sys.stderr)


def targets(inputs: Mapping[Path, Path], output: Path) -> dict[Path, Path]:
    """Return {input: picture or video to write}, numbered if several inputs have one name.

    Raises:
        FileError: if a target would replace an input.
    """
    targets_of: dict[Path, Path] = {}
    files, taken = {path.resolve() for path in inputs}, set()
    for path, name in inputs.items():
        ending = ".mp4" if media.is_video(path) else ".png"
        stems = chain([name.stem], (f"{name.stem}_{i}" for i in count(1)))
        places = (output / name.with_name(f"{stem}{ending}") for stem in stems)
        target = next(place for place in places if place not in taken)
        if target.resolve() in files:
            raise media.FileError(f"{target} would replace an input: choose another --output")
        taken.add(target)
        targets_of[path] = target
    return targets_of


def image_ids(paths: Sequence[Path]) -> dict[Path, int | str]:
    """Guess the ids of images in a json: the numbers in their names, if all are distinct numbers,
    as in COCO; else their names, or paths if names repeat."""
    stems = [path.stem.lstrip("0") or "0" for path in paths]
    if all(x.isascii() and x.isdecimal() for x in stems) and len({*stems}) == len(stems):
        return {path: int(stem) for path, stem in zip(paths, stems, strict=True)}
    are_unique = len({path.name for path in paths}) == len(paths)
    return {path: path.name if are_unique else str(path) for path in paths}


def _images(
    places: Mapping[Path, Path],
    size: tuple[int, int],
    read: Callable[[str], np.ndarray],
    progress: Callable[..., Any],
) -> Iterator[Frame]:
    ids = image_ids([*places])
    for path, target in places.items():
        try:
            image = read(str(path))
            height, width = image.shape[:2]
            if thin := too_thin(height, width, *size):
                raise media.FileError(f"{path} {thin}")
        except (ValueError, OSError) as error:
            _skip(error, progress)
            continue
        fields = {"image_id": ids[path], "file_name": str(path)}
        yield image, partial(_write_picture, target), fields


def _write_picture(target: Path, picture: np.ndarray) -> None:
    if not cv2.imwrite(str(target), picture):
        raise OSError(f"cannot write the picture {target}")


def _skip(problem: object, progress: Callable[..., Any]) -> None:
    """Print above the bar: tqdm's own function clears the bar's line first."""
    getattr(progress, "write", print)(f"skipped: {problem}", file=sys.stderr)
