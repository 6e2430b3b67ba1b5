"""Files that a command is to write."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from superinfer.errors import InvalidRequestError


def check_writable(path: Path | None, *, or_stdout: bool = False) -> None:
    """Before minutes of measuring, not after. or_stdout: "-" means standard output. Raises InvalidRequestError."""
    if path is None or (or_stdout and str(path) == "-"):
        return
    if str(path) == "-":
        raise InvalidRequestError("'-' is not standard output here, where tables go; give the name of a file")
    if os.path.isdir(path):  # Path.is_dir raises where a name is too long
        raise InvalidRequestError(f"{str(path)!r} is a folder; give the name of a file in it")
    if not os.path.isdir(path.absolute().parent):
        raise InvalidRequestError(f"the folder of {str(path)!r} does not exist; create it or choose another file")


def write_json(path: Path, value: Any) -> None:
    """`value` as `json_text` has it. Raises InvalidRequestError where the file cannot be written."""
    try:
        path.write_text(json_text(value) + "\n")
    except OSError as error:
        raise InvalidRequestError(f"{str(path)!r} cannot be written ({error.strerror}); choose another file") from None


def json_text(value: Any) -> str:
    """JSON for people too; what is not a finite number is null."""
    return json.dumps(without_nan(value), indent=1)


def without_nan(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null in their place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, list | tuple) else value
