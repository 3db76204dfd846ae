"""Plans of experiments: rows, data and seeds, fixed in a file before the first training."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import find_config
from ..errors import UserError

# Keys of a plan, and of a row beside the keys of configs.
PLAN = ("data", "recipe", "keys", "seeds", "evaluations", "rows", "compare")
ROW = ("config", "data")
SPLITS = ("train", "test")
# Names of rows and evaluations name folders; those of evaluations also columns.
NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Row:
    """A config to train.

    Attributes:
        configs: files, the later ones over the earlier ones.
        opts: keys and values in turn, over the configs.
        data: {split: annotations:images}, relative to the folder of the data; or the numbers of
            images to draw, {"digits": {split: number}}.
        published: the paper's AP of the first config, or "".
    """

    configs: Sequence[str]
    opts: Sequence[Any]
    data: Mapping[str, Any]
    published: str = ""


@dataclass(frozen=True)
class Plan:
    """The content of a plan.

    Attributes:
        rows: in the order in which they are trained. The first one gives the others their initial
            weights.
        seeds: each trains all rows.
        evaluations: further ones of the same weights, {name: keys and values in turn}.
        compare: {statement: (row, row to compare it with)}.
    """

    rows: Mapping[str, Row]
    seeds: Sequence[int]
    evaluations: Mapping[str, Sequence[Any]]
    compare: Mapping[str, tuple[str, str]]

    def choose(self, rows: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """Return the runs of some rows and seeds; an empty sequence chooses all.

        Raises:
            UserError: for an unknown row, or seeds that are none.
        """
        for row in rows:
            if row not in self.rows:
                raise UserError(f"unknown row {row!r}: choose from {[*self.rows]}")
        seeds = _seeds("--seeds", list(seeds)) if seeds else self.seeds
        return [(row, seed) for seed in seeds for row in dict.fromkeys(rows or self.rows)]


def read_plan(file: Path, opts: Sequence[Any] = ()) -> Plan:
    """Read a plan.

    Args:
        opts: keys and values in turn, over every row.

    Raises:
        UserError: naming the file and the key.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"cannot read the plan {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid yaml: {error}") from error
    try:
        return _plan(content, opts, str(file.parent))
    except UserError as error:
        raise UserError(f"plan {file}: {error}") from error


def paper_ap(config: str) -> str:
    """Return the paper's AP from the comment of a config of a table, or ""."""
    try:
        comment = Path(config).read_text().replace("\n# ", " ")
    except OSError:  # an address, or a file that is missing, which loading it names
        return ""
    printed = re.search(r"the paper's AP ([\d.]+\d)", comment)
    return printed.group(1) if printed else ""


def _plan(content: Any, opts: Sequence[Any], folder: str) -> Plan:
    content = _mapping("the plan", content)
    for key in content:
        if key not in PLAN:
            raise UserError(f"unknown key {key!r}: choose from {[*PLAN]}")
    recipe = _names("recipe", content.get("recipe", []))
    keys = _mapping("keys", content.get("keys", {}))
    data = _mapping("data", content.get("data", {}))
    rows = {}
    for name, row in _mapping("rows", content.get("rows", {})).items():
        _check_name("row", name)
        row = {"config": row} if isinstance(row, str | list) else _mapping(f"row {name}", row)
        own = {key: value for key, value in row.items() if key not in ROW}
        configs = [*_names(f"config of row {name}", row.get("config", [])), *recipe]
        if not configs:
            raise UserError(f"row {name} has no config")
        files = [find_config(x, folder) for x in configs]
        rows[name] = Row(
            files,
            [*_pairs(keys | own), *opts],
            _data(name, _mapping(f"data of row {name}", row.get("data", data))),
            "" if own else paper_ap(files[0]),
        )
    if not rows:
        raise UserError("it has no rows")
    return Plan(
        rows,
        _seeds("seeds", content.get("seeds", [1])),
        _evaluations(_mapping("evaluations", content.get("evaluations", {}))),
        _compare(_mapping("compare", content.get("compare", {})), rows),
    )


def _check_name(kind: str, name: Any) -> None:
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise UserError(
            f"{kind} {name!r} names a folder: use a text of letters, digits, '.', '_' and '-'"
        )


def _seeds(name: str, seeds: Any) -> list[int]:
    numbers = isinstance(seeds, list) and all(type(x) is int and 0 <= x < 2**31 for x in seeds)
    if not (numbers and seeds and len(set(seeds)) == len(seeds)):
        raise UserError(f"{name} must be a list of different numbers from 0 on, got {seeds!r}")
    return seeds


def _evaluations(content: dict) -> dict[str, list]:
    for name in content:
        _check_name("evaluation", name)
        if name in SPLITS or name == "training":
            raise UserError(f"evaluation {name!r}: choose another name")
    return {name: _pairs(_mapping(f"evaluation {name}", x)) for name, x in content.items()}


def _data(row: str, data: dict) -> dict:
    if set(data) == {"digits"}:
        numbers = _mapping(f"digits of row {row}", data["digits"])
        if set(numbers) == {*SPLITS} and all(isinstance(x, int) for x in numbers.values()):
            return {"digits": {split: numbers[split] for split in SPLITS}}
    elif set(data) == {*SPLITS} and all(isinstance(x, str) for x in data.values()):
        return {split: data[split] for split in SPLITS}
    raise UserError(
        f"data of row {row} must be {{train: annotations:images, test: annotations:images}} or "
        f"{{digits: {{train: number, test: number}}}}, got {data!r}"
    )


def _compare(statements: dict, rows: Mapping[str, Row]) -> dict[str, tuple[str, str]]:
    for statement, pair in statements.items():
        if not (isinstance(pair, list) and len(pair) == 2):
            raise UserError(f"compare: {statement!r} must have two rows, got {pair!r}")
        for row in pair:
            if row not in rows:
                raise UserError(f"compare: {statement!r} has the unknown row {row!r}")
    return {statement: tuple(pair) for statement, pair in statements.items()}


def _mapping(name: str, value: Any) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{name} must be keys with values, got {value!r}")
    return value


def _names(name: str, value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not (isinstance(names, list) and all(isinstance(x, str) for x in names)):
        raise UserError(f"{name} must be a config or a list of configs, got {value!r}")
    return names


def _pairs(keys: Mapping[str, Any]) -> list[Any]:
    return [x for pair in keys.items() for x in pair]
