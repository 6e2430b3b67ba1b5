"""The command line as a person starts it: a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest


@dataclass
class Command:
    """A started command. Lines of its stdout are read as they come."""

    process: subprocess.Popen[str]
    folder: Path
    lines: list[str] = field(default_factory=list)

    def line(self, having: str) -> str:
        """The next line of stdout that holds `having`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if having in line:
                return line
        raise AssertionError(f"no line with {having!r} in {self.lines}; {self.end()}")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, timeout: float = 120) -> tuple[int, str, str]:
        """Wait; returns status, rest of stdout, stderr."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def left_behind(self) -> list[str]:
        """Our folders and any socket in its folder for temporary files; torch makes a cache there that is not ours."""
        found = self.folder.rglob("*")
        return sorted(str(path) for path in found if path.is_socket() or path.name.startswith("superinfer-"))


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Starts `superinfer ARGS`; what still runs at the end is killed."""
    with starting() as run:
        yield run


@contextlib.contextmanager
def starting() -> Iterator[Callable[..., Command]]:
    """`start` for fixtures that outlive a test."""
    started: list[Command] = []
    with tempfile.TemporaryDirectory(prefix="cli-") as folder:  # short: the path of a socket has at most 107 bytes

        def run(*arguments: str, stdin: str | None = None, **environment: str) -> Command:
            process = subprocess.Popen(
                [sys.executable, "-m", "superinfer", *arguments],
                stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "TMPDIR": folder, "COLUMNS": "100", **environment},
            )
            if stdin is not None:
                assert process.stdin is not None
                process.stdin.write(stdin)
                process.stdin.flush()
            started.append(Command(process, Path(folder)))
            return started[-1]

        yield run
        for command in started:
            if command.process.poll() is None:
                command.process.kill()
                command.process.communicate()


@pytest.fixture
def run(start: Callable[..., Command]) -> Callable[..., tuple[int, str, str]]:
    """Runs `superinfer ARGS` to its end: status, stdout, stderr."""
    return lambda *arguments, stdin=None, **environment: start(*arguments, stdin=stdin, **environment).end()
