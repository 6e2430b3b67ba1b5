"""Starts servers, waits until they answer, keeps their logs and ends them with all their processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from arms import Arm, Sizes, command_of, environment_of

STOP_S = 20.0  # for an orderly end, then it is killed
_COUNTER = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})? (\S+)$")
_GAUGE = re.compile(r"^# TYPE (\S+) gauge$", re.MULTILINE)
_NO_COUNTS = ("_bucket", "_created", "http_", "python_", "process_")


class ServerFailed(Exception):
    """It ended, or was not ready in time; the message holds the end of its log."""


class Server:
    """One arm's server process. The log is `folder`/ARM.log. url: where it answers HTTP; engine: the address of our
    engine behind it, "" for vLLM."""

    def __init__(
        self, arm: Arm, sizes: Sizes, gpu: int | None, port: int, folder: Path, stand_in: bool = False
    ) -> None:
        self.arm, self.gpu, self.port = arm, gpu, port
        self.url = f"http://127.0.0.1:{port}"
        # Of its own, and short: a socket's path may have 107 characters.
        self._sockets = tempfile.TemporaryDirectory(prefix="superinfer-peer-")
        self.engine = f"ipc://{self._sockets.name}/engine" if arm.engine == "superinfer" or stand_in else ""
        self.command = command_of(arm, sizes, port, self.engine, stand_in)
        self.log = folder / f"{arm.name}.log"
        self.ready_s: float | None = None
        folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=environment_of(arm, gpu, folder.parent),
                cwd=folder,  # `python -m` looks here for modules first
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self._began = time.monotonic()

    def wait_ready(self, limit_s: float) -> float:
        """Seconds from its start until /health said yes. Raises ServerFailed."""
        while time.monotonic() - self._began < limit_s:
            if self._process.poll() is not None:
                raise ServerFailed(f"{self.arm.name} ended with status {self._process.returncode}\n{self.tail()}")
            if self._get("/health") is not None:
                self.ready_s = time.monotonic() - self._began
                return self.ready_s
            time.sleep(0.25)
        raise ServerFailed(f"{self.arm.name} was not ready after {limit_s:.0f} s\n{self.tail()}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def tail(self, lines: int = 25) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def counters(self) -> dict[str, float]:
        """The server's own counters, summed over labels. Empty where it tells none."""
        return counted(self._get("/metrics") or "")

    def _get(self, path: str) -> str | None:
        """None: no answer, or not a good one."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return str(answer.read(), errors="replace")
        except OSError:  # URLError and HTTPError are such too
            return None

    def stop(self) -> None:
        """End it and every process it started; returns when the GPU's memory is free again."""
        if self.alive:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        until = time.monotonic() + 10
        while self._group_lives() and time.monotonic() < until:
            time.sleep(0.1)
        self._sockets.cleanup()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _group_lives(self) -> bool:
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True


def counted(metrics: str) -> dict[str, float]:
    """What metrics in Prometheus' text format have counted, summed over labels. A gauge says nothing of a stretch of
    time, whose end is not its beginning and something more."""
    found: dict[str, float] = {}
    gauges = set(_GAUGE.findall(metrics))
    for line in metrics.splitlines():
        match = _COUNTER.match(line)
        if match and match[1] not in gauges and not any(part in match[1] for part in _NO_COUNTS):
            with contextlib.suppress(ValueError):
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


def moved(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What counters did in between, those that moved."""
    deltas = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {name: round(delta, 6) for name, delta in deltas.items() if delta}
