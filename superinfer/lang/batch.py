"""Many runs at a time: items checked before anything runs, results in their order, nothing left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from superinfer.errors import InvalidRequestError
from superinfer.lang.loop import language_loop, on_language_loop
from superinfer.lang.outcome import Outcome

Item = TypeVar("Item")
T = TypeVar("T")


def check_items(batch: object, check: Callable[[Sequence[Any], Mapping[str, Any]], Item]) -> list[Item]:
    """The items, each as `check` makes it of its arguments. Raises InvalidRequestError naming the item at fault."""
    if isinstance(batch, (str, bytes, Mapping)) or not isinstance(batch, Sequence):
        raise InvalidRequestError(f"batch must be a list of dicts or tuples of arguments, not {type(batch).__name__}")
    items = []
    for i, item in enumerate(batch):
        if isinstance(item, (str, bytes)) or not isinstance(item, (Mapping, Sequence)):
            raise InvalidRequestError(f"item {i} of the batch is {item!r:.80}; give a dict or a tuple of arguments")
        args, named = ((), item) if isinstance(item, Mapping) else (item, {})
        try:
            items.append(check(args, named))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"item {i} of the batch: {error}") from None
    return items


def check_at_once(num_threads: object) -> int | None:
    """How many at a time; None: as many as suit. Raises InvalidRequestError."""
    if num_threads == "auto":
        return None
    if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1:
        raise InvalidRequestError(f"num_threads={num_threads!r} must be 'auto' or an integer of at least 1")
    return num_threads


def in_threads(
    items: Sequence[Item], work: Callable[[Item], T], at_once: int | None, cancel: Callable[[], object]
) -> Generator[T, None, None]:
    """What `work` makes of each item, in their order; what it raises ends them all, at once. cancel: called at the end,
    or when the caller has gone, to stop what still runs."""
    pool = ThreadPoolExecutor(at_once or _auto_threads(), "superinfer-batch")
    outcomes: list[Outcome[T]] = [Outcome() for _ in items]

    def one(item: Item, outcome: Outcome[T]) -> None:
        try:
            outcome.set(work(item))
        except BaseException as error:
            _end_all(outcomes, error)

    futures: list[Future[None]] = []
    try:
        futures.extend(pool.submit(one, item, outcome) for item, outcome in zip(items, outcomes, strict=True))
        for outcome in outcomes:
            yield outcome.result()
    finally:  # all done, or the caller has gone: then nothing of it is wanted any more
        for future in futures:
            future.cancel()
        cancel()
        pool.shutdown(wait=False)


def as_tasks(
    items: Sequence[Item], work: Callable[[Item], Awaitable[T]], at_once: int | None
) -> Generator[T, None, None]:
    """The same, as tasks on the language's loop. Leaving early cancels."""
    if on_language_loop():
        raise RuntimeError("run_batch() would block the event loop that its programs run on; use arun_batch()")
    loop = language_loop().loop
    outcomes: list[Outcome[T]] = [Outcome() for _ in items]
    tasks: list[asyncio.Task[None]] = []

    def start() -> None:
        tasks.extend(_start(items, work, at_once, outcomes))

    def cancel_all() -> None:
        for task in tasks:
            task.cancel()

    try:
        loop.call_soon_threadsafe(start)
        for outcome in outcomes:
            yield outcome.result()
    finally:
        loop.call_soon_threadsafe(cancel_all)  # comes after `start` at any rate


async def as_tasks_here(
    items: Sequence[Item], work: Callable[[Item], Awaitable[T]], at_once: int | None
) -> AsyncGenerator[T, None]:
    """The same, as tasks on the caller's loop. When it is left, or closed, all have ended."""
    outcomes: list[Outcome[T]] = [Outcome() for _ in items]
    tasks = _start(items, work, at_once, outcomes)
    try:
        for outcome in outcomes:
            yield await outcome.get()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _start(
    items: Sequence[Item], work: Callable[[Item], Awaitable[T]], at_once: int | None, outcomes: Sequence[Outcome[T]]
) -> list[asyncio.Task[None]]:
    limit = asyncio.Semaphore(at_once or max(1, len(items)))

    async def one(item: Item, outcome: Outcome[T]) -> None:
        try:
            async with limit:
                outcome.set(await work(item))
        except BaseException as error:
            _end_all(outcomes, error)  # and no loop is ended by it: who waits for the batch gets it

    return [asyncio.create_task(one(item, outcome)) for item, outcome in zip(items, outcomes, strict=True)]


def _end_all(outcomes: Sequence[Outcome[Any]], error: BaseException) -> None:
    """An item's own failure is in its state. What else ends it is meant for all: Ctrl-C, or the batch is not wanted."""
    for outcome in outcomes:
        outcome.fail(error)


def _auto_threads() -> int:
    return min(96, 16 * (os.cpu_count() or 1) + 32)  # they wait for the engine nearly all the time
