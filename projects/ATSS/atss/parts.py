"""Parts that a config names: registered once, their signatures are the keys.

Under MODEL.ATSS, ``<KEY>`` names a part of a kind, and ``<KEY>S.<name>`` holds its arguments in
capitals. An argument that several parts share, or that had a key before, keeps that: ``keys``. What
is known only while building (channels, the box code) is injected by the name of the parameter:
``known``. An argument may be a part itself: ``parts``; its key names it, or an overlay of
MODEL.ATSS.BRANCH that holds the same keys with other values.

A part without arguments is a function; one with arguments is a class, which is built. What is wrong
with a config raises ValueError, in a sentence that names the key; any other error is a bug in the
part and keeps its traceback.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from yacs.config import CfgNode

NODE = "MODEL.ATSS"


class WrongValue(ValueError):
    """One argument has a value that it cannot have.

    Args:
        argument: its name; a config says its key in place of it.
        complaint: the rest of the sentence.
    """

    def __init__(self, argument: str, complaint: str):
        super().__init__(f"{argument} {complaint}")
        self.argument, self.complaint = argument, complaint


def within(argument: str, value: Any, low: float, high: float = math.inf) -> None:
    """That a number, or each of some, lies between two.

    Raises:
        WrongValue: where it does not, is no number, or there is none.
    """
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for number in numbers:
        if not isinstance(number, int | float) or not low <= number <= high:
            least_and_most = f"from {low:g}" + (f" to {high:g}" if high < math.inf else " on")
            raise WrongValue(argument, f"must be {least_and_most}, not {value!r}")
    if not numbers:
        raise WrongValue(argument, "is empty")


def one_of(argument: str, value: Any, known: Sequence[Any]) -> None:
    """That a value is among those that there are.

    Raises:
        WrongValue: where it is not.
    """
    if value not in known:
        raise WrongValue(argument, f"is {value!r}; known are {[*known]}")


class Entry(NamedTuple):
    target: Callable
    keys: Mapping[str, str]  # parameter -> key under the node, with dots where it lies deeper
    parts: Mapping[str, Parts]  # parameter -> the kind of part that it is


class Parts:
    """The parts of one kind.

    Args:
        key: that names the part.
        known: parameters that are injected, and so are no keys.
        group: the node of arguments, where it is not the key in the plural.
        optional: "" names none.
        several: the key may name some that act together, as in "giou + dfl".
    """

    def __init__(
        self,
        key: str,
        known: Sequence[str] = (),
        group: str = "",
        optional: bool = False,
        several: bool = False,
    ):
        self.key, self.known, self.group = key, tuple(known), group or f"{key}S"
        self.optional, self.several = optional, several
        self.entries: dict[str, Entry] = {}

    def __iter__(self) -> Iterator[tuple[str, Callable]]:
        return ((name, entry.target) for name, entry in self.entries.items())

    def get(self, name: str) -> Callable:
        """What is registered under a name."""
        return self.entries[name].target

    def register(
        self,
        target: Callable | None = None,
        *,
        name: str = "",
        keys: Mapping[str, str] | None = None,
        parts: Mapping[str, Parts] | None = None,
    ) -> Any:
        """As a decorator, with parentheses or without, or called; ``name`` is the target's own by
        default.

        Raises:
            ValueError: where the name is taken, or a function has arguments to be set.
        """
        if target is None:
            return lambda x: self.register(x, name=name, keys=keys, parts=parts)
        name = name or target.__name__
        if name in self.entries:
            raise ValueError(f"{self.key} {name} is registered already")
        if not inspect.isclass(target):
            for p in inspect.signature(target).parameters.values():
                if p.default is not p.empty or p.kind is p.KEYWORD_ONLY:
                    raise ValueError(
                        f"{self.key} {name} is a function with an argument {p.name}: a part with "
                        "arguments is a class"
                    )
        self.entries[name] = Entry(target, keys or {}, parts or {})
        return target

    def add(self, **targets: Callable) -> None:
        """Registers some by their names."""
        for name, target in targets.items():
            self.register(target, name=name)

    def named(self, node: CfgNode, key: str = "") -> list[str]:
        """The parts that the node names."""
        value = lookup_key(node, key or self.key)
        if self.several:
            return [x.strip() for x in value.split("+") if x.strip()]
        return [value] if value or not self.optional else []

    def add_keys(self, node: CfgNode, default: str | None = None) -> None:
        """The keys of all parts with the defaults of their signatures. The groups stay open for
        parts that are registered later.

        Args:
            default: the part that is named by default; None where parts of this kind are only named
                by arguments of others.

        Raises:
            ValueError: where two parts share a key with different defaults, or where the node holds
                another default already.
        """
        if default is not None:
            node[self.key] = default
        # yacs wants one class throughout.
        group = node[self.group] = type(node)(new_allowed=True)
        for name, entry in self.entries.items():
            own = type(node)(new_allowed=True)
            for p in self._parameters(name):
                if p.name in self.known or p.default is p.empty:
                    continue
                value = p.default
                if p.name in entry.parts:
                    value = entry.parts[p.name].name_of(value)
                if p.name not in entry.keys:
                    own[p.name.upper()] = value
                    continue
                *path, last = entry.keys[p.name].split(".")
                holder = lookup_key(node, ".".join(path)) if path else node
                if holder.setdefault(last, value) != value:
                    raise ValueError(
                        f"{self.key} {name} wants {value!r} as the default of "
                        f"{NODE}.{entry.keys[p.name]}, which is {holder[last]!r}"
                    )
            if own:
                group[name] = own

    def name_of(self, part: Any) -> str:
        """The name of a part that is a default."""
        if isinstance(part, str):
            return part
        of = [name for name, target in self if part is target or type(part) is target]
        return of[0]

    def build(self, node: CfgNode, key: str = "", **known: Any) -> Any:
        """The part that the node names, None for none; those that it names by their names, where
        there may be several.

        Args:
            key: that names it, where it is not the kind's own.
            known: what parameters of these names get.

        Raises:
            ValueError: naming the key that is at fault, in full.
        """
        built = {
            name: self._build(node, key or self.key, name, known) for name in self.named(node, key)
        }
        if self.several:
            return built
        return next(iter(built.values()), None)

    def _build(self, node: CfgNode, key: str, name: str, known: Mapping[str, Any]) -> Any:
        if name not in self.entries:
            raise ValueError(f"{NODE}.{key} is {name!r}; known are {sorted(self.entries)}")
        target = self.entries[name].target
        if not inspect.isclass(target):
            return target
        arguments = self._arguments(node, key, name, known)
        try:
            return target(**arguments)
        except WrongValue as error:
            raise ValueError(f"{self._key_of(name, error.argument)} {error.complaint}") from error
        except ValueError as error:
            raise ValueError(f"{NODE}.{key} {name} does not work here: {error}") from error

    def _arguments(
        self, node: CfgNode, key: str, name: str, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What a part is built with."""
        entry = self.entries[name]
        parameters = {p.name: p for p in self._parameters(name)}
        arguments = {p: known[p] for p in parameters if p in self.known and p in known}
        own = [p for p in parameters if p not in self.known and p not in entry.keys]
        for written, value in node.get(self.group, {}).get(name, {}).items():
            if written.lower() not in own:
                where = f"{NODE}.{self.group}.{name}.{written}"
                hint = f"it takes {[x.upper() for x in own]}"
                if written.lower() in entry.keys:
                    hint = f"use {NODE}.{entry.keys[written.lower()]}"
                raise ValueError(f"{where} is no argument of {name}; {hint}")
            arguments[written.lower()] = value
        arguments |= {p: lookup_key(node, k) for p, k in entry.keys.items()}
        for p, kind in entry.parts.items():
            default = parameters[p].default
            if p in arguments or default is not inspect.Parameter.empty:
                inner = arguments.get(p) or kind.name_of(default)
                arguments[p] = kind.build(overlay(node, inner, kind.key), **known)
        lacks = [p for p, x in parameters.items() if x.default is x.empty and p not in arguments]
        if lacks:
            raise ValueError(
                f"{NODE}.{key} {name} wants {', '.join(lacks)}, which neither the config says nor "
                f"the detector: it knows {sorted({*self.known} & {*known})}"
            )
        return arguments

    def _key_of(self, name: str, argument: str) -> str:
        keys = self.entries[name].keys
        return f"{NODE}.{keys.get(argument, f'{self.group}.{name}.{argument.upper()}')}"

    def _parameters(self, name: str) -> Iterator[inspect.Parameter]:
        """What configs can set or builders inject; where a class hands on ``**arguments``, those of
        the class that it extends, too."""
        target, seen = self.entries[name].target, set()
        if not inspect.isclass(target):
            return
        for cls in target.__mro__:
            if "__init__" not in vars(cls):
                continue
            parameters = list(inspect.signature(cls).parameters.values())
            for p in parameters:
                if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in seen:
                    seen.add(p.name)
                    yield p
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                return

    def chosen(self, node: CfgNode, key: str = "") -> Iterator[tuple[Parts, str]]:
        """Kind and name of every part that is named here, parts of parts with them."""
        for name in self.named(node, key):
            yield self, name
            if name in self.entries:
                own = node.get(self.group, {}).get(name, {})
                for p, kind in self.entries[name].parts.items():
                    if p.upper() in own:
                        yield from kind.chosen(overlay(node, own[p.upper()], kind.key))


def lookup_key(node: CfgNode, key: str) -> Any:
    """The value of a key, with dots where it lies deeper."""
    for name in key.split("."):
        node = node[name]
    return node


def overlay(node: CfgNode, name: str, key: str = "") -> CfgNode:
    """A copy of the node with what BRANCH.<name> says over it; where there is no such overlay and
    ``key`` is given, with ``name`` under that key.

    Raises:
        ValueError: for an unknown overlay, or naming a key in it that there is not.
    """
    copy = node.clone()
    copy.defrost()
    if name not in node.BRANCH:
        if not key:
            raise ValueError(f"{NODE}.BRANCH has no {name!r}; it has {sorted(node.BRANCH)}")
        copy[key] = name
        return copy
    if key and key not in node.BRANCH[name]:
        raise ValueError(f"{NODE}.BRANCH.{name} must name its {key}")
    try:
        copy.merge_from_other_cfg(node.BRANCH[name])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{NODE}.BRANCH.{name}: {error.args[0]}") from error
    return copy
