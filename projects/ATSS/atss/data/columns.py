"""Cache of checked labels, in files that all processes map into memory: labels are read once per
machine, and again if they change.

A data set is a folder below FVCORE_CACHE, named by a digest of its labels and of how they were
read: a line of json for each image, and the arrays of COLUMNS.
"""

import atexit
import json
import logging
import mmap
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import numpy as np
from iopath.common.file_io import file_lock, get_cache_dir
from portalocker.exceptions import LockException

from ..deprecated import renamed_names
from ..errors import UserError
from ..labels.formats import Reading, sources

__getattr__ = renamed_names(__name__)

COLUMNS = ("sizes", "counts", "classes", "ends")
# Seconds. A file that changed later can change again within one tick of its file system's clock:
# its content is compared, not its time.
RECENT = 2
# Days after which a folder is removed: since it was last opened, or if it was never finished.
MAX_AGE, MAX_AGE_UNFINISHED = 30, 1
UNFINISHED = "unfinished-"
KEY = re.compile("[0-9a-f]{64}")
# Raised when opening a folder that does not exist or is damaged.
NOT_COMPLETE = (OSError, ValueError, EOFError)


class Columns(Sequence[dict]):
    """N images with annotations, among them M objects that are no crowds.

    Attributes:
        about: metadata, and the json without images and annotations.
        sizes: (N, 2) int32 width and height in pixels.
        counts: (N,) int32 objects of each image.
        classes: (M,) int32 index of each object's category, by id.
        ends: (N,) int64 end of each image's line, in bytes.
    """

    sizes: np.ndarray
    counts: np.ndarray
    classes: np.ndarray
    ends: np.ndarray

    def __init__(self, folder: str):
        """Map the files of a folder.

        Raises:
            OSError, ValueError, EOFError: if the folder is missing or incomplete.
        """
        self.folder = folder
        self.about: dict = json.loads(Path(folder, "about.json").read_bytes())
        for name in COLUMNS:
            column = np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r")
            setattr(self, name, column)
        self._lines = np.memmap(os.path.join(folder, "images.jsonl"), np.uint8, "r")
        if len(self._lines) != self.ends[-1]:
            raise ValueError(f"{folder} is not complete")

    def __reduce__(self) -> tuple:
        return Columns, (self.folder,)  # another process maps the files instead of copying them

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> dict:  # type: ignore[override]
        start = self.ends[i - 1] if i else 0
        return json.loads(self._lines[start : self.ends[i]].tobytes())

    def file_names(self) -> list[str]:
        return json.loads(Path(self.folder, "names.json").read_bytes())

    def content(self) -> dict:
        images = [self[i] for i in range(len(self))]
        annotations = [x for image in images for x in image.pop("annotations")]
        annotations.sort(key=lambda x: x["id"])
        return {**self.about["content"], "images": images, "annotations": annotations}

    def provide_json(self) -> str:
        """Return the path of a json of the content, written at first use."""
        path = os.path.join(self.folder, "labels.json")
        if not os.path.exists(path):
            content = self.content()
            if not content["annotations"]:  # a test set, whose labels a server has
                del content["annotations"]
            unfinished = f"{path}.{uuid4().hex}"
            with open(unfinished, "w") as file:
                json.dump(content, file)
            os.replace(unfinished, path)
        return path


def open_columns(
    annotations: str, images: str, reading: Reading, reader: Callable[[], tuple[dict, dict]]
) -> Columns:
    """Open labels in the cache, or read and write them.

    Args:
        annotations, images, reading: see :func:`~atss.labels.formats.read_labels`.
        reader: returns content (see :func:`~atss.labels.coco.learnable`) and ``about``.

    Raises:
        UserError: as ``reader``; if labels change meanwhile; if the cache is not writable.
    """
    folder = cache_folder()
    changed_before = time.time_ns() - RECENT * 10**9
    try:
        key = _find_key(folder, annotations, images, reading, changed_before)
    except (OSError, ValueError):
        reader()  # raises a UserError
        raise
    path = os.path.join(folder, key)
    with suppress(*NOT_COMPLETE):
        return _open(path)
    with ExitStack() as stack:
        with suppress(LockException, OSError):  # without locks every process reads the labels
            stack.enter_context(file_lock(path))
        with suppress(*NOT_COMPLETE):
            return _open(path)  # another process may have written it meanwhile
        content, about = reader()
        if _find_key(folder, annotations, images, reading, changed_before) != key:
            raise UserError(f"{annotations}: the labels changed while they were read")
        with suppress(*NOT_COMPLETE):
            return _open(path)  # as above, on a file system without locks
        try:
            shutil.rmtree(path, ignore_errors=True)  # damaged
            _write(folder, key, content, about)
        except OSError as error:
            raise UserError(
                f"cannot write the labels of {annotations} into {folder}: {error.strerror}; "
                "set FVCORE_CACHE to another folder"
            ) from error
        return _open(path)


def _open(path: str) -> Columns:
    columns = Columns(path)
    with suppress(OSError):
        os.utime(path)  # _remove_old compares the time
    return columns


