"""Reads configs: files and the command line over the defaults. What is wrong with them is said in
one sentence that names the file or the key."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .checks import flatten
from .keys import add_atss_config
from .pixels import complete_pixels


def load_config(*files: str | Path, opts: Sequence[Any] = ()) -> CfgNode:
    """Detectron2's defaults, ours, the files in their order, and KEY VALUE pairs over all;
    pixels as a backbone of timm wants them.

    Raises:
        ValueError: in one sentence, naming the file or the key.
    """
    cfg = get_cfg()
    add_atss_config(cfg)
    defaults = cfg.clone()
    for file in files:
        _merge_file(cfg, str(file))
    merge_options(cfg, opts)
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
        raise ValueError(f"this installation has no configs: they are in none of {folders}")
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
        raise ValueError(f"there is no config {name!r}; known are {known}")
    return str(file)


def get_config(name: str) -> CfgNode:
    """A config with the keys of this project; ``name`` as in :func:`get_config_file`.

    Raises:
        ValueError: for an unknown name, or that of a recipe.
    """
    cfg = load_config(get_config_file(name))
    if cfg.MODEL.META_ARCHITECTURE != "ATSSDetector":
        raise ValueError(f"{name} is a recipe: lay it over a config, _BASE_: [..., {name}.yaml]")
    return cfg


def _merge_file(cfg: CfgNode, file: str) -> None:
    """Merges a yaml file, with its _BASE_, in place. Tags that make Python objects are refused.

    Raises:
        ValueError: naming the file.
    """
    try:
        with PathManager.open(file) as opened:
            node = yaml.compose(opened, yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("it holds no keys with values")
        _refuse_duplicates(node)
        cfg.merge_from_file(file, allow_unsafe=False)
    except OSError as error:
        raise ValueError(
            f"cannot read the config {error.filename or file}: {error.strerror}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"config {file}: its _BASE_ leads back to itself") from error
    except (AssertionError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config {file}: {_explain(cfg, error)}") from error


def merge_options(cfg: CfgNode, options: Sequence[Any]) -> None:
    """Merges KEY VALUE pairs in place.

    Raises:
        ValueError: naming the key.
    """
    if len(options) % 2:
        given = " ".join(map(str, options))
        raise ValueError(f"changes of the config are pairs KEY VALUE, which {given!r} is not")
    known = dict(flatten(cfg))
    for key, value in zip(options[::2], options[1::2], strict=True):
        if isinstance(known.get(key), CfgNode):
            raise ValueError(_is_a_group(key, known[key]))
        if isinstance(known.get(key), float) and re.fullmatch(r"[+-]?\d+", str(value)):
            value = float(value)
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            if key not in known:
                raise ValueError(_unknown(cfg, key)) from error
            raise ValueError(f"{_explain(cfg, error)}, not {value!r}") from error


def _refuse_empty(cfg: CfgNode, defaults: CfgNode) -> None:
    """yacs takes a key without a value for any type.

    Raises:
        ValueError: naming the key.
    """
    usual = dict(flatten(defaults))
    for key, value in flatten(cfg):
        if value is None and usual.get(key) is not None:
            raise ValueError(f"{key} has no value; by default it is {usual[key]!r}")


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
                raise ValueError(f"line {line} repeats {name.value}, which stands above already")
            seen.add(name.value)
            children.append(child)
    for child in children:
        _refuse_duplicates(child)
