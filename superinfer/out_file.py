"""Files that a command is to write."""

from __future__ import annotations

from pathlib import Path

from superinfer.errors import InvalidRequestError


def check_writable(path: Path | None) -> None:
    """Before minutes of measuring, not after. Raises InvalidRequestError."""
    if path is None or str(path) == "-":
        return
    if path.is_dir():
        raise InvalidRequestError(f"{str(path)!r} is a folder; give the name of a file in it")
    if not path.absolute().parent.is_dir():
        raise InvalidRequestError(f"the folder of {str(path)!r} does not exist; create it or choose another file")
