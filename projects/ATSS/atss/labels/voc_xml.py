"""Reader of one Pascal VOC xml."""

import re
from math import isfinite
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from xml.etree import ElementTree

from ..errors import UserError
from .folders import why


class Shape(NamedTuple):
    """An object of an xml.

    Attributes:
        name: the class.
        corners: (xmin, ymin, xmax, ymax) as in the file.
        place: the object's name in messages.
    """

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool
    place: str


class Label(NamedTuple):
    """Content of an xml.

    Attributes:
        file_name: ``<filename>`` without folders; may be empty.
        size: (width, height); None if missing or invalid.
        shapes: the valid objects.
        problems: other faults, as ends of sentences.
    """

    file_name: str
    size: tuple[int, int] | None
    shapes: list[Shape]
    problems: list[str]


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Builder that refuses DOCTYPEs: entities can fill the memory, or read other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("DOCTYPE is not supported")


def read_label(path: Path) -> Label:
    try:
        parser = ElementTree.XMLParser(target=_WithoutDoctype())
        root = ElementTree.fromstring(path.read_bytes(), parser)
    except ElementTree.ParseError as error:
        return Label("", None, [], [f"invalid xml: {error}"])
    except (OSError, ValueError, LookupError) as error:  # LookupError: unknown encoding
        return Label("", None, [], [why(error)])
    if root.tag != "annotation":
        return Label("", None, [], [f"expected the root 'annotation', got {root.tag!r}"])
    file_name = PureWindowsPath((root.findtext("filename") or "").strip()).name
    shapes, problems = [], []
    for number, element in enumerate(root.findall("object"), start=1):
        try:
            shapes.append(_shape(element, f"object {number}"))
        except ValueError as error:
            problems.append(f"object {number} {error}")
    return Label(file_name, _size(root), shapes, problems)


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (_number(root.find("size"), side) for side in ("width", "height"))
    except ValueError:
        return None
    whole = width == int(width) and height == int(height) and min(width, height) > 0
    return (int(width), int(height)) if whole else None


def _shape(element: ElementTree.Element, place: str) -> Shape:
    """Read an object.

    Raises:
        UserError: the end of a sentence that names it.
    """
    name = (element.findtext("name") or "").strip()
    if not name:
        raise UserError("has no name")
    boxes, polygon = element.findall("bndbox"), element.find("polygon")
    if len(boxes) > 1:
        raise UserError(f"({name}) has {len(boxes)} boxes")
    try:
        if boxes:
            corners = tuple(_number(boxes[0], key) for key in ("xmin", "ymin", "xmax", "ymax"))
        elif polygon is not None:
            corners = _extent(polygon)
        else:
            raise UserError("has neither a bndbox nor a polygon")
    except ValueError as error:
        raise UserError(f"({name}) {error}") from error
    difficult = (element.findtext("difficult") or "").strip() == "1"
    return Shape(name, corners, difficult, f"{place} ({name})")  # type: ignore[arg-type]


def _extent(polygon: ElementTree.Element) -> tuple[float, float, float, float]:
    """Return the box of points <x1>, <y1>, <x2>, ... or <pt><x>, <y></pt>, ..."""
    coordinates: dict[str, list[float]] = {"x": [], "y": []}
    for element in polygon.iter():
        if re.fullmatch(r"[xy]\d*", element.tag):
            coordinates[element.tag[0]].append(_finite(element.tag, element.text))
    xs, ys = coordinates.values()
    if len(xs) < 3 or len(xs) != len(ys):
        raise UserError(f"has a polygon of {len(xs)} x and {len(ys)} y")
    return min(xs), min(ys), max(xs), max(ys)


def _number(element: ElementTree.Element | None, key: str) -> float:
    text = element.findtext(key) if element is not None else None
    if text is None:
        raise UserError(f"has no {key}")
    return _finite(key, text)


def _finite(key: str, text: str | None) -> float:
    try:
        number = float(text or "")
    except ValueError as error:
        raise UserError(f"has {key} {(text or '').strip()!r}, expected a number") from error
    if not isfinite(number):
        raise UserError(f"has {key} {number}, expected a finite number")
    return number