def cache_folder() -> str:
    """Return the cache below FVCORE_CACHE (default ~/.torch/iopath_cache), or this process's
    temporary folder if it is not writable."""
    folder = os.path.join(get_cache_dir(), "atss_labels")
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return _temporary_folder(folder)


@cache
def _temporary_folder(read_only: str) -> str:
    folder = tempfile.mkdtemp(prefix="atss_labels_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logging.getLogger(__name__).warning(
        f"cannot write {read_only}: this process keeps labels in {folder}; set FVCORE_CACHE to "
        "another folder"
    )
    return folder


def _write(folder: str, key: str, content: dict, about: dict) -> None:
    """Write into a temporary folder, then rename it: a killed writer leaves nothing to read."""
    unfinished = _name_unfinished(folder)
    os.mkdir(unfinished)
    try:
        _write_files(unfinished, content, about)
        for name in os.listdir(unfinished):
            with open(os.path.join(unfinished, name), "r+b") as file:
                os.fsync(file.fileno())
        with suppress(OSError):  # another process was faster
            os.rename(unfinished, os.path.join(folder, key))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _remove_old(folder)


def _name_unfinished(folder: str) -> str:
    return os.path.join(folder, f"{UNFINISHED}{uuid4().hex}")


def _write_files(folder: str, content: dict, about: dict) -> None:
    annotations_of = defaultdict(list)
    for annotation in content["annotations"]:
        annotations_of[annotation["image_id"]].append(annotation)
    ids = sorted(category["id"] for category in content["categories"])
    position = {category_id: i for i, category_id in enumerate(ids)}
    images, classes, counts, ends = content["images"], [], [], []
    with open(os.path.join(folder, "images.jsonl"), "wb") as file:
        for image in images:
            annotations = annotations_of[image["id"]]
            file.write(json.dumps({**image, "annotations": annotations}).encode() + b"\n")
            ends.append(file.tell())
            objects = [position[x["category_id"]] for x in annotations if not x["iscrowd"]]
            counts.append(len(objects))
            classes += objects
    sizes = [(image["width"], image["height"]) for image in images]
    rest = {k: x for k, x in content.items() if k not in ("images", "annotations")}
    for name, values in zip(COLUMNS, (sizes, counts, classes, ends), strict=True):
        dtype = np.int64 if name == "ends" else np.int32
        np.save(os.path.join(folder, f"{name}.npy"), np.array(values, dtype=dtype))
    names = json.dumps([image["file_name"] for image in images])
    Path(folder, "names.json").write_text(names)
    Path(folder, "about.json").write_text(json.dumps({**about, "content": rest}))


def _remove_old(folder: str) -> None:
    for entry in os.scandir(folder):
        days = MAX_AGE_UNFINISHED if entry.name.startswith(UNFINISHED) else MAX_AGE
        with suppress(OSError):  # another process may remove it as well
            if entry.stat().st_mtime < time.time() - days * 86400:
                remove = shutil.rmtree if entry.is_dir() else os.remove
                remove(entry.path)


def _find_key(
    folder: str, annotations: str, images: str, reading: Reading, changed_before: int
) -> str:
    """Return a digest of labels, reading and code. A json counts by its content, to which an index
    file maps its times; a folder counts by the times of its files."""
    files, texts, content_only = sources(annotations, images)
    context = [_code(), repr(reading), *texts]
    marks = [_mark(file, changed_before) for file in files]
    if not content_only:
        return _digest([*context, *marks])
    image_dir = os.path.abspath(images)
    index = os.path.join(folder, f"{_digest([*context, image_dir, *marks])}.key")
    with suppress(OSError, ValueError):
        os.utime(index)
        key = Path(index).read_text()
        if KEY.fullmatch(key):  # it becomes a path, and other users may write into the folder
            return key
    content, has_backslashes = _digest_of_file(annotations)
    # Backslashes in file names are read as the folder of images needs it.
    key = _digest([*context, content, image_dir if has_backslashes else ""])
    unfinished = _name_unfinished(folder)
    with open(unfinished, "w") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, index)
    return key


@cache
def _code() -> str:
    data = Path(__file__).parent
    files = [*data.glob("*.py"), *(data.parent / "labels").glob("*.py")]
    return _digest(x.read_text() for x in sorted(files))


def _digest(texts: Iterable[str]) -> str:
    digest = sha256()
    for text in texts:
        digest.update(f"{text}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _mark(file: str, changed_before: int) -> str:
    """Return a text that changes with a file: its content, if it changed after ``changed_before``,
    in ns since 1970."""
    try:
        x = os.stat(file)
    except OSError:
        return f"{file} absent"
    if max(x.st_mtime_ns, x.st_ctime_ns) >= changed_before and os.path.isfile(file):
        return f"{file} {_digest_of_file(file)[0]}"
    return f"{file} {x.st_size} {x.st_mtime_ns} {x.st_ctime_ns} {x.st_ino}"


def _digest_of_file(path: str) -> tuple[str, bool]:
    """Return a digest of a json's content, and whether it has backslashes."""
    with open(path, "rb") as file:
        if not os.path.getsize(path):
            return _digest([]), False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            escapes = (b"\\\\", b"\\u005c", b"\\u005C")
            return sha256(content).hexdigest(), any(content.find(x) >= 0 for x in escapes)
