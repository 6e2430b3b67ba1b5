"""`superinfer run FILE`: a program file with an engine as its default backend."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path
from types import TracebackType

import superinfer
from superinfer.cli.engines import CONNECT_TIMEOUT_S, engine_address
from superinfer.errors import InvalidRequestError, SuperinferError
from superinfer.runtime.config import EngineConfig


def run_file(file: Path, arguments: list[str], config: EngineConfig, address: str) -> None:
    """Run `file` as `__main__` would be. Its own errors are shown as Python shows them; ours name the line they came
    from.

    Raises InvalidRequestError when there is no such file, SystemExit when the program ended in an error, and what
    starting or reaching an engine raises.
    """
    if not file.is_file():
        raise InvalidRequestError(f"there is no file {str(file)!r}; give the path of a Python file")
    with (
        engine_address(config, address) as found,
        superinfer.RuntimeEndpoint(found, timeout=CONNECT_TIMEOUT_S) as backend,
    ):
        superinfer.set_default_backend(backend)
        try:
            _run(file, arguments)
        finally:
            superinfer.set_default_backend(None)


def _run(file: Path, arguments: list[str]) -> None:
    before = sys.argv, sys.path
    sys.argv, sys.path = [str(file), *arguments], [str(file.resolve().parent), *sys.path]
    try:
        runpy.run_path(str(file), run_name="__main__")
    except SuperinferError as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        where = f"{file}, line {lines[-1]}: " if lines else ""
        raise SuperinferError(f"{where}{error}") from error
    except Exception as error:
        own = _from_file(error.__traceback__, file)
        sys.excepthook(type(error), error.with_traceback(own), own)
        raise SystemExit(1) from None
    finally:
        sys.argv, sys.path = before


def _from_file(frames: TracebackType | None, file: Path) -> TracebackType | None:
    """The traceback without the frames that ran the file; none where it could not be compiled."""
    while frames is not None and frames.tb_frame.f_code.co_filename != str(file):
        frames = frames.tb_next
    return frames
