"""A value that comes later: set on one thread, waited for on any thread or loop.

`concurrent.futures.Future` makes a lock and a condition for each value and wakes loops through a socket: more than most
of what a program does between two calls. Here only who really waits pays.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import Generic, TypeAlias, TypeVar, cast

T = TypeVar("T")

_Waiter: TypeAlias = threading.Event | asyncio.Future[None]

_lock = threading.Lock()  # of the lists of those who wait, all of them: held for an append


class Outcome(Generic[T]):
    """A value or an error; the first one that is set stands. Waiters cannot cancel it: there may be others."""

    __slots__ = ("_error", "_value", "_waiting", "done")

    def __init__(self) -> None:
        self.done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._waiting: list[_Waiter] | None = None

    @classmethod
    def of(cls, value: T) -> Outcome[T]:
        """One that is there."""
        outcome = cls()
        outcome.set(value)
        return outcome

    def set(self, value: T) -> None:
        """The value is here."""
        if not self.done:
            self._value = value
            self._finish()

    def fail(self, error: BaseException) -> None:
        """There will be none: whoever asks for it gets `error`."""
        if not self.done:
            self._error = error
            self._finish()

    def _finish(self) -> None:
        with _lock:
            self.done = True
            waiting, self._waiting = self._waiting, None
        for waiter in waiting or ():
            _wake(waiter)

    def _join(self, waiter: _Waiter) -> None:
        """Wake it when the value is there."""
        with _lock:
            if not self.done:
                self._waiting = self._waiting or []
                self._waiting.append(waiter)
                return
        _wake(waiter)

    @property
    def error(self) -> BaseException | None:
        """What was set instead of a value, if it was."""
        return self._error

    def result(self) -> T:
        """The value, waiting for it on this thread. Raises the error."""
        if not self.done:
            event = threading.Event()
            self._join(event)
            event.wait()
        if self._error is not None:
            raise self._error
        return cast(T, self._value)

    async def get(self) -> T:
        """The value, waiting for it on this loop. Raises the error."""
        if not self.done:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._join(waiter)
            await waiter
        return self.result()


def _wake(waiter: _Waiter) -> None:
    if isinstance(waiter, threading.Event):
        waiter.set()
        return
    loop = waiter.get_loop()
    if asyncio._get_running_loop() is loop:
        _arrived(waiter)
    else:
        with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits there any more
            loop.call_soon_threadsafe(_arrived, waiter)


def _arrived(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():  # else its task was cancelled
        waiter.set_result(None)


def _after_fork() -> None:
    """Whoever held the lock when this process was forked is not in it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
