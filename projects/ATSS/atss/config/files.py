"""Reads configs: files and the command line over the defaults. What is wrong with them is said in
one sentence that names the file or the key."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from .checks import flatten
from .keys import RENAMED_KEYS, add_atss_config
from .pixels import complete_pixels

# Arguments of parts of version 0.2 that the command line can still set.
LEGACY_ARGUMENTS = (
    "MODEL.ATSS.ASSIGNERS.ATSS.ALPHA",
    "MODEL.ATSS.ASSIGNERS.TopK.TOP_K",
    "MODEL.ATSS.HEADS.TOODHead.NUM_CONVS",
    "MODEL.ATSS.HEADS.VFNetHead.NUM_CONVS",
)


def load_config(*files: str | Path, opts: Sequence[Any] = ()) -> CfgNode:
    """Detectron2's defaults, ours, the files in their order, and KEY VALUE pairs over all;
    pixels as a backbone of timm wants them.

    Args:
        files: paths, or names of the model zoo; see :func:`find_config`.
        opts: keys and values in turn.

    Raises:
        ValueError: in one sentence, naming the file or the key.
    """
    cfg = get_cfg()
    add_atss_config(cfg)
    defaults = cfg.clone()
    if files:
        cfg.MODEL.META_ARCHITECTURE = ""  # A whole config sets it; a part of one does not.
    for file in files:
        _merge_file(cfg, find_config(str(file)))
    merge_options(cfg, opts)
    if not cfg.MODEL.META_ARCHITECTURE:
        raise UserError(_is_a_part(str(files[-1])))
    _refuse_empty(cfg, defaults)
    complete_pixels(cfg, given=opts[::2])
    return cfg


def config_folder() -> Path:
    """Where the configs of this project lie."""
    package = Path(__file__).resolve().parents[1]
    # In the package where it was installed from a wheel, in the project's folder otherwise.
    folders = [folder / "configs" for folder in (package, *package.parents[2:3])]
    found = [folder for folder in folders if (folder / "Base-ATSS.yaml").is_file()]
    if not found:
        raise UserError(f"this installation has no configs: they are in none of {folders}")
    return found[0]


def config_names() -> list[str]:
    """Of every yaml config, such as "ATSS_R_50_FPN_1x" or "tables/atss_k3"."""
    root = config_folder()
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def get_config_file(name: str) -> str:
    """Path of a config.

    Args:
        name: as MODEL_ZOO.md lists it, such as "ATSS_R_50_FPN_1x" or "tables/atss_k3".

    Raises:
        ValueError: for an unknown name, with those that there are.
    """
    file = config_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if not file.is_file():
        known = ", ".join(config_names())
        raise UserError(f"unknown config {name!r}: choose from {known}")
    return str(file)


def get_config(name: str) -> CfgNode:
    """A config with the keys of this project; ``name`` as in :func:`get_config_file`.

    Raises:
        ValueError: for an unknown name, or that of a recipe.
    """
    return load_config(get_config_file(name))


def find_config(name: str, folder: str = "") -> str:
    """Path of a config: of the file of that name, else of the config of the model zoo.

    Args:
        name: a path or URL, or a name as in :func:`get_config_file`.
        folder: relative paths begin there.
    """
    if "://" in name:
        return name
    path = os.path.join(folder, os.path.expanduser(name))
    if not PathManager.isfile(path) and name.removesuffix(".yaml") in config_names():
        return get_config_file(name)
    return path


def _merge_file(cfg: CfgNode, file: str, above: tuple[str, ...] = ()) -> None:
    """Merges a yaml file over its _BASE_, in place. Tags that make Python objects are refused.

    Args:
        above: files whose _BASE_ led here.

    Raises:
        ValueError: naming the file.
    """
    real = os.path.realpath(file)
    if real in above:
        raise UserError(f"config {file}: its _BASE_ leads back to itself")
    with _naming_file(cfg, file):
        keys = _read_keys(file)
        _rename_old_keys(keys.get("MODEL", {}).get("ATSS"))
        bases = keys.pop("_BASE_", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not (isinstance(bases, list) and all(isinstance(x, str) for x in bases)):
            raise UserError(f"_BASE_ must be a file or a list of files, got {bases!r}")
    for base in bases:
        _merge_file(cfg, find_config(base, os.path.dirname(file)), (*above, real))
    with _naming_file(cfg, file):
        if keys.get("VERSION", cfg.VERSION) != cfg.VERSION:
            raise UserError(f"VERSION must be {cfg.VERSION}, got {keys['VERSION']!r}")
        cfg.merge_from_other_cfg(CfgNode(keys))


@contextmanager
def _naming_file(cfg: CfgNode, file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = _like_in_the_zoo(file) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read the config {file}: {error.strerror}{hint}") from error
    except (AssertionError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"config {file}: {_explain(cfg, error)}") from error


def _rename_old_keys(node: Any) -> None:
    """Rename the keys of RENAMED_KEYS below MODEL.ATSS, in place, also those of an overlay."""
    if not isinstance(node, dict):
        return
    for old in RENAMED_KEYS.keys() & node.keys():
        node.setdefault(RENAMED_KEYS[old], node.pop(old))
    for child in node.values():
        _rename_old_keys(child)


def _read_keys(file: str) -> dict[str, Any]:
    with PathManager.open(file) as opened:
        loader = yaml.SafeLoader(opened)
        node = loader.get_single_node()
    if not isinstance(node, yaml.MappingNode):
        raise UserError("it holds no keys with values")
    _refuse_duplicates(node)
    return loader.construct_document(node)


def _like_in_the_zoo(file: str) -> str:
    names = {Path(name).name.lower(): name for name in config_names()}
    near = get_close_matches(Path(file).stem.lower(), names, n=1)
    return f"; did you mean {names[near[0]]}, of the model zoo?" if near else ""


def _is_a_part(file: str) -> str:
    return (
        f"config {file} is a part of a config: it sets no MODEL.META_ARCHITECTURE; lay it over a "
        f"whole one in a yaml of your own, _BASE_: [ATSS_R_50_FPN_1x.yaml, {Path(file).stem}.yaml]"
    )


def merge_options(cfg: CfgNode, options: Sequence[Any]) -> None:
    """Merges KEY VALUE pairs in place.

    Raises:
        ValueError: naming the key.
    """
    if len(options) % 2:
        given = " ".join(map(str, options))
        raise UserError(f"changes of the config are pairs KEY VALUE, which {given!r} is not")
    known = dict(flatten(cfg))
    for key, value in zip(options[::2], options[1::2], strict=True):
        node, _, name = key.rpartition(".")
        if node.startswith("MODEL.ATSS"):
            key = f"{node}.{RENAMED_KEYS.get(name, name)}"
        if isinstance(known.get(key), CfgNode):
            raise UserError(_is_a_group(key, known[key]))
        if key in LEGACY_ARGUMENTS and key not in known:
            group, part, argument = key.split(".")[-3:]
            parts = cfg.MODEL.ATSS[group]
            parts.setdefault(part, CfgNode(new_allowed=True))[argument] = None
        if isinstance(known.get(key), float) and re.fullmatch(r"[+-]?\d+", str(value)):
            value = float(value)
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            if key not in known:
                raise UserError(_unknown(cfg, key)) from error
            raise UserError(f"{_explain(cfg, error)}, not {value!r}") from error


def _refuse_empty(cfg: CfgNode, defaults: CfgNode) -> None:
    """yacs takes a key without a value for any type.

    Raises:
        ValueError: naming the key.
    """
    usual = dict(flatten(defaults))
    for key, value in flatten(cfg):
        if value is None and usual.get(key) is not None:
            raise UserError(f"{key} has no value; by default it is {usual[key]!r}")


def _explain(cfg: CfgNode, error: Exception) -> str:
    """What yacs and yaml mean."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = error.problem_mark.line + 1
        return f"line {line} is no valid yaml: {error.problem}"
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    if match := re.match(r"Non-existent (?:config )?key: (\S+)", text):
        return _unknown(cfg, match[1])
    if match := re.search(r"for config key: (\S+)$", text):
        wanted = dict(flatten(cfg))[match[1]]
        if isinstance(wanted, CfgNode):
            return _is_a_group(match[1], wanted)
        return f"{match[1]} takes a {type(wanted).__name__} such as {wanted!r}"
    return text.partition("\n")[0]


