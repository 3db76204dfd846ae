"""Names, splits and image lists of YOLO's layout."""

import os
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from atss_runner.images import SUFFIXES

from ..errors import UserError
from .folders import NAMES_FILES, files_below, names_of, read_text, with_slashes

# Keys of a data.yaml or obj.data other than splits.
# fmt: off
OTHER_KEYS = (
    "path", "names", "nc", "download", "kpt_shape", "kpt_names", "flip_idx", "roboflow", "classes",
    "backup",
)
# fmt: on


def read_config(path: Path, split: str) -> dict:
    """Read a data.yaml, an obj.data or a folder, as the keys of a data.yaml.

    Raises:
        UserError: if it is invalid; also in the functions below.
    """
    if path.is_dir():
        return _read_folder(path, split)
    return _read_darknet(path) if path.suffix.lower() == ".data" else _read_yaml(path)


def _read_yaml(yaml_file: Path) -> dict:
    text = read_text(yaml_file)
    try:
        config = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else "it"
        raise UserError(f"{line} is not valid yaml: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = str(error).partition("\n")[0]
        raise UserError(f"it is not valid yaml: {problem}") from error
    if not isinstance(config, dict):
        raise UserError("it has no keys with values")
    return config


def _read_darknet(data_file: Path) -> dict:
    lines = [line.partition("=") for line in read_text(data_file).splitlines()]
    config: dict = {key.strip(): value.strip() for key, equals, value in lines if equals}
    if "names" in config:
        names = _read_names(_find("names", config["names"], (data_file.parent, Path.cwd())))
        if config.get("classes", str(len(names))) != str(len(names)):
            raise UserError(
                f"'classes' is {config['classes']}, but {config['names']} has {len(names)} names"
            )
        config["names"] = names
    return config


def _read_folder(folder: Path, split: str) -> dict:
    """Read a folder without a config file: the split is a list or a subfolder."""
    names = {x: _read_names(folder / x) for x in files_below(folder) if x.name in NAMES_FILES}
    if not names:
        raise UserError(f"it has none of {', '.join(NAMES_FILES)}")
    longest = max(names, key=lambda x: len(names[x]))
    for other, shorter in names.items():
        if shorter != names[longest][: len(shorter)]:
            raise UserError(f"{other} and {longest} have different class names")
    tried = [folder / x for n in names_of(split) for x in (f"{n}.txt", n, f"images/{n}")]
    place = next((x for x in tried if os.path.exists(x)), None)
    if place is None:
        raise UserError(f"it has no split {split!r}; tried {', '.join(map(str, tried))}")
    return {split: str(place), "names": names[longest]}


def _read_names(file: Path) -> list[str]:
    try:
        return [line.strip() for line in read_text(file).rstrip().splitlines()]
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def class_names(config: dict) -> dict[int, str]:
    """Return {id: name} sorted by id; ids may have gaps."""
    names = config.get("names")
    if names is None:
        raise UserError("it has no 'names'")
    if not isinstance(names, list | dict):
        raise UserError(f"'names' must be a list or a dict, got a {type(names).__name__}")
    result = {}
    for key, name in enumerate(names) if isinstance(names, list) else names.items():
        if not str(key).isdecimal():
            raise UserError(f"keys of 'names' must be numbers of classes, got {key!r}")
        # yaml reads words such as yes and on as booleans, and 1.10 as 1.1.
        if type(name) not in (str, int):
            raise UserError(f"the name of class {key} is {name!r}: put it in quotes")
        result[int(key)] = str(name)
    if not result:
        raise UserError("'names' is empty")
    if config.get("nc", len(result)) != len(result):
        raise UserError(f"'nc' is {config['nc']!r}, but it has {len(result)} names")
    return dict(sorted(result.items()))


def count_with_keypoints(config: dict) -> int | None:
    """Return the count of numbers in a line with key points, or None."""
    shape = config.get("kpt_shape")
    if shape is None:
        return None
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(x) is int for x in shape)
        and shape[0] > 0
        and shape[1] in (2, 3)
    ):
        raise UserError(
            f"'kpt_shape' must be [number of key points, 2 or 3], got {reprlib.repr(shape)}"
        )
    return 5 + shape[0] * shape[1]


def find_images(config: dict, split: str, folder: Path) -> tuple[list[Path], set[Path]]:
    """Return the sorted absolute paths of a split's images, and of all files in its folders and
    their labels folders."""
    splits = [key for key in config if key not in OTHER_KEYS and config[key]]
    key = next((key for key in names_of(split) if key in splits), None)
    if key is None:
        raise UserError(f"it has no split {split!r}: choose from {splits}")
    entries = [config[key]] if isinstance(config[key], str) else config[key]
    if not (isinstance(entries, list) and all(isinstance(e, str) for e in entries)):
        raise UserError(f"{key!r} must name folders or .txt files, got {reprlib.repr(config[key])}")
    path = config.get("path") or ""
    if not isinstance(path, str):
        raise UserError(f"'path' must be a folder, got {path!r}")
    # By the config's `path`; beside the config, if the images were moved; as YOLO's tools find it.
    bases = (folder / with_slashes(path, folder), folder, Path.cwd() / path)
    images: set[Path] = set()
    files: set[Path] = set()
    lists: set[Path] = set()
    for entry in entries:
        place = _find(key, entry, bases)
        if place.is_dir():
            inside = [place / x for x in files_below(place)]
            images.update(x for x in inside if x.suffix.lower() in SUFFIXES)
            labels = label_files(place / "image")[0].parent
            files.update(inside, (labels / x for x in files_below(labels)))
        elif place.suffix.lower() == ".txt":
            images.update(_listed(place, bases))
            lists.add(place)
        else:
            raise UserError(f"{key!r} must name folders or .txt files, got {entry!r}")
    if not images:
        raise UserError(f"no images in {', '.join(map(repr, entries))} of {key!r}")
    return sorted(images), files - lists


def _listed(list_file: Path, bases: Sequence[Path]) -> Iterator[Path]:
    try:
        text = read_text(list_file)
    except ValueError as error:
        raise UserError(f"the list {list_file}: {error}") from error
    for line in filter(None, map(str.strip, text.splitlines())):
        is_relative = line.replace("\\", "/").startswith("./")
        places = [list_file.parent] if is_relative else [*bases, list_file.parent]
        tried = _candidates(line, places)
        yield next((p for p in tried if os.path.exists(p)), tried[0])


def _find(key: str, entry: str, bases: Sequence[Path]) -> Path:
    tried = _candidates(entry, bases)
    place = next((p for p in tried if os.path.exists(p)), None)
    if place is None:
        places = ", ".join(map(str, tried))
        raise UserError(f"{entry!r} of {key!r} does not exist; tried {places}")
    return place


def _candidates(entry: str, bases: Sequence[Path]) -> list[Path]:
    """Return the possible places of an entry, the likeliest first. For files beside the config,
    Roboflow writes "../train/images", CVAT "data/train.txt"; Windows writes backslashes."""
    slashed = entry.replace("\\", "/")
    entries = (entry, slashed, slashed.removeprefix("../"), slashed.removeprefix("data/"))
    tried = (os.path.normpath(base / e) for base in bases for e in dict.fromkeys(entries))
    return [Path(p) for p in dict.fromkeys(tried)]


def label_files(image: Path) -> list[Path]:
    """Return the possible label files of an image: in "labels" for the last folder "images", then
    beside the image."""
    beside = image.with_suffix(".txt")
    before, images, after = beside.as_posix().rpartition("/images/")
    return [Path(f"{before}/labels/{after}"), beside] if images else [beside]
