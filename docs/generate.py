#!/usr/bin/env python3
"""Write docs/config.md, python_api.md and renamed.md from the code. A test compares them.

python docs/generate.py
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from detectron2.config import get_cfg

from atss import add_atss_config, assigners, deprecated, modeling
from atss.config import keys
from atss.registry import Registry, lookup_key

DOCS = Path(__file__).parent
# Registries in the order of the page, with their modules.
REGISTRIES = [
    x
    for face in (assigners, modeling)
    for x in vars(importlib.import_module(f"{face.__name__}.registry")).values()
    if isinstance(x, Registry)
]
SECTIONS = {
    "SOLVER": "Solver",
    "TEST": "Evaluation",
    "DATASETS": "Data sets",
    "DATALOADER": "Loading",
    "INPUT": "Input",
    "MODEL.BACKBONE": "Backbone",
    "MODEL.TIMM": "Backbones of timm",
    "MODEL.ATSS": "Detector",
}
MODULES = (
    "atss",
    "atss.predictor",
    "atss.config",
    "atss.assigners",
    "atss.modeling",
    "atss.losses",
    "atss.structures",
    "atss.data",
    "atss.engine",
    "atss.checkpoints",
    "atss.model_zoo",
    "atss.export",
    "atss.errors",
    "atss_runner",
)
API = """# Python

