"""Detections drawn on images and videos, and yielded as COCO records."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from . import media
from .detections import as_records, draw_detections
from .images import too_thin


class Silent:
    """A progress bar that shows nothing."""

    def __init__(self, **_: Any):
        pass

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass


def annotate(
    predictor: Any,
    places: Mapping[Path, Path],
    threshold: float,
    batch: int = 4,
    *,
    read: Callable[[str], np.ndarray],
    progress: Callable[..., Any] = Silent,
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
    images = [path for path in places if not media.is_video(path)]
    if images:
        yield from _annotate_images(predictor, images, places, threshold, batch, read, progress)
    for path in filter(media.is_video, places):
        yield from _annotate_video(predictor, path, places[path], threshold, batch, progress)


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


def _annotate_images(
    predictor: Any,
    paths: Sequence[Path],
    places: Mapping[Path, Path],
    threshold: float,
    batch: int,
    read: Callable[[str], np.ndarray],
    progress: Callable[..., Any],
) -> Iterator[list[dict]]:
    def readable() -> Iterator[tuple[Path, np.ndarray]]:
        for path in paths:
            try:
                yield path, read(str(path))
            except (ValueError, OSError) as error:
                _skip(error)

    ids = image_ids(paths)
    with progress(total=len(paths), unit="image") as bar:
        for batch_images in media.batches(readable(), batch):
            results = predictor([image for _, image in batch_images])
            for (path, image), detections in zip(batch_images, results, strict=True):
                shown = detections.above(threshold)
                drawn = draw_detections(image, shown, predictor.names)
                if not cv2.imwrite(str(places[path]), drawn):
                    raise OSError(f"cannot write the picture {places[path]}")
                fields = {"image_id": ids[path], "file_name": str(path)}
                yield as_records(shown, predictor.ids, predictor.names, **fields)
            bar.update(len(batch_images))


def _annotate_video(
    predictor: Any,
    path: Path,
    target: Path,
    threshold: float,
    batch: int,
    progress: Callable[..., Any],
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
    if thin := too_thin(size[1], size[0], *predictor.size):
        _skip(f"the film {path} {thin}")
        return
    writer = film.writer(target, size)
    if not writer.isOpened():
        _skip(f"cannot write the film {target} of {size[0]} x {size[1]} pixels")
        return
    number = 0
    with progress(total=film.count, unit="frame", desc=path.name) as bar:
        try:
            for batch_frames in media.batches(chain([first], frames), batch):
                for frame, detections in zip(batch_frames, predictor(batch_frames), strict=True):
                    shown = detections.above(threshold)
                    # OpenCV silently drops frames of another size than the first.
                    writer.write(cv2.resize(draw_detections(frame, shown, predictor.names), size))
                    fields = {"file_name": str(path), "frame": number}
                    yield as_records(shown, predictor.ids, predictor.names, **fields)
                    number += 1
                bar.update(len(batch_frames))
        finally:
            writer.release()
    if film.count and number < film.count:
        counts = f"{film.count} frames by its header, {number} could be read"
        print(f"incomplete: {path}: {counts}", file=sys.stderr)


def _skip(problem: object) -> None:
    print(f"skipped: {problem}", file=sys.stderr)
