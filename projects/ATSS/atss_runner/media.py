"""Images and videos: found, read, written, with boxes. NumPy and OpenCV; PyAV if it is there."""

import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from fractions import Fraction
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from time import monotonic
from typing import Any, TypeVar

import cv2
import numpy as np

# fmt: off
VIDEOS = {
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".ogv", ".webm", ".wmv",
}
# BGR colours of classes, far apart from each other and from most photographs.
COLOURS = (
    (60, 76, 231), (219, 152, 52), (113, 204, 46), (18, 156, 243), (182, 89, 155),
    (156, 188, 26), (0, 84, 211), (193, 182, 255), (15, 196, 241), (128, 128, 0),
)
# fmt: on
FRAMES_PER_SECOND = 25.0  # of a video without a rate that codecs take

Item = TypeVar("Item")
# A file, or a stream: the number of a camera, or an address such as rtsp://.
Source = Path | str
ADDRESS = re.compile(r"[A-Za-z][\w+.-]+://")


class FileError(OSError):
    """A file that cannot be used; the message names it."""


def find_media(
    names: Iterable[str | Path], images: Container[str], output: Path
) -> tuple[dict[Source, Path], list[str]]:
    """Find named files and streams, and images and videos below named folders, each once.

    Args:
        images: endings of images in folders, such as ".png".
        output: folder of results, skipped inside other folders.

    Returns:
        {file or stream: its path within the named folder, or its name}; a sentence for each skipped
            input, and for a folder's other files.
    """
    inputs: dict[str, tuple[Source, Path]] = {}
    skipped = []
    for source in names:
        if _is_stream(source):
            inputs[str(source)] = str(source), Path(_name_stream(str(source)))
            continue
        path = Path(source)
        files = [path]
        try:
            if path.is_dir():
                files, problems = _find_in_folder(path, images, output)
                skipped += problems
            elif not path.exists():
                skipped.append(f"{path} does not exist")
                continue
        except OSError as error:
            skipped.append(f"{path} cannot be read: {error.strerror}")
            continue
        for file in files:
            name = file.relative_to(path) if file != path else Path(path.name)
            inputs.setdefault(os.path.abspath(file), (file, name))
    return dict(inputs.values()), list(dict.fromkeys(skipped))


def _find_in_folder(
    top: Path, images: Container[str], output: Path
) -> tuple[list[Path], list[str]]:
    media: list[Path] = []
    others: list[str] = []
    problems: list[str] = []

    def name_unreadable(error: OSError) -> None:
        problems.append(f"the folder {error.filename} cannot be read: {error.strerror}")

    # Links are followed, but each folder is entered once: links may form a circle.
    entered = {top.resolve()}
    for parent, folders, files in os.walk(top, onerror=name_unreadable, followlinks=True):
        subfolders = [Path(parent, name) for name in sorted(folders) if not name.startswith(".")]
        folders.clear()
        for folder in subfolders:
            target = folder.resolve()
            if target == output.resolve():
                problems.append(f"the folder {folder} is the --output")
            elif target not in entered:
                entered.add(target)
                folders.append(folder.name)
        for file in (Path(parent, name) for name in sorted(files) if not name.startswith(".")):
            if is_video(file) or file.suffix.lower() in images:
                media.append(file)
            else:
                others.append(str(file.relative_to(top)))
    if not media and not problems:
        problems.append(f"the folder {top} has no image and no video")
    if others:
        more = f", and {len(others) - 3} more" if len(others) > 3 else ""
        kind = f"files in {top} without the ending of an image or a video"
        problems.append(f"{kind} ({len(others)}): {', '.join(others[:3])}{more}")
    return media, problems


def is_video(source: Source) -> bool:
    """Whether a source has frames: a stream, or a file with the ending of a video."""
    return isinstance(source, str) or source.suffix.lower() in VIDEOS