The public names, made from the code by `docs/generate.py`. Shape letters are explained in
[structures](#atssstructures).
"""
RENAMED = """# Renamed in version 0.3.0

Old names work until 0.4.0, with a DeprecationWarning; old config keys are read without one.
Made from the code by `docs/generate.py`.
"""
CONFIG = """# Config keys

Every key that this project adds to Detectron2's, made from the code by `docs/generate.py`.
Detectron2's own keys work as in Detectron2: `SOLVER.BASE_LR`, `STEPS`, `MAX_ITER`, `WARMUP_*`,
`LR_SCHEDULER_NAME`, `INPUT.MIN_SIZE_TRAIN`, `MAX_SIZE_TRAIN`, `MIN_SIZE_TEST`, `MAX_SIZE_TEST`,
`TEST.DETECTIONS_PER_IMAGE`.
A key is set in a yaml file or as `KEY VALUE` on the command line. Keys of
`MODEL.ATSS` that name a part (a rule, a head, a loss) are followed by tables of the parts'
arguments; `--import` registers parts of your own, whose arguments become keys in the same way.
"""


def explained_keys() -> Iterator[tuple[str, str]]:
    """Each key with the comment above it. Keys in consecutive lines share one."""
    source = inspect.getsource(keys)
    lines = source.splitlines()
    function = next(
        x for x in ast.parse(source).body if getattr(x, "name", "") == "add_atss_config"
    )
    places = {"cfg": ""}
    comment, last = "", 0
    for statement in function.body:
        block = []
        line = statement.lineno - 2
        while lines[line].strip().startswith("#"):
            block.insert(0, lines[line].strip().removeprefix("#").strip())
            line -= 1
        if block:
            comment = " ".join(block)
        elif statement.lineno != last + 1:
            comment = ""
        last = statement.end_lineno or statement.lineno
        if isinstance(statement, ast.Assign):
            value = statement.value
            is_node = isinstance(value, ast.Call) and ast.unparse(value.func) == "CfgNode"
            for target in statement.targets:
                if isinstance(target, ast.Name) and is_node:
                    path = ast.unparse(statement.targets[-1])
                    places[target.id] = _resolve(path, places)
            if not is_node or "new_allowed" in ast.unparse(value):
                yield _resolve(ast.unparse(statement.targets[-1]), places), comment
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            call = statement.value
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_keys":
                name = ast.unparse(call.func.value).rpartition(".")[2]
                if len(call.args) > 1:
                    yield f"MODEL.ATSS.{_registry(name).key}", comment


def _resolve(path: str, places: dict[str, str]) -> str:
    first, _, rest = path.partition(".")
    return f"{places[first]}.{rest}".strip(".")


def _registry(name: str) -> Registry:
    face = assigners if name in ("ASSIGNER_REGISTRY", "SIMILARITIES") else modeling
    return getattr(face, name)


def make_config() -> str:
    cfg = get_cfg()
    add_atss_config(cfg)
    rows: dict[str, list[str]] = {name: [] for name in SECTIONS}
    for key, meaning in explained_keys():
        section = max((x for x in SECTIONS if key.startswith(x)), key=len)
        rows[section].append(f"| `{key}` | `{_value(lookup_key(cfg, key))}` | {_cell(meaning)} |")
    parts = [CONFIG]
    for section, title in SECTIONS.items():
        head = "| key | default | meaning |\n|---|---|---|"
        parts.append(f"## {title}\n\n{head}\n" + "\n".join(rows[section]) + "\n")
    parts.append("## Arguments of parts\n")
    for registry in REGISTRIES:
        for name, target in registry:
            parts += _arguments(registry, name, target)
    return "\n".join(parts)


def _arguments(registry: Registry, name: str, target: Any) -> list[str]:
    if not inspect.isclass(target):
        return []
    fields = (
        {x.name: x for x in dataclasses.fields(target)} if dataclasses.is_dataclass(target) else {}
    )
    meanings = documented(target)
    group = getattr(getattr(_defaults().MODEL.ATSS, registry.group), name, {})
    rows = []
    for key, default in group.items():
        argument = key.lower()
        allowed = _allowed(fields.get(argument))
        row = (f"`{registry.group}.{name}.{key}`", f"`{_value(default)}`", allowed)
        rows.append(f"| {' | '.join(row)} | {_cell(meanings.get(argument, ''))} |")
    if not rows:
        return []
    first = inspect.getdoc(target) or ""
    summary = " ".join(first.split("\n\n")[0].split())
    head = "| key under `MODEL.ATSS` | default | allowed | meaning |\n|---|---|---|---|"
    title = f"### {registry.key} {name}"
    return [f"{title}\n\n{_text(summary)}\n\n{head}\n" + "\n".join(rows) + "\n"]


def _defaults() -> Any:
    cfg = get_cfg()
    add_atss_config(cfg)
    return cfg


def _allowed(declared: Any) -> str:
    check = declared.metadata.get("check") if declared is not None else None
    if check is None:
        return ""
    values = check.keywords
    if "choices" in values:
        return ", ".join(f"`{_value(x)}`" for x in values["choices"])
    low, high = values["low"], values["high"]
    if low == float("-inf"):
        return "" if high == float("inf") else f"<= {high:g}"
    return f">= {low:g}" if high == float("inf") else f"{low:g} to {high:g}"


def documented(target: Any) -> dict[str, str]:
    """{argument: its text} of the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for cls in reversed(inspect.getmro(target)):
        for text in (cls.__doc__, getattr(vars(cls).get("__init__"), "__doc__", None)):
            found |= sections(inspect.cleandoc(text or "")).get("Args", {})
    return found


def sections(docstring: str) -> dict[str, dict[str, str]]:
    """{"Args": {name: text}, ...} of a docstring."""
    found: dict[str, dict[str, str]] = {}
    for match in re.finditer(r"^(\w+):\n((?:[ ]{4}.*\n?|\n)+)", docstring + "\n", re.MULTILINE):
        entries: dict[str, str] = {}
        names: list[str] = []
        for line in textwrap.dedent(match[2]).splitlines():
            entry = re.match(r"([\w*, ]+): (.*)", line)
            if entry and not line.startswith(" "):
                names = [x.strip() for x in entry[1].split(",")]
                entries |= dict.fromkeys(names, entry[2])
            elif names:
                for name in names:
                    entries[name] += f" {line.strip()}"
        found[match[1]] = entries
    return found


def make_api() -> str:
    parts = [API]
    seen: set[int] = set()
    for path in MODULES:
        module = importlib.import_module(path)
        parts.append(f"## {path}\n\n{_text(inspect.getdoc(module) or '')}\n")
        for name in public_names(module):
            value = getattr(module, name, module)
            if inspect.ismodule(value):
                continue
            if id(value) in seen and not isinstance(value, int | str):
                continue
            seen.add(id(value))
            parts.append(_entry(name, value))
    return "\n".join(parts)


def public_names(module: Any) -> Iterable[str]:
    """Return the names in ``__all__``, or without it the public names that the module defines."""
    if hasattr(module, "__all__"):
        return module.__all__
    own = (n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__)
    return [x for x in own if not x.startswith("_")]


def _entry(name: str, value: Any) -> str:
    if not callable(value):
        kind = type(value).__name__
        text = "" if " at 0x" in repr(value) else f": `{value!r}`"
        if isinstance(value, Registry):
            text = f": the parts that `MODEL.ATSS.{value.key}` names"
        return f"### {name}\n\n`{kind}`{text}\n"
    signature = _signature(name, value)
    lines = [f"### {name}\n", f"```python\n{signature}\n```\n"]
    if value.__doc__ and not value.__doc__.startswith(f"{name}("):
        lines.append(_text(inspect.cleandoc(value.__doc__)) + "\n")
    if inspect.isclass(value):
        for method, function in vars(value).items():
            is_own = inspect.isfunction(function) and function.__doc__
            if is_own and (not method.startswith("_") or method == "__call__"):
                lines.append(f"```python\n{_signature(method, function)}\n```\n")
                lines.append(_text(inspect.cleandoc(function.__doc__)) + "\n")
    return "\n".join(lines)


def _signature(name: str, value: Any) -> str:
    """A call, with types by their last names; one argument a line if it is long."""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return f"{name}(...)"
    if str(signature) == "(*args, **kwargs)":  # a protocol's, until it is called first
        return f"{name}()"
    text = re.sub(r"\b(?:[a-z_][\w]*\.)+(?=[A-Z])", "", f"{name}{signature}")
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    if len(text) <= 90:
        return text
    inner, arrow, result = text.removeprefix(f"{name}(").rpartition(") -> ")
    if not arrow:
        inner, result = text.removeprefix(f"{name}(")[:-1], ""
    depth, lines = 0, "    "
    for character in inner:
        depth += (character in "[(") - (character in "])")
        lines += ",\n   " if character == "," and not depth else character
    return f"{name}(\n{lines},\n){arrow.removeprefix(')')}{result}"


def _text(docstring: str) -> str:
    """A docstring as Markdown: cross references as code, sections as lists."""
    text = re.sub(r":\w+:`[~.!]?([^`]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", docstring)
    text = text.replace("``", "`")
    lines = []
    in_section = False
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields):.*", line):
            lines += ["", f"*{line.rstrip(':')}*", ""]
            in_section = True
        elif in_section and line.startswith("    ") and not line.startswith("     "):
            entry = re.match(r"    ([\w*, ]+): (.*)", line)
            lines.append(f"- `{entry[1]}`: {entry[2]}" if entry else f"- {line.strip()}")
        elif in_section and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            in_section = in_section and not line.strip()
            lines.append(line)
    return "\n".join(x if x.startswith("    ") else _escape(x) for x in lines)


def _escape(text: str) -> str:
    """Keep <name> outside of code from becoming HTML."""
    return re.sub(r"`[^`]*`|<(?=\w)", lambda m: "&lt;" if m[0] == "<" else m[0], text)


def _value(value: Any) -> str:
    return (
        re.sub(r"\s+", " ", repr(value)).replace("|", "\\|")
        if not isinstance(value, dict)
        else "{}"
    )


def _cell(text: str) -> str:
    return _escape(text).replace("|", "\\|")


def make_renamed() -> str:
    tables = {
        "Names": {old: " ".join(new.split()[-1:]) for old, new in deprecated.NAMES.items()},
        "Modules": deprecated.MODULES,
        "Config keys under `MODEL.ATSS`": keys.RENAMED_KEYS,
    }
    parts = [RENAMED]
    for title, names in tables.items():
        rows = "\n".join(f"| `{old}` | `{new}` |" for old, new in sorted(names.items()))
        parts.append(f"## {title}\n\n| old | new |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


PAGES = {"config.md": make_config, "python_api.md": make_api, "renamed.md": make_renamed}


def main() -> None:
    for name, make in PAGES.items():
        (DOCS / name).write_text(make())
        print(f"written: docs/{name}")


if __name__ == "__main__":
    main()
