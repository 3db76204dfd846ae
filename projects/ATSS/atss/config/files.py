"""Loads configs: defaults, files, command line. Messages name the file or key."""

import os
import re
from ast import literal_eval
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from ..registry import NODE
from .checks import flatten, has_no_effect
from .derive import complete_pixels
from .keys import RENAMED_KEYS, add_atss_config

# Config that `atss train` and `atss check` take by default.
RECIPE = "ATSS_lite0_FPN_fine_tune"
# Arguments of parts of version 0.2 that the command line can still set.
LEGACY_ARGUMENTS = (
    "MODEL.ATSS.ASSIGNERS.ATSS.ALPHA",
    "MODEL.ATSS.ASSIGNERS.TopK.TOP_K",
    "MODEL.ATSS.HEADS.TOODHead.NUM_CONVS",
    "MODEL.ATSS.HEADS.VFNetHead.NUM_CONVS",
)
# NAME=SOURCE among the options.
DATA_SET = re.compile(r"\w+=[^=]+:[^=]+$")
REPEAT_REGISTER = "; repeat --register before each NAME=SOURCE"


def load_config(*files: str | Path, opts: Sequence[Any] = ()) -> CfgNode:
    """Return the defaults, overridden by files, options and the pixel values of a timm backbone.

    Args:
        files: paths or names; see :func:`find_config`.
        opts: keys and values in turn.

    Raises:
        UserError: naming the file or the key.
    """
    cfg = get_cfg()
    add_atss_config(cfg)
    defaults = cfg.clone()
    if files:
        cfg.MODEL.META_ARCHITECTURE = ""  # a whole config sets it, a recipe does not
    for file in files:
        _merge_file(cfg, find_config(str(file)))
    merge_options(cfg, opts)
    if not cfg.MODEL.META_ARCHITECTURE:
        raise UserError(_describe_recipe(str(files[-1])))
    _refuse_empty(cfg, defaults)
    complete_pixels(cfg, given=opts[::2])
    return cfg


def config_folder() -> Path:
    """Return the folder of the configs, installed or in the checkout."""
    package = Path(__file__).resolve().parents[1]
    folders = [folder / "configs" for folder in (package, *package.parents[2:3])]
    for folder in folders:
        if (folder / "Base-ATSS.yaml").is_file():
            return folder
    raise UserError(f"this installation has no configs: none of {folders} contains them")


def config_names() -> list[str]:
    root = config_folder()
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def get_config_file(name: str) -> str:
    """Return the path of a config in MODEL_ZOO.md, such as "ATSS_R_50_FPN_1x" or "tables/atss_k3".

    Raises:
        UserError: for an unknown name.
    """
    file = config_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if not file.is_file():
        raise UserError(f"unknown config {name!r}: choose from {', '.join(config_names())}")
    return str(file)


def get_config(name: str) -> CfgNode:
    return load_config(get_config_file(name))


def find_config(name: str, folder: str = "") -> str:
    """Return the path of a file or, if it does not exist, of the config of that name.

    Args:
        name: path, URL, name of :func:`get_config_file`, or name in Detectron2's model zoo such as
            COCO-Detection/faster_rcnn_R_50_FPN_1x.
        folder: base of relative paths.
    """
    if "://" in name:
        return name
    path = os.path.join(folder, os.path.expanduser(name))
    if PathManager.isfile(path):
        return path
    if name.removesuffix(".yaml") in config_names():
        return get_config_file(name)
    of_detectron2 = str(
        resources.files("detectron2").joinpath(
            "model_zoo", "configs", f"{name.removesuffix('.yaml')}.yaml"
        )
    )
    return of_detectron2 if os.path.isfile(of_detectron2) else path


