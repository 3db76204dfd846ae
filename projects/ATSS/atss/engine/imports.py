"""Modules of --import."""

import importlib
import os
import sys
from pathlib import Path

from ..errors import UserError


def import_modules(names: list[str]) -> None:
    """Import modules, by name (also from the current folder) or by file.

    Raises:
        UserError: if a module, or one that it imports, does not exist.
    """
    sys.path.insert(0, os.getcwd())
    for name in names:
        file = None
        if name.endswith(".py") or os.sep in name or not all(name.split(".")):
            file = Path(name).expanduser().resolve()
            if not file.is_file():
                raise UserError(f"--import {name}: no such file")
            sys.path.insert(0, str(file.parent))  # for modules beside it
        try:
            module = importlib.import_module(file.stem if file else name)
        except ModuleNotFoundError as error:
            hint = f"; pass its path, such as --import path/to/{name.replace('.', '/')}.py"
            is_itself = not file and error.name == name.partition(".")[0]
            raise UserError(f"--import {name}: {error}{hint if is_itself else ''}") from error
        except OSError as error:  # from the module's code, which needs its traceback
            raise RuntimeError(f"--import {name} failed") from error
        if file and Path(str(getattr(module, "__file__", None))).resolve() != file:
            raise UserError(f"--import {name}: {module} has the same name: rename the file")
