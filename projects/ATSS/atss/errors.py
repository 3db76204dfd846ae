"""Errors that a user can fix, and checks that raise them."""

import math
from collections.abc import Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Error that the user can fix in config, data or command. Commands print its message without a
    traceback; any other error is a bug and keeps it."""

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython and notebooks print: the message without a traceback."""
        return [f"{type(self).__name__}: {self}"]


class WrongValue(UserError):
    """Error for an argument whose value is not allowed.

    Args:
        argument: :mod:`atss.registry` replaces it by the config key.
        complaint: the rest of the message.
    """

    def __init__(self, argument: str, complaint: str):
        super().__init__(f"{argument} {complaint}")
        self.argument, self.complaint = argument, complaint

    def __reduce__(self) -> tuple:  # an exception is copied with the arguments of its base
        return type(self), (self.argument, self.complaint)


def with_message(error: Exception, message: str, own: bool = True) -> ValueError:
    """Return an error with another message.

    Args:
        own: whether the user's own code may have raised it: then it stays a ValueError, whose
            traceback is printed, unless it is a UserError.
    """
    return (ValueError if own and not isinstance(error, UserError) else UserError)(message)


def check_range(argument: str, value: Any, low: float, high: float = math.inf) -> None:
    """Check that a number, or each number of a sequence, is between two bounds.

    Raises:
        WrongValue: also if a value is no number, or the sequence is empty.
    """
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for x in values:
        if not isinstance(x, int | float) or not low <= x <= high:
            bounds = f">= {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise WrongValue(argument, f"must be {bounds}, got {value!r}")
    if not values:
        raise WrongValue(argument, "is empty")


def check_choice(argument: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise WrongValue if a value is not among the choices."""
    if value not in choices:
        raise WrongValue(argument, f"is {value!r}: choose from {[*choices]}")


def check_shape(maker: str, values: Any, shape: Sequence[int], broadcasts: bool = True) -> None:
    """Check the shape of a tensor that a part returns.

    Args:
        maker: the part, for the message.
        broadcasts: whether a shape that broadcasts to ``shape`` is allowed.

    Raises:
        UserError: naming the part and both shapes.
    """
    sizes = getattr(values, "shape", None)
    if sizes is not None and len(sizes) <= len(shape):
        pairs = zip(reversed(sizes), reversed(shape), strict=False)
        if sizes == shape or (broadcasts and all(a == b or a == 1 for a, b in pairs)):
            return
    got = type(values).__name__ if sizes is None else tuple(sizes)
    also = ", or one that broadcasts to it" if broadcasts else ""
    raise UserError(f"{maker} must return a tensor of shape {tuple(shape)}{also}, got {got}")


def arg(
    default: T, *, low: float = -math.inf, high: float = math.inf, choices: Sequence[Any] = ()
) -> T:
    """Declare a dataclass field with a default and bounds or choices, for :class:`Checked`."""
    check = partial(check_range, low=low, high=high)
    if choices:
        check = partial(check_choice, choices=choices)
    return field(default=default, metadata={"check": check})


class Checked:
    """Base of dataclasses that checks fields declared with :func:`arg`. An overriding
    ``__post_init__`` calls that of its base first."""

    def __post_init__(self) -> None:
        for name, declared in getattr(self, "__dataclass_fields__", {}).items():
            if "check" in declared.metadata:
                declared.metadata["check"](name, getattr(self, name))


def check_writable(option: str, *files: Path) -> None:
    """Create the folders of files, and open each file without changing it.

    Args:
        option: of the command line that names them.

    Raises:
        OSError: naming the option and the file.
    """
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            exists = file.exists()
            with file.open("a"):
                pass
            if not exists:
                file.unlink()
        except OSError as error:
            raise OSError(f"cannot write {option} {file}: {error.strerror}") from error
