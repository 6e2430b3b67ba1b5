"""Files that a command is to write."""

from __future__ import annotations

from pathlib import Path

from superinfer.errors import InvalidRequestError


def check_writable(path: Path | None) -> None:
    """Before minutes of measuring, not after. Raises InvalidRequestError."""
    if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
        raise InvalidRequestError(f"the folder of {str(path)!r} does not exist; create it or choose another file")
