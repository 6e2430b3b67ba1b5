"""From the engine's deltas to one HTTP answer, without a task or a queue in between.

What an answer has not taken yet lies here, merged: a reader that is slower than the engine gets larger pieces, never a
longer queue. So an answer holds at most its own tokens, whatever its client does.

While whoever reads has taken all there was and waits, deltas can go `straight` to the client at the end of the loop's
turn that brought them: most deltas of a stream do, and no task wakes for them. Where the engine is ahead, a turn brings
several of its messages, which then become one write. The last delta of a choice, an error, and all that comes while the
client is slow go through `get`, so that there is one order and one end.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from superinfer.errors import DeadlineMissedError
from superinfer.runtime.client import deadline_text
from superinfer.runtime.protocol import Generate, SequenceDelta
from superinfer.runtime.text import SequenceReader, TextClient, TextDelta, TextRequest

MERGE_AT = 64  # deltas held unmerged

# Called with the tokens that a model wrote and the text that the client was given of them.
Wrote = Callable[[list[int], str], object]


class ClientGone(Exception):
    """The HTTP client closed its connection: nobody is left to answer."""


class Straight(Protocol):
    """A way to the client that never waits."""

    @property
    def is_open(self) -> bool:
        """Whether `write` may be called now."""

    def write(self, deltas: list[TextDelta]) -> None:
        """Sends them."""


class Outbox:
    """The feeds that have something for their clients at the end of this turn of the event loop. One for a server: a
    callback for each of a thousand streams would cost as much as the writes."""

    def __init__(self) -> None:
        self._due: list[Feed] = []

    def add(self, feed: Feed) -> None:
        """Flush it, once, when this turn is over."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._flush)
        self._due.append(feed)

    def _flush(self) -> None:
        due, self._due = self._due, []
        for feed in due:
            feed.flush()


