"""Parts that a config names: registered once, their signatures are the keys.

Under MODEL.ATSS, ``<KEY>`` names a part of a kind, and ``<KEY>S.<name>`` holds its arguments in
capitals. An argument may have a key that other parts share, ``keys``, which holds where the part's
own does not say otherwise. What is known only while building (channels, the box code) is injected
by the name of the parameter: ``known``. An argument may be a part itself, ``parts``: its key names
it, or an overlay of MODEL.ATSS.BRANCH that holds the same keys with other values.

A part without arguments is a function; one with arguments is a class, which is built. A ValueError
in building becomes a sentence that names the key; any other error is a bug in the part and keeps
its traceback.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from yacs.config import CfgNode

from .errors import UserError, WrongValue

NODE = "MODEL.ATSS"
# Follows the names that are known.
OWN_PARTS = "; --import registers parts of your own"


class Entry(NamedTuple):
    target: Callable
    keys: Mapping[str, str]  # parameter -> key under the node, with dots where it lies deeper
    parts: Mapping[str, Registry]  # parameter -> the kind of part that it is
    legacy: Mapping[str, str]  # argument that it had -> the part that has it now


class Registry:
    """The parts of one kind.

    Args:
        key: that names the part.
        injected: parameters that the builder sets, so that they are no keys.
        group: the node of arguments, where it is not the key in the plural.
        optional: "" names none.
        several: the key may name some that act together, as in "giou + dfl".
        gone: name of a part that there was -> the page that holds its code. Arguments of it, which
            a finished run's config has, are read and ignored.
    """

    def __init__(
        self,
        key: str,
        injected: Sequence[str] = (),
        group: str = "",
        optional: bool = False,
        several: bool = False,
        gone: Mapping[str, str] | None = None,
    ):
        self.gone = gone or {}
        self.key, self.injected, self.group = key, tuple(injected), group or f"{key}S"
        self.optional, self.several = optional, several
        self.entries: dict[str, Entry] = {}

    def __iter__(self) -> Iterator[tuple[str, Callable]]:
        return ((name, entry.target) for name, entry in self.entries.items())

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def get(self, name: str) -> Callable:
        """What is registered under a name."""
        return self.entries[name].target

    def register(
        self,
        target: Callable | None = None,
        *,
        name: str = "",
        keys: Mapping[str, str] | None = None,
        parts: Mapping[str, Registry] | None = None,
        legacy: Mapping[str, str] | None = None,
    ) -> Any:
        """As a decorator, with parentheses or without, or called; ``name`` is the target's own by
        default.

        Args:
            legacy: key of an argument that the part no longer has -> the part that has it. A config
                in which it is not None means that part, with this one's other arguments.

        Raises:
            ValueError: where the name is taken, or a function has arguments to be set.
        """
        if target is None:
            return lambda x: self.register(x, name=name, keys=keys, parts=parts, legacy=legacy)
        name = name or target.__name__
        if name in self.entries:
            raise UserError(f"{self.key} {name} is registered already")
        if not inspect.isclass(target):
            for p in inspect.signature(target).parameters.values():
                if p.default is not p.empty or p.kind is p.KEYWORD_ONLY or p.name in self.injected:
                    raise UserError(
                        f"{self.key} {name} is a function with an argument {p.name}: a part with "
                        "arguments is a class"
                    )
        self.entries[name] = Entry(target, keys or {}, parts or {}, legacy or {})
        return target

    def add(self, **targets: Callable) -> None:
        """Registers some by their names."""
        for name, target in targets.items():
            self.register(target, name=name)

    def add_keys(self, node: CfgNode, default: str | None = None) -> None:
        """The keys of all parts with the defaults of their signatures. The groups stay open for
        parts that are registered later.

        Args:
            node: which has the keys that parts share.
            default: the part that is named by default; None where parts of this kind are only named
                by arguments of others.

        Raises:
            ValueError: where a shared key is not there, or has another default.
        """
        if default is not None:
            node[self.key] = default
        # yacs wants one class throughout.
        group = node[self.group] = type(node)(new_allowed=True)
        for name, entry in self.entries.items():
            own = type(node)(new_allowed=True)
            for p in self._parameters(name):
                if p.name in self.injected or p.default is p.empty:
                    continue
                if p.name not in entry.keys:
                    kind = entry.parts.get(p.name)
                    own[p.name.upper()] = kind.name_of(p.default) if kind else p.default
                    continue
                shared = lookup_key(node, entry.keys[p.name])
                if shared not in (None, p.default):
                    raise UserError(
                        f"{self.key} {name} wants {p.default!r} as the default of "
                        f"{NODE}.{entry.keys[p.name]}, which is {shared!r}"
                    )
            if own:
                group[name] = own

    def name_of(self, part: Any) -> str:
        """The name of a part that is a default; "" for None."""
        if part is None or isinstance(part, str):
            return part or ""
        return next(name for name, target in self if part is target or type(part) is target)

    def build(self, node: CfgNode, key: str = "", **known: Any) -> Any:
        """The part that the node names, None for none; those that it names by their names, where
        there may be several.

        Args:
            key: that names it, where it is not the kind's own.
            known: what parameters of these names get.

        Raises:
            ValueError: naming the key that is at fault, in full.
        """
        key = key or self.key
        names = self._named(node, key)
        built = {name: self._build(*self._current(node, name), key, known) for name in names}
        return built if self.several else next(iter(built.values()), None)

    def chosen(self, node: CfgNode, key: str = "") -> Iterator[tuple[Registry, str]]:
        """Kind and name of every part that is named here, parts of parts with them."""
        for name in self._named(node, key or self.key):
            yield self, name
            for kind, inner in self._inner(node, name).values():
                yield from kind.chosen(inner)

    def argument(self, node: CfgNode, key: str, parameter: str) -> Any:
        """Return the value of a parameter of the part that a key names."""
        name = lookup_key(node, key)
        defaults = {p.name: p.default for p in self._parameters(name)}
        return {**defaults, **self._given(node, name)}[parameter]

    def shared_keys(self) -> set[str]:
        """Keys that parts of this kind share."""
        return {key for entry in self.entries.values() for key in entry.keys.values()}

    def _named(self, node: CfgNode, key: str) -> list[str]:
        """The parts that a key names.

        Raises:
            ValueError: for one that is not known, none, or one twice.
        """
        value = lookup_key(node, key)
        if self.optional and value == "":
            return []
        names = [x.strip() for x in value.split("+")] if self.several else [value]
        for name in names:
            if name not in self.entries:
                raise UserError(
                    f"unknown {NODE}.{key} {value!r}: choose from {sorted(self.entries)}"
                    f"{self._hint(name)}"
                )
            if names.count(name) > 1:
                raise UserError(f"{NODE}.{key} {value!r} names {name} twice")
        return names

    def _hint(self, name: str) -> str:
        return f"; {self.gone[name]} has the code of {name}" if name in self.gone else OWN_PARTS

    def _current(self, node: CfgNode, name: str) -> tuple[CfgNode, str]:
        """The part that a name means, and the node with its arguments."""
        given = node.get(self.group, {}).get(name, {})
        for argument, other in self.entries[name].legacy.items():
            if given.get(argument) is not None:
                own = node[self.group].get(other, {})
                if any(own.get(k, x) != x for k, x in self._defaults(other).items()):
                    written = f"{NODE}.{self.group}.{name}.{argument}"
                    raise UserError(
                        f"{written} is an older key of {other}, whose arguments are set as well: "
                        f"leave it out and name {NODE}.{self.key} {other}"
                    )
                node = node.clone()
                node.defrost()
                node[self.group][other] = given
                return node, other
        return node, name

    def _defaults(self, name: str) -> dict[str, Any]:
        """Keys of a part's arguments with the values that configs have by default."""
        kinds = self.entries[name].parts
        return {
            p.name.upper(): kinds[p.name].name_of(p.default) if p.name in kinds else p.default
            for p in self._parameters(name)
            if p.default is not p.empty
        }

    def _build(self, node: CfgNode, name: str, key: str, known: Mapping[str, Any]) -> Any:
        target = self.entries[name].target
        if not inspect.isclass(target):
            return target
        parameters = {p.name: p for p in self._parameters(name)}
        arguments = self._given(node, name)
        arguments |= {p: known[p] for p in parameters if p in self.injected and p in known}
        arguments |= {p: None for p in self.entries[name].parts if arguments.get(p) == ""}
        for p, (kind, inner) in self._inner(node, name).items():
            arguments[p] = kind.build(inner, **known)
        lacks = [p for p, x in parameters.items() if x.default is x.empty and p not in arguments]
        if lacks:
            raise UserError(
                f"{NODE}.{key} {name} wants {', '.join(lacks)}, which neither the config says nor "
                f"the detector: it knows {sorted({*self.injected} & {*known})}"
            )
        try:
            return target(**arguments)
        except WrongValue as error:
            raise UserError(f"{self._key_of(name, error.argument)} {error.complaint}") from error
        except ValueError as error:
            raise UserError(f"{NODE}.{key} {name} does not work here: {error}") from error

    def _given(self, node: CfgNode, name: str) -> dict[str, Any]:
        """The arguments that the config says of a part.

        Raises:
            ValueError: for one that it does not take.
        """
        keys, legacy = self.entries[name].keys, self.entries[name].legacy
        takes = [p.name for p in self._parameters(name) if p.name not in self.injected]
        shared = {p: lookup_key(node, key) for p, key in keys.items()}
        given = {p: value for p, value in shared.items() if value is not None}
        for written, value in node.get(self.group, {}).get(name, {}).items():
            if written in legacy:
                continue
            if written.lower() not in takes:
                raise UserError(
                    f"{NODE}.{self.group}.{name}.{written} is no argument of {name}; it takes "
                    f"{[x.upper() for x in takes]}"
                )
            given[written.lower()] = value
        return given

    def _inner(self, node: CfgNode, name: str) -> dict[str, tuple[Registry, CfgNode]]:
        """Kind and node of each part that is an argument of a part.

        Raises:
            ValueError: for a name that is neither a part nor an overlay, or one that leads back.
        """
        entry, found = self.entries[name], {}
        given = self._given(node, name)
        defaults = {p.name: p.default for p in self._parameters(name)}
        for p, kind in entry.parts.items():
            inner = given.get(p, kind.name_of(defaults[p]))
            where = self._key_of(name, p)
            if inner == "":
                continue
            if inner not in kind and inner not in node.BRANCH:
                known = sorted([*kind.entries, *node.BRANCH])
                raise UserError(
                    f"unknown {where} {inner!r}: choose from {known}{kind._hint(inner)}"
                )
            if inner in kind and inner in node.BRANCH:
                raise UserError(f"{where} is {inner!r}, a part and an overlay of {NODE}.BRANCH")
            copy = overlay(node, inner) if inner in node.BRANCH else node.clone()
            copy.defrost()
            if inner in kind:
                copy[kind.key] = inner
            elif kind.key not in node.BRANCH[inner]:
                raise UserError(
                    f"{where} is {inner!r}, but {NODE}.BRANCH.{inner} names no {kind.key}"
                )
            if kind is self and copy[kind.key] == name:
                raise UserError(f"{where} is {inner!r}, which is {name} again")
            found[p] = kind, copy
        return found

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


def lookup_key(node: CfgNode, key: str) -> Any:
    """The value of a key, with dots where it lies deeper."""
    for name in key.split("."):
        node = node[name]
    return node


def overlay(node: CfgNode, name: str) -> CfgNode:
    """A copy of the node with what BRANCH.<name> says over it.

    Raises:
        ValueError: for an unknown overlay, or naming a key in it that there is not.
    """
    where = f"{NODE}.BRANCH.{name}"
    if name not in node.BRANCH:
        raise UserError(f"{NODE}.BRANCH has no {name!r}; it has {sorted(node.BRANCH)}")
    over, copy = node.BRANCH[name], node.clone()
    if not isinstance(over, CfgNode):
        raise UserError(f"{where} must hold keys of {NODE}, not {over!r}")
    for key, value in over.items():
        if key not in node:
            raise UserError(f"{where}.{key}: there is no key {NODE}.{key}")
        if isinstance(value, CfgNode) != isinstance(node[key], CfgNode):
            raise UserError(f"{where}.{key} must be as {NODE}.{key}, not {value!r}")
    copy.defrost()
    try:
        copy.merge_from_other_cfg(over)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"{where}: {str(error.args[0]).partition(chr(10))[0]}") from error
    return copy
