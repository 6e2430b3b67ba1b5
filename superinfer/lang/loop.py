"""The one event loop on which all programs of this process make their calls."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from superinfer.runtime.loop_thread import LoopThread

T = TypeVar("T")

_lock = threading.Lock()
_loop: LoopThread | None = None


def language_loop() -> LoopThread:
    """The loop, started on first use; its thread is a daemon and lives as long as the process."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = LoopThread("superinfer-lang")
        return _loop


def on_language_loop() -> bool:
    """Whether the caller runs on that loop, where waiting for a call would wait for itself."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        return False
    return _loop is not None and running is _loop.loop


class Threads:
    """Threads of the whole process, started as they are wanted, whose work a loop waits for."""

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """A StopIteration is a RuntimeError, as in coroutines: a loop's future cannot hold it, and who waits would wait
        for ever."""

        def run() -> T:
            try:
                return work(*arguments)
            except StopIteration as error:
                raise RuntimeError("StopIteration was raised: catch it, or give next() a default") from error

        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._most, self._name)
            return self._pool.submit(run)

    def _forget(self) -> None:
        """In a child that was forked: the threads stayed in its parent."""
        self._pool, self._lock = None, threading.Lock()


def _after_fork() -> None:
    """The thread stayed in the process that was forked; this one starts a loop of its own."""
    global _lock, _loop
    _lock, _loop = threading.Lock(), None


os.register_at_fork(after_in_child=_after_fork)
