"""Whether a client takes what was written for it, and what to do with one that does not.

What waits in a plain connection's buffer is seen there, and the connection says when it is much. Under TLS all of an
answer is handed on at once, encrypted, to a connection that nobody can ask; so the kernel is asked how much the client
has acknowledged, which Linux tells.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from typing import Any, NamedTuple

TICK_S = 0.25
_BYTES_ACKED = 120  # where Linux's tcp_info has tcpi_bytes_acked, a uint64


class Outbound(NamedTuple):
    """waiting: bytes that have been written and not taken. gone: grows as some are."""

    waiting: int
    gone: int


class UnreadWatch:
    """Of one connection: cuts it off when the client has taken nothing for a while of what waits for it. Under TLS also
    when the connection is being closed and the client has all: it need not say that it knows."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop, patience_s: float, *, tls: bool) -> None:
        self._transport, self._loop = transport, loop
        self._patience_s, self._tls = patience_s, tls
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0  # when something was taken last
        self._before = Outbound(0, 0)

    def start(self) -> None:
        """Something has been written that may have to wait. Safe to call twice."""
        if self._timer is None and (found := self._outbound()) is not None:
            self._before, self._since = found, self._loop.time()
            self._again()

    def stop(self) -> None:
        """Nothing waits any more, or the connection is lost. Safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _again(self) -> None:
        self._timer = self._loop.call_later(min(TICK_S, self._patience_s), self._check)

    def _check(self) -> None:
        self._timer = None
        before, found = self._before, self._outbound()
        if found is None:
            return
        self._before = found
        if found.gone > before.gone:
            self._since = self._loop.time()
        elif found.waiting == before.waiting == 0:  # twice: between, the loop would have handed more to the kernel
            if self._transport.is_closing():
                self._transport.abort()
            return
        elif self._loop.time() - self._since >= self._patience_s:
            self._transport.abort()
            return
        self._again()

    def _outbound(self) -> Outbound | None:
        """None where it cannot be known."""
        if not self._tls:
            waiting = self._transport.get_write_buffer_size()
            return Outbound(waiting, -waiting)
        line = self._transport.get_extra_info("socket")
        try:
            told = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
            (gone,) = struct.unpack_from("<Q", told, _BYTES_ACKED)
            (waiting,) = struct.unpack("i", fcntl.ioctl(line.fileno(), termios.TIOCOUTQ, bytes(4)))
        except (AttributeError, OSError, ValueError, struct.error):  # another system, or a socket that is closed
            return None
        return Outbound(waiting + self._transport.get_write_buffer_size(), gone)