def _merge_file(cfg: CfgNode, file: str, parents: tuple[str, ...] = ()) -> None:
    """Merge a yaml file and its _BASE_ in place; ``parents`` lead to it."""
    real = os.path.realpath(file)
    if real in parents:
        raise UserError(f"config {file}: _BASE_ leads back to the file itself")
    with _blame_file(cfg, file):
        keys = _read_keys(file)
        _rename_old_keys(keys.get("MODEL", {}).get("ATSS"))
        bases = keys.pop("_BASE_", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not (isinstance(bases, list) and all(isinstance(x, str) for x in bases)):
            raise UserError(f"_BASE_ must be a file or a list of files, got {bases!r}")
    for base in bases:
        _merge_file(cfg, find_config(base, os.path.dirname(file)), (*parents, real))
    with _blame_file(cfg, file):
        if keys.get("VERSION", cfg.VERSION) != cfg.VERSION:
            raise UserError(f"VERSION must be {cfg.VERSION}, got {keys['VERSION']!r}")
        _quote_texts(keys, cfg)
        cfg.merge_from_other_cfg(CfgNode(keys))


def _quote_texts(keys: dict, cfg: CfgNode) -> None:
    """Quote texts that yacs would read as other values, such as a folder 7, in place."""
    for name, value in keys.items():
        default = cfg.get(name)
        if isinstance(value, dict) and isinstance(default, CfgNode):
            _quote_texts(value, default)
        elif isinstance(default, str):
            keys[name] = _quoted(value)


def _quoted(value: Any) -> Any:
    """Return the value of a key with texts so that yacs reads it as a text."""
    try:
        is_other = isinstance(value, str) and not isinstance(literal_eval(value), str)
    except (SyntaxError, ValueError):
        return value
    return repr(value) if is_other else value


@contextmanager
def _blame_file(cfg: CfgNode, file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = _suggest_name(file) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read the config {file}: {error.strerror}{hint}") from error
    except (AssertionError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"config {file}: {_explain(cfg, error)}") from error


def _rename_old_keys(node: Any) -> None:
    """Rename RENAMED_KEYS below MODEL.ATSS and its overlays, in place."""
    if not isinstance(node, dict):
        return
    for old in RENAMED_KEYS.keys() & node.keys():
        node.setdefault(RENAMED_KEYS[old], node.pop(old))
    for child in node.values():
        _rename_old_keys(child)


def _read_keys(file: str) -> dict[str, Any]:
    with PathManager.open(file) as opened:
        if file.endswith(".py"):
            raise UserError("a LazyConfig, expected a yaml config")
        loader = yaml.SafeLoader(opened)
        node = loader.get_single_node()
    if not isinstance(node, yaml.MappingNode):
        raise UserError("expected keys with values")
    _refuse_duplicates(node)
    return loader.construct_document(node)


def _suggest_name(file: str) -> str:
    names = {Path(name).name.lower(): name for name in config_names()}
    similar = get_close_matches(Path(file).stem.lower(), names, n=1)
    return f"; did you mean {names[similar[0]]} of the model zoo?" if similar else ""


def _describe_recipe(file: str) -> str:
    return (
        f"config {file} is a recipe and sets no MODEL.META_ARCHITECTURE: combine it with a whole "
        f"config in a yaml of your own, _BASE_: [ATSS_R_50_FPN_1x.yaml, {Path(file).stem}.yaml]"
    )


def check_pairs(options: Sequence[Any]) -> None:
    """Check that options are keys and values in turn.

    Raises:
        UserError: also for a text or a dict.
    """
    if isinstance(options, str | Mapping):
        raise UserError(
            "options of the config must be a list such as ['SOLVER.MAX_ITER', 60], got a "
            f"{type(options).__name__}: {options!r}"
        )
    if len(options) % 2:
        text = " ".join(map(str, options))
        hint = REPEAT_REGISTER if any(map(DATA_SET.match, text.split())) else ""
        raise UserError(f"options of the config must be pairs KEY VALUE, got {text!r}{hint}")


def merge_options(cfg: CfgNode, options: Sequence[Any]) -> None:
    check_pairs(options)
    keys = dict(flatten(cfg))
    for key, value in zip(options[::2], options[1::2], strict=True):
        node, _, name = key.rpartition(".")
        if node.startswith("MODEL.ATSS"):
            key = f"{node}.{RENAMED_KEYS.get(name, name)}"
        if isinstance(keys.get(key), CfgNode):
            raise UserError(_describe_group(key, keys[key]))
        if key in LEGACY_ARGUMENTS and key not in keys:
            group, part, argument = key.split(".")[-3:]
            parts = cfg.MODEL.ATSS[group]
            parts.setdefault(part, CfgNode(new_allowed=True))[argument] = None
        if isinstance(keys.get(key), float) and re.fullmatch(r"[+-]?\d+", str(value)):
            value = float(value)
        if isinstance(keys.get(key), str):
            value = _quoted(value)
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            if key not in keys:
                raise UserError(_describe_unknown(cfg, key)) from None
            raise UserError(f"{_explain(cfg, error)}, got {value!r}") from error
        for legacy in LEGACY_ARGUMENTS:  # of a config.yaml of version 0.2
            group, part, argument = legacy.split(".")[-3:]
            if key == f"MODEL.ATSS.{argument}":
                cfg.MODEL.ATSS[group].get(part, {}).pop(argument, None)


def _refuse_empty(cfg: CfgNode, defaults: CfgNode) -> None:
    """Raise UserError for a key without a value, which yacs accepts for any type."""
    default_values = dict(flatten(defaults))
    for key, value in flatten(cfg):
        if value is None and default_values.get(key) is not None:
            raise UserError(f"{key} has no value; its default is {default_values[key]!r}")


def _explain(cfg: CfgNode, error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return f"line {error.problem_mark.line + 1} is not valid yaml: {error.problem}"
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    if match := re.match(r"Non-existent (?:config )?key: (\S+)", text):
        return _describe_unknown(cfg, match[1])
    if match := re.search(r"for config key: (\S+)$", text):
        default = dict(flatten(cfg))[match[1]]
        if isinstance(default, CfgNode):
            return _describe_group(match[1], default)
        return f"{match[1]} must be a {type(default).__name__} such as {default!r}"
    return text.partition("\n")[0]


def _describe_unknown(cfg: CfgNode, key: str) -> str:
    if DATA_SET.match(key):
        return f"unknown key {key}{REPEAT_REGISTER}"
    keys, part = dict(flatten(cfg)), key.rpartition(".")[0]
    named_parts = {value for value in keys.values() if isinstance(value, str)}

    def likeness(other: str) -> float:
        last, others_last = key.rpartition(".")[2], other.rpartition(".")[2]
        # Parts of a kind have arguments in common: prefer those of a part that the config names.
        is_named = other.count(".") == 4 and other.split(".")[3] in named_parts
        return (
            SequenceMatcher(None, key, other).ratio()
            + SequenceMatcher(None, last, others_last).ratio()
            + 0.03 * is_named
            + 0.1 * (other.rpartition(".")[0] == part)
        )

    read_keys = [x for x in keys if not has_no_effect(x)]
    nearest = max(read_keys, key=likeness)
    is_argument = re.fullmatch(rf"{NODE}\.(?!BRANCH\.)\w+\.\w+", part) and part in keys
    if is_argument and not nearest.startswith(f"{part}."):
        return f"unknown key {key}: choose from {sorted(keys[part])}"
    if likeness(nearest) <= 1.5:  # then a key of the same group with this word, such as K
        group, words = part, {*key.rpartition(".")[2].split("_")}
        while group and not any(x.startswith(f"{group}.") for x in read_keys):
            group = group.rpartition(".")[0]
        in_group = [x for x in read_keys if group and x.startswith(f"{group}.")]
        with_words = [x for x in in_group if words <= {*x.rpartition(".")[2].split("_")}]
        nearest = max(with_words, key=likeness, default="")
    return f"unknown key {key}{f'; did you mean {nearest}?' if nearest else ''}"


def _describe_group(key: str, group: CfgNode) -> str:
    return f"{key} is a group of keys, such as {key}.{next(iter(group))}, and has no value"


def _refuse_duplicates(node: yaml.Node) -> None:
    """Raise UserError for a key that a file sets twice: yaml drops the first value."""
    children = []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for name, child in node.value:
            line = name.start_mark.line + 1
            if name.value in lines:
                raise UserError(f"line {line} repeats {name.value} of line {lines[name.value]}")
            lines[name.value] = line
            children.append(child)
    for child in children:
        _refuse_duplicates(child)
