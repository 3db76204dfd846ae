"""Thresholds of scores, one for each class, as `tools/report.py --json` measures them."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .media import FileError

DEFAULT = 0.4  # least score without other thresholds


def class_thresholds(
    source: str | os.PathLike[str] | Mapping[str, float | None], names: Sequence[str]
) -> list[float | None]:
    """Return the threshold of each class of a detector, None for a class without one. Classes are
    matched by name; names that the detector does not have are logged.

    Args:
        source: a json of `tools/report.py`, or {class name: score}.
        names: of the detector's classes.

    Raises:
        FileError: if the file has no thresholds, or none of the detector's classes.
    """
    if isinstance(source, Mapping):
        scores, source = _check(source, "the dictionary"), "the dictionary"
    else:
        scores = _check(_read(source), source)
    unknown = [name for name in scores if name not in names]
    if len(unknown) == len(scores):
        raise FileError(
            f"{source} has thresholds of {_few(scores) or 'no class'}, the detector has "
            f"{_few(names) or 'no class names'}"
        )
    if unknown:
        sentence = "%s has classes that the detector does not have: %s"
        logging.getLogger(__name__).warning(sentence, source, _few(unknown))
    return [scores.get(name) for name in names]


def _read(file: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        with open(file, encoding="utf-8-sig") as opened:
            content = json.load(opened)
    except OSError as error:
        raise FileError(f"cannot read the thresholds {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file} is not valid json: {error}") from error
    thresholds = content.get("thresholds") if isinstance(content, dict) else None
    if not isinstance(thresholds, dict):
        raise FileError(f"{file} has no 'thresholds': pass a file of tools/report.py --json")
    return {k: x.get("score") if isinstance(x, dict) else x for k, x in thresholds.items()}


def _check(scores: Mapping[str, Any], source: object) -> Mapping[str, float | None]:
    for name, score in scores.items():
        if not (score is None or is_score(score)):
            got = repr(score)[:40]
            raise FileError(f"{source}: the score of {name!r} must be between 0 and 1, got {got}")
    return scores


def per_class(thresholds: Sequence[float | None], default: float) -> np.ndarray:
    """Return (K,) float32 thresholds, the default if a class has none."""
    return np.array([default if x is None else x for x in thresholds], dtype=np.float32)


def is_score(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _few(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join([*names][:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
