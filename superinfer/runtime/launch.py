"""Starts an engine process and makes sure that it ends.

The child reports its start on a pipe, one JSON object a line: `{"stage": ..., "progress": 0..1}`, then
`{"address": ...}` or `{"error": ..., "code": ...}`. It holds the reading end of a second pipe, the lifeline, whose
writing end only the parent has: when the parent goes, however it goes, the child reads its end and shuts down. A
process that is forked from the parent closes its copy at once: the engine is not its own, to end or to keep.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from superinfer.errors import EngineUnavailableError, error_from_code
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.tokenizer_files import check_tokenizer

Progress = Callable[[str, float], None]


# Turns for which a thread of torch's, done with its part of an operation, spins until the others are. libgomp's own
# 300,000 are no quicker on an idle machine; where there is other work they take the core from who is waited for.
SPIN = {"GOMP_SPINCOUNT": "5000"}

_lifelines: set[int] = set()  # writing ends of this process's engines


def _forget_engines() -> None:
    """In a process that was forked from the one whose engines they are."""
    for fd in _lifelines:
        with contextlib.suppress(OSError):
            os.close(fd)
    _lifelines.clear()


os.register_at_fork(after_in_child=_forget_engines)


class StartReport(msgspec.Struct, omit_defaults=True):
    """One line of what a starting engine says of itself."""

    stage: str = ""
    progress: float = 0.0
    address: str = ""
    error: str = ""
    code: str = ""


class EngineProcess:
    """A running engine of our own. `close` ends it; leaving the `with` block or the interpreter does too.

    In a process that is forked from this one, `close` does nothing.
    """

    def __init__(self, process: subprocess.Popen[bytes], lifeline: int, folder: Path | None) -> None:
        self._process = process
        self._lifeline = lifeline
        self._folder = folder
        self._owner = os.getpid()
        self.address = ""
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.exit_status is None

    @property
    def exit_status(self) -> int | None:
        """How the process ended, negative for a signal's number; None while it runs."""
        return self._process.poll()

    def close(self, timeout: float = 5.0) -> None:
        """End the engine: politely, then after `timeout` seconds by force. Safe to call twice."""
        atexit.unregister(self.close)
        if os.getpid() != self._owner:
            return  # we were forked from the process whose engine it is
        if self._lifeline >= 0:
            _lifelines.discard(self._lifeline)
            os.close(self._lifeline)
            self._lifeline = -1
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def launch_engine(
    config: EngineConfig | None = None,
    *,
    for_text: bool = False,
    on_progress: Progress | None = None,
    timeout: float = 600.0,
) -> EngineProcess:
    """Start an engine process and wait until it serves. `on_progress(stage, fraction)` is called while it starts.

    for_text: text will be asked of it, so that its model must have a tokenizer.
    Raises what stopped the engine from starting (ModelLoadError, InvalidRequestError, ...), or EngineUnavailableError
    when it is not ready within `timeout` seconds.
    """
    config = config or EngineConfig()
    model = Path(config.model).expanduser()
    if for_text and (model / "config.json").is_file():  # before minutes of loading; all else the engine tells of
        check_tokenizer(model)
    folder = None
    if not config.address:
        folder = Path(tempfile.mkdtemp(prefix="superinfer-"))  # mode 0700: only this user can connect
        config = msgspec.structs.replace(config, address=f"ipc://{folder}/engine.sock")
    report_read, report_write = os.pipe()
    lifeline_read, lifeline_write = os.pipe()
    _lifelines.add(lifeline_write)
    command = [sys.executable, "-m", "superinfer.runtime.engine", "--report-fd", str(report_write)]
    command += ["--lifeline-fd", str(lifeline_read), "--config", msgspec.json.encode(config).decode()]
    if folder is not None:
        command += ["--own-folder", str(folder)]
    try:
        process = subprocess.Popen(
            command,
            pass_fds=(report_write, lifeline_read),
            stdin=subprocess.DEVNULL,
            env=SPIN | os.environ if "OMP_WAIT_POLICY" not in os.environ else None,
            # Ctrl-C reaches the terminal's whole foreground group; the engine ends by its lifeline, after its clients.
            start_new_session=True,
        )
    finally:
        os.close(report_write)
        os.close(lifeline_read)
    engine = EngineProcess(process, lifeline_write, folder)
    try:
        engine.address = _await_start(engine, report_read, on_progress, timeout)
    except BaseException:
        engine.close(timeout=1.0)
        raise
    finally:
        os.close(report_read)
    return engine


def _await_start(engine: EngineProcess, report_fd: int, on_progress: Progress | None, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    buffer = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([report_fd], [], [], left)[0]:
            raise EngineUnavailableError(f"the engine was not ready within {timeout:g} s; raise the timeout")
        chunk = os.read(report_fd, 65536)
        if not chunk:
            code = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = engine._process.wait(5)
            raise EngineUnavailableError(f"the engine process ended while starting (exit status {code})")
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            report = msgspec.json.decode(line, type=StartReport)
            if report.error:
                raise error_from_code(report.code, report.error)
            if report.address:
                return report.address
            if on_progress is not None:
                on_progress(report.stage, report.progress)
