"""Parts that a config names, and the config keys of their arguments.

Below MODEL.ATSS, ``<KEY>`` names a part and ``<KEY>S.<name>`` contains its arguments in capitals,
with the defaults of its signature. A part without arguments is a function, a part with arguments a
class. A ValueError of the class gets the name of the key; any other error is a bug of the part. Of
a user's own class, any error but a UserError may be a bug and keeps its traceback.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from yacs.config import CfgNode

from .errors import UserError, WrongValue, with_message

NODE = "MODEL.ATSS"
# Follows a list of the registered names.
OWN_PARTS = "; --import registers parts of your own"


def is_own(target: Callable) -> bool:
    """Return whether a function or class is the user's own."""
    return target.__module__.partition(".")[0] not in ("atss", "detectron2")


class Part:
    """A function or class, and the config keys of its arguments.

    Args:
        target: the function or class.
        injected: parameters that the builder passes (channels, the box code), without a key.
        group, name: its own keys are below MODEL.ATSS.<group>.<name>.
        keys: {parameter: shared key below MODEL.ATSS}, which an own key overrides.
        parts: {parameter: registry} of arguments that are parts. The key names a part, or an
            overlay MODEL.ATSS.BRANCH.<name> that names one and sets its arguments.
        legacy: {key of a former argument: the part it means, with the other arguments of this one}.

    Attributes:
        parameters: by name; with those of a base class if ``**kwargs`` passes them on.
        defaults: {argument with a key: default}, for a part its name.
    """

    def __init__(
        self,
        target: Callable,
        injected: Sequence[str] = (),
        group: str = "",
        name: str = "",
        *,
        keys: Mapping[str, str] | None = None,
        parts: Mapping[str, Registry] | None = None,
        legacy: Mapping[str, str] | None = None,
    ):
        self.target, self.injected, self.group, self.name = target, tuple(injected), group, name
        self.keys, self.parts, self.legacy = keys or {}, parts or {}, legacy or {}
        self.parameters = _parameters(target)
        self.defaults = {
            x: self.parts[x].name_of(p.default) if x in self.parts else p.default
            for x, p in self.parameters.items()
            if x not in self.injected and p.default is not p.empty
        }

    def key_of(self, argument: str) -> str:
        own_key = f"{self.group}.{self.name}.{argument.upper()}"
        return f"{NODE}.{self.keys.get(argument, own_key)}"

    def arguments(self, node: CfgNode) -> dict[str, Any]:
        """Return {argument: value} of the keys in MODEL.ATSS.

        Raises:
            UserError: for an unknown key of the part, or @dataclass above ``register``.
        """
        if _parameters(self.target).keys() != self.parameters.keys():
            raise UserError(
                f"{self.name} was registered before @dataclass: @dataclass must be directly above "
                "the class"
            )
        values = {x: lookup_key(node, key) for x, key in self.keys.items()}
        values = {x: value for x, value in values.items() if value is not None}
        settable = [x for x in self.parameters if x not in self.injected]
        for key, value in node.get(self.group, {}).get(self.name, {}).items():
            if key in self.legacy:
                continue
            if key.lower() not in settable:
                raise UserError(
                    f"{NODE}.{self.group}.{self.name}.{key} is no argument of {self.name}: choose "
                    f"from {[x.upper() for x in settable]}"
                )
            values[key.lower()] = value
        return values

    def nested(self, node: CfgNode) -> dict[str, tuple[Registry, CfgNode]]:
        """Return {argument: (its registry, MODEL.ATSS that names it)} of arguments that are parts.

        Raises:
            UserError: if a name is neither a part nor an overlay, or that of this part.
        """
        found, values = {}, self.defaults | self.arguments(node)
        for argument, kind in self.parts.items():
            if self.keys.get(argument) == kind.key:  # the node itself names it
                found[argument] = kind, node
                continue
            key, value = self.key_of(argument), values.get(argument, "")
            if value == "":
                continue
            is_part, is_overlay = value in kind.entries, value in node.BRANCH
            if not (is_part or is_overlay):
                choices = sorted([*kind.entries, *node.BRANCH])
                raise UserError(f"unknown {key} {value!r}: choose from {choices}{kind.hint(value)}")
            if is_part and is_overlay:
                raise UserError(f"{key} {value!r} names a part and an overlay in {NODE}.BRANCH")
            inner = overlay(node, value) if is_overlay else node.clone()
            inner.defrost()
            if is_part:
                inner[kind.key] = value
            elif kind.key not in node.BRANCH[value]:
                raise UserError(f"{key} is {value!r}: {NODE}.BRANCH.{value} sets no {kind.key}")
            if kind.entries.get(inner[kind.key]) is self:
                raise UserError(f"{key} {value!r} is {self.name} itself")
            found[argument] = kind, inner
        return found

    def build(self, node: CfgNode, injected: Mapping[str, Any], label: str = "") -> Any:
        """Build a class; return a function. ``label`` is key and name, for messages.

        Raises:
            UserError: naming the key of a wrong argument.
        """
        if not inspect.isclass(self.target):
            return self.target
        given = {x: injected[x] for x in self.injected if x in injected and x in self.parameters}
        arguments = self.arguments(node)
        arguments |= {x: None for x in self.parts if arguments.get(x) == ""}
        for argument, (kind, inner) in self.nested(node).items():
            if argument not in given:
                arguments[argument] = kind.build(inner, **injected)
        arguments |= given
        required = {x for x, p in self.parameters.items() if p.default is p.empty}
        if missing := sorted(required - {*arguments}):
            raise UserError(
                f"{label} requires {', '.join(missing)}, which is neither a key nor among the "
                f"values of the detector: {sorted({*self.injected} & {*injected})}"
            )
        try:
            return self.target(**arguments)
        except WrongValue as error:
            key, shared = self.key_of(error.argument), self.keys.get(error.argument)
            if shared and error.argument in self.parts:
                key = f"{key} {lookup_key(node, shared)}"
            raise UserError(f"{key} {error.complaint}") from error
        except ValueError as error:
            message = f"{label} cannot be used: {error}" if label else str(error)
            raise with_message(error, message, is_own(self.target)) from error
        except OSError as error:
            if not is_own(self.target):
                raise
            raise RuntimeError(f"{label} failed") from error  # keeps its traceback


