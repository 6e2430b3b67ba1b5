"""An asyncio event loop on a thread of its own: how the synchronous API drives the asynchronous one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """No more items. error: what ended them."""

    error: BaseException | None = None

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class LoopThread:
    """Runs coroutines for callers on other threads. `close` cancels what still runs; a closed loop refuses work."""

    def __init__(self, name: str = "superinfer-loop") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            ended = False
            while not ended:
                # sys.exit() in a task is for whoever waits for that task: it has the exception. The others go on.
                with contextlib.suppress(SystemExit, KeyboardInterrupt):
                    self._loop.run_forever()
                    ended = True
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start `coroutine` on the loop; its future can be waited for or cancelled from any thread."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a synchronous call was made on the event loop's own thread; use the async twin there")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run to the end and return the result. Ctrl-C and a timeout (seconds, TimeoutError) cancel the coroutine."""
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Async twin of `run`, for any loop, this one too. Cancelling the caller cancels the coroutine."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """The items of an async iterator, for a synchronous caller. Leaving the loop early closes the source."""
        items: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        future = self.submit(_pump(source, items.put))
        try:
            while not isinstance(item := items.get(), _End):
                yield item
            item.check()
        finally:
            future.cancel()

    async def aiterate(self, source: AsyncIterator[T]) -> AsyncIterator[T]:
        """Async twin of `iterate`, for any loop, this one too. Closing it, or cancelling its reader, closes the
        source."""
        here, items = asyncio.get_running_loop(), asyncio.Queue[T | _End]()

        def put(item: T | _End) -> None:
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody reads there any more
                here.call_soon_threadsafe(items.put_nowait, item)

        future = asyncio.run_coroutine_threadsafe(_pump(source, put), self._loop)
        try:
            while not isinstance(item := await items.get(), _End):
                yield item
            item.check()
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancel everything, stop the loop and join its thread. Safe to call twice."""
        if self._loop.is_closed() or not self._thread.is_alive():
            return

        async def cancel_all() -> None:
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if threading.current_thread() is not self._thread:
            asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(5)


async def _pump(source: AsyncIterator[T], put: Callable[[T | _End], object]) -> None:
    """Give all items to `put`, then an _End, and close the source."""
    try:
        async for item in source:
            put(item)
    except BaseException as error:
        put(_End(error))
        raise
    else:
        put(_End())
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()
