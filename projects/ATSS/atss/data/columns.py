"""Labels that were read and checked, in files that all processes map into memory: read once per
machine, and again only if they have changed.

Each data set is a folder below FVCORE_CACHE, named by a digest of what was read and how: a line of
json for each image, which keeps all that the labels contain, and NumPy columns of what is computed
over all images.
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
# A file that changed less than so many seconds ago can change again within one tick of its file
# system's clock: its content is compared, not its time.
RECENT = 2
# Days after which a folder that no process has opened since is removed, and one that was not
# finished.
KEPT, UNFINISHED_KEPT = 30, 1
UNFINISHED = "unfinished-"
KEY = re.compile("[0-9a-f]{64}")
# What opening a folder raises that is not there, or damaged.
NOT_COMPLETE = (OSError, ValueError, EOFError)


class Columns(Sequence[dict]):
    """N images with their annotations, of which M are objects that training learns (no crowds).

    Attributes:
        about: what else is known of the data set.
        sizes: (N, 2) int32 width and height in pixels.
        counts: (N,) int32 number of objects of each image.
        classes: (M,) int32 position of each object's category among those sorted by id.
    """

    sizes: np.ndarray
    counts: np.ndarray
    classes: np.ndarray
    ends: np.ndarray  # (N,) int64 of each image's line, in bytes

    def __init__(self, folder: str):
        """
        Raises:
            OSError, ValueError, EOFError: if the folder is not there, or not complete.
        """
        self.folder = folder
        self.about: dict = json.loads(Path(folder, "about.json").read_bytes())
        for name in COLUMNS:
            column = np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r")
            setattr(self, name, column)
        self._lines = np.memmap(os.path.join(folder, "images.jsonl"), np.uint8, "r")
        if len(self._lines) != self.ends[-1]:
            raise UserError(f"{folder} is not complete")

    def __reduce__(self) -> tuple:
        return Columns, (self.folder,)  # another process maps the files, and copies nothing

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> dict:  # type: ignore[override]
        """An image of the json, its "annotations" among its fields."""
        start = self.ends[i - 1] if i else 0
        return json.loads(self._lines[start : self.ends[i]].tobytes())

    def file_names(self) -> list[str]:
        return json.loads(Path(self.folder, "names.json").read_bytes())

    def content(self) -> dict:
        """What :func:`~atss.labels.coco.learnable` gave."""
        images = [self[i] for i in range(len(self))]
        annotations = [x for image in images for x in image.pop("annotations")]
        annotations.sort(key=lambda x: x["id"])
        return {**self.about["content"], "images": images, "annotations": annotations}

    def provide_json(self) -> str:
        """The path of a json of the content, which one process of the machine writes."""
        path = os.path.join(self.folder, "labels.json")
        if not os.path.exists(path):
            content = self.content()
            if not content["annotations"]:  # detections are written for a server to evaluate
                del content["annotations"]
            unfinished = f"{path}.{uuid4().hex}"
            with open(unfinished, "w") as file:
                json.dump(content, file)
            os.replace(unfinished, path)
        return path


def open_columns(
    annotations: str, images: str, reading: Reading, read: Callable[[], tuple[dict, dict]]
) -> Columns:
    """The columns of labels, which are read if these files have not been read before.

    Args:
        annotations, images, reading: as of :func:`~atss.labels.formats.read_labels`.
        read: returns content as of :func:`~atss.labels.coco.learnable`, and ``about``.

    Raises:
        ValueError: as ``read``; if the labels change while they are read; or naming the folder, if
            they cannot be written.
    """
    folder = cache_folder()
    changed_before = time.time_ns() - RECENT * 10**9
    try:
        key = _find_key(folder, annotations, images, reading, changed_before)
    except (OSError, ValueError):
        read()  # has a sentence for it
        raise
    path = os.path.join(folder, key)
    with suppress(*NOT_COMPLETE):
        return _open(path)
    with ExitStack() as stack:
        with suppress(LockException, OSError):  # without locks each process reads for itself
            stack.enter_context(file_lock(path))
        with suppress(*NOT_COMPLETE):
            return _open(path)  # which another process has written meanwhile
        content, about = read()
        if _find_key(folder, annotations, images, reading, changed_before) != key:
            raise UserError(f"{annotations}: the labels changed while they were read")
        with suppress(*NOT_COMPLETE):
            return _open(path)  # as above, on a file system without locks
        try:
            shutil.rmtree(path, ignore_errors=True)  # if it is there, it is damaged
            _write(folder, key, content, about)
        except OSError as error:
            raise UserError(
                f"cannot write the labels of {annotations} into {folder}: {error.strerror} "
                "(FVCORE_CACHE names another folder)"
            ) from error
        return _open(path)


def _open(path: str) -> Columns:
    columns = Columns(path)
    with suppress(OSError):
        os.utime(path)  # the time at which it was opened last
    return columns


def cache_folder() -> str:
    """Where labels are kept: below FVCORE_CACHE, which is ~/.torch/iopath_cache by default. A
    temporary folder, for this process alone, if that cannot be written."""
    folder = os.path.join(get_cache_dir(), "atss_labels")
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return _temporary_folder(folder)


@cache
def _temporary_folder(instead_of: str) -> str:
    folder = tempfile.mkdtemp(prefix="atss_labels_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logging.getLogger(__name__).warning(
        "%s cannot be written: this process keeps labels in %s (FVCORE_CACHE names another folder)",
        *(instead_of, folder),
    )
    return folder


def _write(folder: str, key: str, content: dict, about: dict) -> None:
    """Under a name of its own until it is complete: a writer that is killed leaves nothing that is
    read."""
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
            own = [position[x["category_id"]] for x in annotations if not x["iscrowd"]]
            counts.append(len(own))
            classes += own
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
        days = UNFINISHED_KEPT if entry.name.startswith(UNFINISHED) else KEPT
        with suppress(OSError):  # another process may remove it as well
            if entry.stat().st_mtime < time.time() - days * 86400:
                remove = shutil.rmtree if entry.is_dir() else os.remove
                remove(entry.path)


def _find_key(
    folder: str, annotations: str, images: str, reading: Reading, changed_before: int
) -> str:
    """A digest of the labels, of how they are read, and of the code that reads them. That of a json
    is of its content, kept beside the file's times; that of a folder is of the times of its files.

    Args:
        changed_before: as of :func:`_mark`.

    Raises:
        OSError, ValueError: if there is nothing to read.
    """
    texts, files = sources(annotations, images)
    how = [_code(), repr(reading), *texts]
    marks = [_mark(file, changed_before) for file in files]
    if texts:
        return _digest([*how, *marks])
    image_dir = os.path.abspath(images)
    index = os.path.join(folder, f"{_digest([*how, image_dir, *marks])}.key")
    with suppress(OSError, ValueError):
        os.utime(index)
        key = Path(index).read_text()
        if KEY.fullmatch(key):  # nothing else becomes a path, in a folder that others may write
            return key
    content, has_backslashes = _digest_of_file(annotations)
    # Backslashes in names of images are read as the folder of images has them.
    key = _digest([*how, content, image_dir if has_backslashes else ""])
    unfinished = _name_unfinished(folder)
    with open(unfinished, "w") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, index)
    return key


@cache
def _code() -> str:
    """Return a digest of the modules in labels/, which read labels, and in data/."""
    data = Path(__file__).parent
    files = [*data.glob("*.py"), *(data.parent / "labels").glob("*.py")]
    return _digest(x.read_text() for x in sorted(files))


def _digest(texts: Iterable[str]) -> str:
    digest = sha256()
    for text in texts:
        digest.update(f"{text}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _mark(file: str, changed_before: int) -> str:
    """What differs once a file has changed.

    Args:
        changed_before: nanoseconds since 1970; of what is younger the content is compared.
    """
    try:
        x = os.stat(file)
    except OSError:
        return f"{file} absent"
    if max(x.st_mtime_ns, x.st_ctime_ns) >= changed_before and os.path.isfile(file):
        return f"{file} {_digest_of_file(file)[0]}"
    return f"{file} {x.st_size} {x.st_mtime_ns} {x.st_ctime_ns} {x.st_ino}"


def _digest_of_file(path: str) -> tuple[str, bool]:
    """That of its content, and whether this has backslashes, as json writes them."""
    with open(path, "rb") as file:
        if not os.path.getsize(path):
            return _digest([]), False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = max(content.find(b"\\\\"), content.find(b"\\u005c"), content.find(b"\\u005C"))
            return sha256(content).hexdigest(), found >= 0


# ------------------------------------------------------------------------------------------------
# In Detectron2's format
# ------------------------------------------------------------------------------------------------