class Registry:
    """The parts of one kind.

    Args:
        key: names the part.
        injected: see :class:`Part`.
        group: node of the arguments; by default the plural of the key.
        optional: whether the key may be "".
        several: whether the key may name several parts, as in "giou + dfl".
        removed: {former part: page with its code}; its arguments are ignored.
    """

    def __init__(
        self,
        key: str,
        injected: Sequence[str] = (),
        group: str = "",
        optional: bool = False,
        several: bool = False,
        removed: Mapping[str, str] | None = None,
    ):
        self.key, self.injected, self.group = key, tuple(injected), group or f"{key}S"
        self.optional, self.several, self.removed = optional, several, removed or {}
        self.entries: dict[str, Part] = {}

    def __iter__(self) -> Iterator[tuple[str, Callable]]:
        return ((name, part.target) for name, part in self.entries.items())

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def get(self, name: str) -> Callable:
        return self.entries[name].target

    def register(self, target: Callable | None = None, *, name: str = "", **options: Any) -> Any:
        """Register a function or class, also as a decorator with or without parentheses.

        Args:
            name: by default the target's.
            options: ``keys``, ``parts`` and ``legacy`` of :class:`Part`.

        Raises:
            UserError: for a registered name, or a function with arguments.
        """
        if target is None:
            return lambda x: self.register(x, name=name, **options)
        name = name or target.__name__
        if name in self.entries:
            raise UserError(f"{self.key} {name} is already registered")
        if not inspect.isclass(target):
            for p in inspect.signature(target).parameters.values():
                if p.default is not p.empty or p.kind is p.KEYWORD_ONLY or p.name in self.injected:
                    raise UserError(
                        f"{self.key} {name} is a function with an argument {p.name}: a part with "
                        "arguments must be a class"
                    )
        self.entries[name] = Part(target, self.injected, self.group, name, **options)
        return target

    def add(self, **targets: Callable) -> None:
        for name, target in targets.items():
            self.register(target, name=name)

    def add_keys(self, node: CfgNode, default: str | None = None) -> None:
        """Add the keys of all parts to MODEL.ATSS, which has the shared keys. ``default`` is a
        part; None if only arguments of parts name this kind.

        Raises:
            ValueError: if a shared key has another default.
        """
        if default is not None:
            node[self.key] = default
        # Open for parts that are registered later; yacs requires one class throughout.
        group = node[self.group] = type(node)(new_allowed=True)
        for name, part in self.entries.items():
            own_keys = type(node)(new_allowed=True)
            for argument, value in part.defaults.items():
                if argument not in part.keys:
                    own_keys[argument.upper()] = value
                elif (shared := lookup_key(node, part.keys[argument])) not in (None, value):
                    raise ValueError(
                        f"{part.key_of(argument)} must be {value!r}, the default of {self.key} "
                        f"{name}, got {shared!r}"
                    )
            if own_keys:
                group[name] = own_keys

    def name_of(self, part: Any) -> str:
        if part is None or isinstance(part, str):
            return part or ""
        return next(name for name, x in self.entries.items() if x.target in (part, type(part)))

    def build(self, node: CfgNode, key: str = "", **injected: Any) -> Any:
        """Build the part that MODEL.ATSS names, by default with the registry's key: None for "",
        {name: part} for several."""
        key, built = key or self.key, {}
        for name in self._names(node, key):
            source, part = self._follow_legacy(node, name)
            built[name] = part.build(source, injected, f"{NODE}.{key} {part.name}")
        return built if self.several else next(iter(built.values()), None)

    def chosen(self, node: CfgNode, key: str = "") -> Iterator[tuple[Registry, str]]:
        """Yield registry and name of each part that MODEL.ATSS names, and of its parts."""
        for name in self._names(node, key or self.key):
            yield self, name
            for kind, inner in self.entries[name].nested(node).values():
                yield from kind.chosen(inner)

    def all_keys(self) -> set[str]:
        shared = (key for part in self.entries.values() for key in part.keys.values())
        return {self.key, self.group, *shared}

    def argument(self, node: CfgNode, argument: str) -> Any:
        """Return an argument's value for the part that MODEL.ATSS names."""
        part = self.entries[lookup_key(node, self.key)]
        return (part.defaults | part.arguments(node))[argument]

    def hint(self, name: str) -> str:
        page = self.removed.get(name)
        return f"; {page} has the code of {name}" if page else OWN_PARTS

    def _names(self, node: CfgNode, key: str) -> list[str]:
        value = lookup_key(node, key)
        if self.optional and value == "":
            return []
        names = [x.strip() for x in value.split("+")] if self.several else [value]
        for name in names:
            if name not in self.entries:
                raise UserError(
                    f"unknown {NODE}.{key} {value!r}: choose from {sorted(self.entries)}"
                    f"{self.hint(name)}"
                )
            if names.count(name) > 1:
                raise UserError(f"{NODE}.{key} {value!r} names {name} twice")
        return names

    def _follow_legacy(self, node: CfgNode, name: str) -> tuple[CfgNode, Part]:
        """Return MODEL.ATSS and the part; for a legacy key, a copy and the new part."""
        group = node.get(self.group, {})
        values = group.get(name, {})
        for argument, other in self.entries[name].legacy.items():
            if values.get(argument) is None:
                continue
            set_too, defaults = group.get(other, {}), self.entries[other].defaults
            if any(set_too.get(x.upper(), default) != default for x, default in defaults.items()):
                raise UserError(
                    f"{NODE}.{self.group}.{name}.{argument} is an older key of {other}, whose "
                    f"arguments are set as well: remove it and set {NODE}.{self.key} to {other}"
                )
            node = node.clone()
            node.defrost()
            node[self.group][other] = values
            return node, self.entries[other]
        return node, self.entries[name]