def _unknown(cfg: CfgNode, key: str) -> str:
    known = dict(flatten(cfg))
    named = {value for value in known.values() if isinstance(value, str)}

    def likeness(other: str) -> float:
        last, others_last = key.rpartition(".")[2], other.rpartition(".")[2]
        # Parts of a kind have arguments in common: of equal ones those of a part that is named.
        is_named = other.count(".") == 4 and other.split(".")[3] in named
        return (
            SequenceMatcher(None, key, other).ratio()
            + SequenceMatcher(None, last, others_last).ratio()
            + 0.03 * is_named
        )

    nearest = max(known, key=likeness)
    hint = f"; did you mean {nearest}?" if likeness(nearest) > 1.5 else ""
    return f"there is no key {key}{hint}"


def _is_a_group(key: str, group: CfgNode) -> str:
    return f"{key} is a group of keys, such as {key}.{next(iter(group))}, and takes no value"


def _refuse_duplicates(node: yaml.Node) -> None:
    """Of a key that stands twice yaml would keep the second, and drop what lies under the first."""
    children = []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for name, child in node.value:
            if name.value in seen:
                line = name.start_mark.line + 1
                raise UserError(f"line {line} repeats {name.value}, which stands above already")
            seen.add(name.value)
            children.append(child)
    for child in children:
        _refuse_duplicates(child)
