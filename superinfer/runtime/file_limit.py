"""How many files, connections among them, this process may have open."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

from superinfer.errors import EngineUnavailableError

SPARE = 64  # files that a process opens beside its connections: code, data, pipes
_LEAST = 4


def raise_file_limit() -> None:
    """A connection is a file, and many systems let a process have 1,024 unless it asks for more."""
    with contextlib.suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def connections_within(wanted: int) -> int:
    """Connections that one pool may hold at a time: `wanted`, or fewer where the limit on files leaves no room for
    them. Raises the limit first. Raises EngineUnavailableError where there is hardly room for any."""
    raise_file_limit()
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return wanted
    room = most - _open_files() - SPARE
    if room < _LEAST:
        raise EngineUnavailableError(
            f"this process may have {most} files open at a time, too few for connections to a server beside those it "
            "has; raise the hard limit (ulimit -Hn)"
        )
    return min(wanted, room)


def _open_files() -> int:
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:  # no such folder on this system
        return SPARE
