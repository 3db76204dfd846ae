"""Detections drawn on images and videos, and yielded."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cv2
import numpy as np

from . import media
from .detections import Detections, draw_detections
from .images import too_thin

# Formats that OpenCV writes in colour: pictures of such images keep them, others become PNG.
# fmt: off
KEPT = {".bmp", ".dib", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# fmt: on


class Frame(NamedTuple):
    """An image, or a frame of a film.

    Attributes:
        pixels: (H, W, 3) BGR.
        write: function that writes its picture.
        source, target, fields: as in :class:`Annotated`.
    """

    pixels: np.ndarray
    write: Callable[[np.ndarray], None]
    source: media.Source
    target: Path
    fields: Mapping[str, Any]


class Annotated(NamedTuple):
    """The drawn detections of an image, or of a frame of a film.

    Attributes:
        source: the image or film.
        target: its picture, or the film with all its pictures.
        size: (height, width).
        fields: of its records: "image_id" and "file_name", or "file_name" and "frame".
        highest: score of all detections; 0 without one.
    """

    source: media.Source
    target: Path
    size: tuple[int, int]
    detections: Detections
    fields: Mapping[str, Any]
    highest: float


def no_progress(**_: Any) -> Any:
    """Return a progress bar that shows nothing."""
    return nullcontext(SimpleNamespace(update=lambda count: None))


def annotate(
    predictor: Any,
    places: Mapping[media.Source, Path],
    threshold: float | np.ndarray,
    batch: int = 4,
    *,
    progress: Callable[..., Any] = no_progress,
) -> Iterator[Annotated]:
    """Draw detections, and yield those of each image or frame. Unreadable inputs are listed on
    standard error.

    Args:
        predictor: list of images -> list of :class:`Detections`; with ``names`` of the classes,
            ``read`` (path -> image), ``picture`` (image -> (H, W, 3) uint8 BGR) and ``planes``
            (None if images are BGR; films have no planes and are skipped).
        places: {input: picture to write}, from :func:`targets`, in folders that exist.
        threshold: least score of detections; or (K,) one for each class.
        progress: class of progress bars, such as tqdm.

    Raises:
        OSError: if a picture cannot be written.
    """

    def detect(frames: Iterable[Frame], batch: int, **bar_options: object) -> Iterator[Annotated]:
        with progress(**bar_options) as bar:
            for part in media.batches(frames, batch):
                results = predictor([frame.pixels for frame in part])
                for frame, found in zip(part, results, strict=True):
                    shown = found.above(threshold)
                    frame.write(
                        draw_detections(predictor.picture(frame.pixels), shown, predictor.names)
                    )
                    highest = float(found.scores.max(initial=0))
                    place = (frame.source, frame.target, frame.pixels.shape[:2])
                    yield Annotated(*place, shown, frame.fields, highest)
                bar.update(len(part))

    images = {Path(x): target for x, target in places.items() if not media.is_video(x)}
    if images:
        frames = _images(images, predictor.size, predictor.read, progress)
        yield from detect(frames, batch, total=len(images), unit="image")
    for source in filter(media.is_video, places):
        name, target = media.show_source(source), places[source]
        try:
            if predictor.planes is not None:
                raise media.FileError(f"the film {name} has no planes (INPUT.FORMAT planes)")
            film = media.Film(source)
            if thin := too_thin(*film.size, *predictor.size):
                raise media.FileError(f"the film {name} {thin}")
            writer = media.open_writer(target, film.rate, film.size)
        except OSError as error:
            _skip(error, progress)
            continue
        number = 0
        with closing(writer):
            frames = _frames(film, writer, source, target)
            # One by one of a live film: the others of a batch would be old.
            size = 1 if film.is_live else batch
            for result in detect(frames, size, total=film.count, unit="frame", desc=target.name):
                yield result
                number += 1
        if film.count and number < film.count:
            counts = f"{film.count} frames by its header, {number} could be read"
            print(f"incomplete: {name}: {counts}", file=sys.stderr)


def targets(inputs: Mapping[media.Source, Path], output: Path) -> dict[media.Source, Path]:
    """Return {input: picture or video to write}, numbered if several inputs have one name, whatever
    its ending. A picture keeps the format of its image if OpenCV writes it.

    Raises:
        FileError: if a target would replace an input.
    """
    targets_of: dict[media.Source, Path] = {}
    files, taken = {path.resolve() for path in inputs if isinstance(path, Path)}, set()
    for source, name in inputs.items():
        is_video = media.is_video(source)
        ending = name.suffix if name.suffix.lower() in KEPT else ".png"
        stems = chain([name.stem], (f"{name.stem}_{i}" for i in count(1)))
        places = (output / name.with_name(stem) for stem in stems)
        place = next(x for x in places if (x, is_video) not in taken)
        taken.add((place, is_video))
        target = place.with_name(f"{place.name}{'.mp4' if is_video else ending}")
        if target.resolve() in files:
            raise media.FileError(f"{target} would replace an input: choose another --output")
        targets_of[source] = target
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
            pixels = read(str(path))
            height, width = pixels.shape[:2]
            if thin := too_thin(height, width, *size):
                raise media.FileError(f"{path} {thin}")
        except (ValueError, OSError) as error:
            _skip(error, progress)
            continue
        fields = {"image_id": ids[path], "file_name": str(path)}
        yield Frame(pixels, partial(_write_picture, target), path, target, fields)


def _frames(film: media.Film, writer: Any, source: media.Source, target: Path) -> Iterator[Frame]:
    written = 0

    def write(position: int, picture: np.ndarray) -> None:
        nonlocal written
        # A live film goes on while detection takes its time: a picture fills the gap before it.
        for _ in range(written, position + 1):
            writer.write(picture)
        written = position + 1

    positions = media.read_live(film) if film.is_live else enumerate(film)
    for i, pixels in positions:
        fields = {"file_name": media.show_source(source), "frame": i}
        yield Frame(pixels, partial(write, i), source, target, fields)


def _write_picture(target: Path, picture: np.ndarray) -> None:
    if not cv2.imwrite(str(target), picture):
        raise OSError(f"cannot write the picture {target}")


def _skip(problem: object, progress: Callable[..., Any]) -> None:
    """Print above the bar: tqdm's own function clears the bar's line first."""
    getattr(progress, "write", print)(f"skipped: {problem}", file=sys.stderr)
