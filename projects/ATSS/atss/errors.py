"""Errors whose message is all that a user needs, and checks of arguments that raise them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """An error that the user can fix: a wrong config, wrong data or a wrong command.

    The commands print its message without a traceback. Every other error is a bug and keeps its
    traceback.
    """


class WrongValue(UserError):
    """An argument has a value that is not allowed.

    Args:
        argument: its name. A config replaces it by its key.
        complaint: the rest of the sentence.
    """

    def __init__(self, argument: str, complaint: str):
        super().__init__(f"{argument} {complaint}")
        self.argument, self.complaint = argument, complaint


def check_range(argument: str, value: Any, low: float, high: float = math.inf) -> None:
    """Check that a number, or each number of a sequence, is between two bounds.

    Raises:
        WrongValue: if one is out of range or no number, or the sequence is empty.
    """
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for x in values:
        if not isinstance(x, int | float) or not low <= x <= high:
            bounds = f">= {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise WrongValue(argument, f"must be {bounds}, got {value!r}")
    if not values:
        raise WrongValue(argument, "is empty")


def check_choice(argument: str, value: Any, choices: Sequence[Any]) -> None:
    """Check that a value is one of several.

    Raises:
        WrongValue: if it is not.
    """
    if value not in choices:
        raise WrongValue(argument, f"is {value!r}: choose from {[*choices]}")


def check_writable(option: str, *files: Path) -> None:
    """Check that files can be written, before anything is computed: create their folders, and open
    each file without changing it.

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