def show_source(source: Source) -> str:
    """Return a source for messages and results: of an address without password and query."""
    if isinstance(source, str) and ADDRESS.match(source):
        return re.sub(r"(?<=://)[^/]*@", "", source).partition("?")[0]
    return str(source)


def _is_stream(source: str | Path) -> bool:
    is_camera = str(source).isascii() and str(source).isdecimal() and not os.path.exists(source)
    return is_camera or (isinstance(source, str) and ADDRESS.match(source) is not None)


def _name_stream(source: str) -> str:
    """Return a file name without an ending."""
    _, separator, place = show_source(source).partition("://")
    return re.sub(r"\W+", "_", place).strip("_") if separator else f"camera_{source}"


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


class Film:
    """The frames of a video, (H, W, 3) BGR. Its sound is ignored.

    Attributes:
        rate: frames per second.
        count: frames according to the header, or None.
        size: (height, width) of the first frame.
        is_live: whether it is a stream without an end.

    Raises:
        FileError: naming a source that cannot be opened, or has no frame.
    """

    def __init__(self, source: Source):
        is_camera = isinstance(source, str) and source.isdecimal()
        self.source = cv2.VideoCapture(int(source) if is_camera else str(source))  # type: ignore
        if not self.source.isOpened():
            problem = "it is damaged, or has an unknown format"
            if isinstance(source, str):
                problem = "no camera or stream answers"
            elif source.is_file() and not source.stat().st_size:
                problem = "it is empty"
            kind = "camera" if is_camera else "film"
            raise FileError(f"cannot open the {kind} {show_source(source)}: {problem}")
        rate = self.source.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0.01 <= rate <= 1000 else FRAMES_PER_SECOND
        self.count = max(int(self.source.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None
        self.is_live = isinstance(source, str) and self.count is None
        is_read, self.first = self.source.read()
        if not is_read:
            raise FileError(f"{show_source(source)} has no frame that can be read")
        self.size: tuple[int, int] = self.first.shape[:2]

    def __iter__(self) -> Iterator[np.ndarray]:
        is_read, frame = True, self.first
        try:
            while is_read:
                yield frame
                is_read, frame = self.source.read()
        finally:
            self.source.release()


def read_live(film: Film) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the newest frame of a live film at each request, and its position in a film of the same
    rate. Frames that arrive in between are left out: detections would lag behind.
    """
    newest: Queue[np.ndarray | None] = Queue(1)
    is_closed = Event()

    def replace(frame: np.ndarray | None) -> None:
        with suppress(Empty):
            newest.get_nowait()
        newest.put(frame)

    def read() -> None:
        try:
            with closing(iter(film)) as frames:  # type: ignore[type-var]
                for frame in frames:
                    if is_closed.is_set():
                        return
                    replace(frame)
        finally:
            if not is_closed.is_set():
                newest.put(None)

    # A thread that waits for a silent camera does not keep the process alive.
    Thread(target=read, daemon=True).start()
    start, position = monotonic(), -1
    try:
        while (frame := newest.get()) is not None:
            position = max(position + 1, int((monotonic() - start) * film.rate))
            yield position, frame
    finally:
        is_closed.set()
        with suppress(Empty):  # the thread may wait to put the end
            newest.get_nowait()


def open_writer(path: Path, rate: float, size: tuple[int, int]) -> "H264Writer | Mpeg4Writer":
    """Open a film for writing: H.264, which browsers play, if PyAV is installed; else MPEG-4.

    Args:
        rate: frames per second.
        size: (height, width); frames of other sizes are resized.

    Raises:
        FileError: if the codec refuses the size or the rate, or the file cannot be written.
    """
    try:
        return (H264Writer if find_spec("av") else Mpeg4Writer)(path, rate, size)
    except Exception as error:  # PyAV's own types
        with suppress(OSError):
            path.unlink()
        kind = f"{size[1]} x {size[0]} pixels and {rate:g} frames per second"
        raise FileError(f"cannot write the film {path} of {kind}: {error}") from error


class H264Writer:
    """Writer of an H.264 film, by PyAV."""

    def __init__(self, path: Path, rate: float, size: tuple[int, int]):
        import av

        self.size, self.path, self.frame_of = size, path, av.VideoFrame.from_ndarray
        self.container = av.open(str(path), "w", options={"movflags": "faststart"})
        # Fractions such as 30000/1001 are exact.
        exact_rate = Fraction(rate).limit_denominator(1001)
        self.stream: Any = self.container.add_stream("libx264", exact_rate, {"preset": "veryfast"})
        self.stream.height, self.stream.width = _even(size)
        self.stream.pix_fmt = "yuv420p"
        # BT.601 of limited range, into which FFmpeg converts; players guess by the height.
        self.stream.codec_context.colorspace, self.stream.codec_context.color_range = 6, 1
        self.container.start_encoding()

    def write(self, frame: np.ndarray) -> None:
        self._encode(self.frame_of(_with_even_sides(frame, self.size), "bgr24"))

    def close(self) -> None:
        self._encode(None)
        self.container.close()

    def _encode(self, frame: Any) -> None:
        try:
            self.container.mux(self.stream.encode(frame))
        except Exception as error:  # PyAV's own types
            raise OSError(f"cannot write the film {self.path}: {error}") from error


class Mpeg4Writer:
    """Writer of an MPEG-4 film, by OpenCV; browsers do not play it."""

    def __init__(self, path: Path, rate: float, size: tuple[int, int]):
        self.size = size
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self.writer = cv2.VideoWriter(str(path), code, rate, _even(size)[::-1])
        if not self.writer.isOpened():
            raise FileError("OpenCV's codec mp4v refuses it")

    def write(self, frame: np.ndarray) -> None:
        # OpenCV silently drops frames of another size.
        self.writer.write(_with_even_sides(frame, self.size))

    def close(self) -> None:
        self.writer.release()


def _even(size: tuple[int, int]) -> tuple[int, int]:
    """Round up: films store colours at half the height and width. OpenCV would round down."""
    return size[0] + size[0] % 2, size[1] + size[1] % 2


def _with_even_sides(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    bottom, right = size[0] % 2, size[1] % 2
    frame = cv2.resize(frame, size[::-1])
    return cv2.copyMakeBorder(frame, 0, bottom, 0, right, cv2.BORDER_REPLICATE)


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, classes: Sequence[int] | np.ndarray, labels: Sequence[str]
) -> np.ndarray:
    """Draw boxes and labels on a copy of an image.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (M, 4) (x1, y1, x2, y2) in pixels, best first and drawn last.
        classes: (M,) numbers, which choose colours.
    """
    drawn = np.ascontiguousarray(image).copy()
    # Lines of 1 pixel and letters of 10 pixels at 640, and in proportion.
    scale = max(max(image.shape[:2]) / 640, 0.6)
    thick, size = max(1, round(1.5 * scale)), 0.42 * scale
    best_last = list(zip(np.rint(boxes).astype(int).tolist(), classes, labels, strict=True))[::-1]
    for (x1, y1, x2, y2), k, _ in best_last:
        cv2.rectangle(drawn, (x1, y1), (x2, y2), _colour(k), thick)
    for (x1, y1, _, _), k, label in best_last:
        (width, height), below = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        # Above the box if there is room, else inside it.
        top = y1 - height - below - thick
        top = top if top >= 0 else y1
        x = min(x1, max(image.shape[1] - width, 0))
        cv2.rectangle(drawn, (x, top), (x + width, top + height + below), _colour(k), -1)
        ink = (0, 0, 0) if sum(_colour(k)) > 380 else (255, 255, 255)
        origin = (x, top + height)
        cv2.putText(drawn, label, origin, cv2.FONT_HERSHEY_SIMPLEX, size, ink, 1, cv2.LINE_AA)
    return drawn


def _colour(k: int) -> tuple[int, int, int]:
    return COLOURS[int(k) % len(COLOURS)]
