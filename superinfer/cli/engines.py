"""Starting or reaching an engine for a command, with progress on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from superinfer.cli.options import check_unset
from superinfer.errors import EngineUnavailableError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import EngineProcess, launch_engine

CONNECT_TIMEOUT_S = 5.0
QUIET_S = 2.0  # without a terminal nothing is said of what takes less


class StartProgress:
    """Shows how far a start has come: a bar on a terminal; elsewhere lines, and only once it takes over two seconds.

    Called as `progress(stage, fraction)`.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._began = time.monotonic()
        self._said = ""
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(what, total=None)
            self._bar.start()

    def __call__(self, stage: str, fraction: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=stage, completed=fraction, total=1.0)
        elif time.monotonic() - self._began > QUIET_S and stage != self._said:
            self._said = stage
            print(f"{self._what}: {stage} {fraction:.0%}", file=sys.stderr)

    def close(self) -> None:
        """Take the bar away. Safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextlib.contextmanager
def start_progress(what: str) -> Iterator[StartProgress]:
    """A StartProgress that is closed at the end."""
    progress = StartProgress(what)
    try:
        yield progress
    finally:
        progress.close()


@contextlib.contextmanager
def engine_address(config: EngineConfig, address: str) -> Iterator[str]:
    """`address` where one was given, else that of an engine that lives as long as the block.

    Raises like `launch_engine`, and InvalidRequestError where `config` says something about the engine at `address`.
    """
    if address:
        check_unset(config, f"--engine {address}")
        yield address
        return
    with start_progress("starting the engine") as progress:
        process = launch_engine(config, for_text=True, on_progress=progress)
    with process:
        yield process.address


def run_engine(config: EngineConfig, address: str) -> None:
    """Start an engine at `address` and wait until it ends or the command is stopped.

    Raises EngineUnavailableError when the engine ends by itself.
    """
    with start_progress("starting the engine") as progress:
        process = launch_engine(msgspec.structs.replace(config, address=address), on_progress=progress)
    with process:
        print(f"engine of {config.model} at {process.address} (Ctrl-C to stop)", flush=True)
        _wait(process)


def _wait(process: EngineProcess) -> None:
    while process.alive:
        time.sleep(0.1)
    raise EngineUnavailableError(f"the engine at {process.address} ended; its last words are above")