def _parameters(target: Callable) -> dict[str, inspect.Parameter]:
    found: dict[str, inspect.Parameter] = {}
    for cls in inspect.getmro(target) if inspect.isclass(target) else ():
        if "__init__" not in vars(cls):
            continue
        signature = inspect.signature(cls).parameters.values()
        for p in signature:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                found.setdefault(p.name, p)
        if not any(p.kind is p.VAR_KEYWORD for p in signature):
            break
    return found


def lookup_key(node: CfgNode, key: str) -> Any:
    for name in key.split("."):
        node = node[name]
    return node


def overlay(node: CfgNode, name: str) -> CfgNode:
    """Return a copy of MODEL.ATSS with the values of MODEL.ATSS.BRANCH.<name>.

    Raises:
        UserError: for an unknown overlay or key.
    """
    if name not in node.BRANCH:
        raise UserError(f"unknown {NODE}.BRANCH {name!r}: choose from {sorted(node.BRANCH)}")
    where, values, copy = f"{NODE}.BRANCH.{name}", node.BRANCH[name], node.clone()
    if not isinstance(values, CfgNode):
        raise UserError(f"{where} must contain keys of {NODE}, got {values!r}")
    for key, value in values.items():
        if key not in node:
            raise UserError(f"unknown key {where}.{key}: {NODE} has no {key}")
        if isinstance(value, CfgNode) != isinstance(node[key], CfgNode):
            raise UserError(f"{where}.{key} must be as {NODE}.{key}, got {value!r}")
    copy.defrost()
    try:
        copy.merge_from_other_cfg(values)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"{where}: {str(error.args[0]).partition(chr(10))[0]}") from error
    return copy