class Feed:
    """The text of all continuations of some requests, choices numbered through. Use it as a context manager: leaving
    it cancels what has not finished. The first error ends them all."""

    def __init__(
        self,
        text: TextClient,
        requests: Sequence[TextRequest],
        *,
        eager: bool,
        outbox: Outbox | None = None,
        interval: float = 0.0,
        wrote: Wrote | None = None,
    ) -> None:
        """`eager`: give out deltas as they come, rather than when something has ended. `outbox`: the server's.
        `interval`: seconds for which they are kept first; none where there are stop strings to look for.
        `wrote`: called soon after a choice has ended."""
        self._text = text
        self._outbox = outbox or Outbox()
        stops = any(request.stop for request in requests)
        self._eager = eager or stops
        self._interval = 0.0 if stops else interval
        self._wires = [text.wire(request) for request in requests]
        # What nobody wants yet the engine need not send, step by step. Several continuations it would tell of at
        # different times: pieces of these are gathered here.
        if not self._eager or (self._interval and sum(request.sampling.n for request in requests) == 1):
            kept_s = self._interval if self._eager else math.inf
            self._wires = [msgspec.structs.replace(wire, interval_s=kept_s) for wire in self._wires]
            self._interval = 0.0
        asked = zip(requests, self._wires, strict=True)
        self._readers = [reader for request, wire in asked for reader in text.readers(request, wire)]
        self._owner = [at for at, request in enumerate(requests) for _ in range(request.sampling.n)]
        self._first = [self._owner.index(at) for at in range(len(requests))]
        self._open = [request.sampling.n for request in requests]
        self._gathering: asyncio.TimerHandle | None = None
        self._is_due = not self._interval  # whether what is pending may go
        self.straight: Straight | None = None
        self._flush_is_due = False
        self._pending: list[tuple[int, SequenceDelta]] = []
        self._merge_at = MERGE_AT
        self._wrote = wrote
        self._written: dict[int, tuple[list[int], list[str]]] = {}  # tokens and text of each choice, for `wrote`
        self._error: Exception | None = None
        self._has_begun = False  # whether anything has been given out
        self._waiter: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Send the requests. Raises EngineDeadError."""
        for at, wire in enumerate(self._wires):
            await self._text.client.open(wire, self._sink(at))

    def _sink(self, at: int) -> Callable[[SequenceDelta | Exception], None]:
        first, wire = self._first[at], self._wires[at]

        def take(delta: SequenceDelta | Exception) -> None:
            if isinstance(delta, Exception):
                self.fail(delta)
                return
            self._pending.append((first + delta.index, delta))
            if delta.finish_reason is not None:
                self._open[at] -= 1
                self._is_due = True
                if delta.finish_reason == "deadline" and wire.slo is not None and wire.slo.on_miss == "raise":
                    self.fail(DeadlineMissedError(deadline_text(wire, delta)))
                self._wake()
            elif self._is_due and self._eager:
                self._soon()
            elif self._eager and self._gathering is None:
                self._gathering = asyncio.get_running_loop().call_later(self._interval, self._gathered)
            if len(self._pending) >= self._merge_at:
                self._merge()

        return take

    def _gathered(self) -> None:
        self._gathering, self._is_due = None, True
        self._soon()

    def _soon(self) -> None:
        """Something is pending: it goes straight at the end of this turn of the loop, or whoever reads takes it."""
        waiter = self._waiter
        if self._flush_is_due or waiter is None or waiter.done():
            return
        if self.straight is None:
            self._wake()
            return
        self._flush_is_due = True
        self._outbox.add(self)

    def flush(self) -> None:
        """Send what is pending straight, unless it has a reader by now."""
        self._flush_is_due = False
        waiter, straight = self._waiter, self.straight
        if waiter is None or straight is None or waiter.done():
            return
        if not straight.is_open:
            self._wake()
            return
        try:
            if deltas := self._taken():
                self._has_begun = True
                straight.write(deltas)
        except Exception as error:  # of this answer alone
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Whoever reads gets `error`, once."""
        self._error = self._error or error
        self._wake()

    def leave(self) -> None:
        """The client is gone."""
        self.fail(ClientGone())

    @property
    def is_over(self) -> bool:
        """Whether all has been given out, and no error."""
        return not self._pending and self._error is None and not any(self._open)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _merge(self) -> None:
        """One delta a continuation in place of all that are held."""
        merged: dict[int, list[SequenceDelta]] = {}
        for choice, delta in self._pending:
            merged.setdefault(choice, []).append(delta)
        self._pending = [(choice, _joined(deltas)) for choice, deltas in merged.items()]
        self._merge_at = MERGE_AT + 2 * len(self._pending)

    async def get(self) -> list[TextDelta]:
        """What came since the last call, waiting for it; [] once all has finished. Raises what ended the requests: at
        once where nothing was given out before, else after what came before it."""
        while True:
            if self._error is not None and not self._is_to_be_told_first(self._error):
                raise self._error
            if self._pending and (self._is_due or self._error is not None):
                if out := self._taken():
                    self._has_begun = True
                    return out
                continue
            if not any(self._open):
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _is_to_be_told_first(self, error: Exception) -> bool:
        """Whether what is pending still goes to the reader. Not the end of a choice: an error is the end."""
        if not self._has_begun or not self._pending or isinstance(error, ClientGone):
            return False
        return all(delta.finish_reason is None for _, delta in self._pending)

    def _taken(self) -> list[TextDelta]:
        """What is pending, as text."""
        if len(self._pending) > 1:
            self._merge()
        pending, self._pending = self._pending, []
        self._is_due = not self._interval
        if len(pending) == 1:  # most of the time
            text = self._read(*pending[0])
            return [text] if text is not None else []
        return [text for choice, delta in pending if (text := self._read(choice, delta)) is not None]

    def _read(self, choice: int, delta: SequenceDelta) -> TextDelta | None:
        reader: SequenceReader = self._readers[choice]
        was_stopped = reader.stopped_by is not None
        out = reader.read(delta)
        if self._wrote is not None:
            self._note(choice, delta, out, self._wrote)
        if reader.stopped_by is not None and not was_stopped and delta.finish_reason is None:
            self._text.client.cancel(self._wire_of(choice).request_id, delta.index)  # its last delta has the report
        if out is None or out.index == choice:
            return out
        return TextDelta(choice, out.text, out.token_ids, out.logprobs, out.finish_reason, out.stop, out.report)

    def _note(self, choice: int, delta: SequenceDelta, out: TextDelta | None, wrote: Wrote) -> None:
        ids, texts = self._written.setdefault(choice, ([], []))
        ids += delta.token_ids
        if out is not None:
            texts.append(out.text)
        if delta.finish_reason in ("stop", "length"):
            kept = ids[:-1] if delta.finish_reason == "stop" else ids  # the token that ended it is no part of it
            asyncio.get_running_loop().call_soon(wrote, kept, "".join(texts))  # the answer goes first

    def _wire_of(self, choice: int) -> Generate:
        return self._wires[self._owner[choice]]

    def close(self) -> None:
        """Cancel what has not finished. Safe to call twice."""
        if self._gathering is not None:
            self._gathering.cancel()
        self._error = None  # which has been raised, and so holds on to all that waited here
        for wire, unfinished in zip(self._wires, self._open, strict=True):
            self._text.client.release(wire.request_id, finished=unfinished == 0)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _joined(deltas: list[SequenceDelta]) -> SequenceDelta:
    if len(deltas) == 1:
        return deltas[0]
    logprobs = [logprob for delta in deltas for logprob in delta.logprobs or []]
    return msgspec.structs.replace(
        deltas[-1],
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=logprobs if any(delta.logprobs is not None for delta in deltas) else None,
    )
