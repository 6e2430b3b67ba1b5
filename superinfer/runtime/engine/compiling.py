"""Sequences whose grammar is still being compiled: not with the scheduler yet."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from superinfer.runtime.scheduler.sequence import Sequence, SequenceUpdate, Status


class Compiling:
    """Held by request, each with its grammar's future."""

    def __init__(self) -> None:
        self._held: list[tuple[Future[Any], list[Sequence]]] = []

    def __len__(self) -> int:
        """Sequences that are held."""
        return sum(len(sequences) for _, sequences in self._held)

    def hold(self, grammar: Future[Any], sequences: list[Sequence]) -> None:
        """Keep a request's sequences until the grammar is compiled."""
        self._held.append((grammar, list(sequences)))

    def expired(self, now: float) -> list[Sequence]:
        """Those whose deadline is over and that are not to be finished after it; no longer held."""
        over = [sequence for _, sequences in self._held for sequence in sequences if _is_expired(sequence, now)]
        for sequence in over:
            self._drop(sequence)
        return over

    def compiled(self) -> Iterator[tuple[list[Sequence], BaseException | None]]:
        """The sequences of each request whose grammar is there, or why it is not; no longer held."""
        for item in [item for item in self._held if item[0].done()]:
            self._held.remove(item)
            grammar, sequences = item
            yield sequences, grammar.exception()

    def cancel(self, sequence: Sequence, now: float) -> SequenceUpdate | None:
        """End a sequence that is held. None if it is not."""
        if not self._drop(sequence):
            return None
        end(sequence, now)
        sequence.finish_reason, sequence.finished_at = "cancelled", now
        return SequenceUpdate(sequence, [], None, "cancelled")

    def _drop(self, sequence: Sequence) -> bool:
        """Whether it was held. A request of which nothing is left is forgotten, and its grammar's result with it."""
        for at, (_, sequences) in enumerate(self._held):
            if sequence in sequences:
                sequences.remove(sequence)
                if not sequences:
                    del self._held[at]
                return True
        return False


def end(sequence: Sequence, now: float) -> None:
    """It will never be with the scheduler."""
    sequence.status = Status.FINISHED
    sequence.stages.end(now)


def _is_expired(sequence: Sequence, now: float) -> bool:
    slo = sequence.slo
    return (
        slo is not None
        and slo.deadline is not None
        and slo.on_miss != "finish"
        and sequence.arrival + slo.deadline <= now
    )
