"""Files and folders, for formats with one label file per image."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from ..errors import UserError
from .findings import Finding
from .headers import read_header

# Suffixes of YOLO's data.yaml and Darknet's obj.data, which name the splits.
YOLO_CONFIGS = (".yaml", ".yml", ".data")
# Class names of YOLO's labels, one a line: by Label Studio and labelImg, by CVAT, by Roboflow.
NAMES_FILES = ("classes.txt", "obj.names", "_darknet.labels")
# Names of one split.
VALIDATION = ("val", "validation", "valid")
# More than processors: threads mostly wait for the disk.
THREADS = min(32, 4 * (os.cpu_count() or 1))
# Kind of a finding -> its cases, for messages.
Places = dict[str, list[str]]
T = TypeVar("T")


def with_progress(items: Iterable[T], total: int, name: str) -> Iterator[T]:
    """Show a bar on a terminal while a loop takes more than two seconds."""
    return iter(tqdm(items, total=total, unit=name, disable=None, leave=False, delay=2))


class Split:
    """Builder of a split in COCO's format, with file names relative to a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self.places: Places = defaultdict(list)

    def add_image(self, image: Path, size: tuple[int, int]) -> None:
        entry = {"id": len(self.images) + 1, "file_name": name_in(self.folder, image)}
        self.images.append({**entry, "width": size[0], "height": size[1]})

    def add_object(self, category: int, box: list[float], **more: int) -> None:
        """Add an object to the last image; its box is [x, y, width, height] in pixels."""
        # The digits that Detectron2 writes for the evaluation.
        box = [round(x, 3) for x in box]
        ids = {"id": len(self.annotations) + 1, "image_id": len(self.images)}
        fields = {"category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        self.annotations.append({**ids, **fields, **more})

    def result(self, names: Mapping[int, str]) -> tuple[dict, list[Finding]]:
        """Return content and findings; ``names`` is {category id: name}."""
        content = {"images": self.images, "annotations": self.annotations}
        content["categories"] = [{"id": i, "name": name} for i, name in names.items()]
        places = [(kind, cases) for kind, cases in self.places.items() if cases]
        return content, [Finding(k, range(len(c)), c.__getitem__) for k, c in places]


def refuse_unknown_format(annotations: str) -> None:
    """Raise UserError if a file has a suffix of no label format; no suffix counts as a json."""
    suffix, allowed = Path(annotations).suffix.lower(), (".json", *YOLO_CONFIGS)
    if os.path.isfile(annotations) and suffix not in ("", *allowed):
        raise UserError(
            f"{annotations}: unknown label format {suffix}: choose {', '.join(allowed)} or a folder"
        )


def names_of(split: str) -> tuple[str, ...]:
    """Return the possible names of a split, the given one first."""
    return (split, *VALIDATION) if split in VALIDATION else (split,)


def files_below(root: Path) -> list[Path]:
    """Return the sorted relative paths of all files below a folder, without hidden ones. Links to
    folders are followed last, and each folder is visited once: links may lead back."""
    paths: list[Path] = []
    visited: set[str] = set()
    pending = [str(root)]
    while pending:
        links: list[str] = []
        for top in pending:
            for folder, folders, files in os.walk(top):
                real = os.path.realpath(folder)
                folders[:] = sorted(x for x in folders if not x.startswith("."))
                if real in visited:
                    folders.clear()
                    continue
                visited.add(real)
                subfolders = [os.path.join(folder, x) for x in folders]
                links += [path for path in subfolders if os.path.islink(path)]
                relative = Path(folder).relative_to(root)
                paths += [relative / x for x in files if not x.startswith(".")]
        pending = links
    return sorted(paths)


def with_slashes(name: str, folder: Path) -> str:
    r"""Return ``images\a.png``, from Windows, as ``images/a.png`` if only that exists."""
    slashed = name.replace("\\", "/")
    is_from_windows = name != slashed and not os.path.exists(folder / name)
    return slashed if is_from_windows and os.path.exists(folder / slashed) else name


def read_text(path: Path) -> str:
    """Read a file without its byte-order mark.

    Raises:
        UserError: the end of a sentence that names the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("it is not UTF-8 text") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"it cannot be read: {why(error)}") from error


def size_of(image: Path) -> tuple[int, int] | OSError:
    try:
        return read_header(str(image)).size
    except OSError as error:
        return error


def name_in(folder: Path, path: Path) -> str:
    return str(path).removeprefix(f"{folder}{os.sep}")


def why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
