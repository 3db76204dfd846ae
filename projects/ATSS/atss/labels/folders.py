"""What the readers of folders of labels share: one file of labels beside every image."""

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from .findings import Finding
from .headers import read_header

# What is taken for an image in a folder: raster formats that Pillow reads, and those that others
# read. Files that Pillow cannot read are errors, but never overlooked.
# fmt: off
SUFFIXES = {
    ".apng", ".avif", ".bmp", ".dds", ".dib", ".gif", ".icns", ".ico", ".j2c", ".j2k", ".jfif",
    ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm",
    ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras", ".sgi", ".tga", ".tif", ".tiff",
    ".webp", ".xbm", ".xpm",
    ".cr2", ".dng", ".heic", ".heif", ".jxl", ".nef",  # read by plugins of Pillow, if at all
}
# fmt: on
# Files that name the classes of YOLO's labels, one a line: of Label Studio and LabelImg, of CVAT,
# and of Roboflow.
NAMES_FILES = ("classes.txt", "obj.names", "_darknet.labels")
# One split under three names.
VALIDATION = ("val", "validation", "valid")
# Mostly waiting for a disk: more threads than processors.
THREADS = min(32, 4 * (os.cpu_count() or 1))
# Kind of a finding -> the places where it is so, for people.
Places = dict[str, list[str]]


class Split:
    """A split while it is read: content in COCO's format, and what is to be said of it.

    Args:
        folder: in which file names begin.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self.found: Places = defaultdict(list)

    def add_image(self, image: Path, size: tuple[int, int]) -> None:
        """The image to which the objects that follow belong; its size is (width, height)."""
        entry = {"id": len(self.images) + 1, "file_name": name_in(self.folder, image)}
        self.images.append({**entry, "width": size[0], "height": size[1]})

    def add_object(self, category: int, box: list[float], **more: int) -> None:
        """An object of the last image; its box is [x, y, width, height] in pixels."""
        # As many digits as Detectron2 writes for the evaluation.
        box = [round(x, 3) for x in box]
        ids = {"id": len(self.annotations) + 1, "image_id": len(self.images)}
        what = {"category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        self.annotations.append({**ids, **what, **more})

    def result(self, names: Mapping[int, str]) -> tuple[dict, list[Finding]]:
        """The content, with categories of these names by id, and the findings."""
        content = {"images": self.images, "annotations": self.annotations}
        content["categories"] = [{"id": i, "name": name} for i, name in names.items()]
        found = {kind: places for kind, places in self.found.items() if places}
        return content, [Finding(k, range(len(p)), p.__getitem__) for k, p in found.items()]


def names_of(split: str) -> tuple[str, ...]:
    """Names under which a split may be stored, the given one first."""
    return (split, *VALIDATION) if split in VALIDATION else (split,)


def files_below(root: Path) -> list[Path]:
    """Paths of all files below a folder, relative to it and sorted, without hidden ones.

    Links to folders are followed. A folder comes once, by its real place if that is below root:
    links may lead back.
    """
    found: list[Path] = []
    seen: set[str] = set()
    later = [str(root)]
    while later:
        links: list[str] = []
        for top in later:
            for folder, folders, files in os.walk(top):
                real = os.path.realpath(folder)
                folders[:] = sorted(x for x in folders if not x.startswith("."))
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                paths = [os.path.join(folder, x) for x in folders]
                links += [path for path in paths if os.path.islink(path)]
                here = Path(folder).relative_to(root)
                found += [here / x for x in files if not x.startswith(".")]
        later = links
    return sorted(found)


def with_slashes(name: str, folder: Path) -> str:
    """A path from Windows, ``images\\a.png``, as ``images/a.png`` if only that one exists."""
    slashed = name.replace("\\", "/")
    is_from_windows = name != slashed and not os.path.exists(folder / name)
    return slashed if is_from_windows and os.path.exists(folder / slashed) else name


def read_text(path: Path) -> str:
    """The content of a file, without the mark at which Windows knows UTF-8.

    Raises:
        ValueError: as the end of a sentence that names the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("it is no text in UTF-8") from error
    except (OSError, ValueError) as error:  # such as of a name with a zero byte
        raise UserError(f"it cannot be read: {why(error)}") from error


def size_of(image: Path) -> tuple[int, int] | OSError:
    """(width, height) after the EXIF orientation."""
    try:
        return read_header(str(image)).size
    except OSError as error:
        return error


def name_in(folder: Path, path: Path) -> str:
    """As messages and the content name a file."""
    return str(path).removeprefix(f"{folder}{os.sep}")


def why(error: Exception) -> str:
    """Why a file cannot be read."""
    return getattr(error, "strerror", None) or str(error)
