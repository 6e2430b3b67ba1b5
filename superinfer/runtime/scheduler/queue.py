"""The sequences that wait, in the order of a key each was given on joining. Pure Python."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from superinfer.runtime.scheduler.sequence import Sequence

Key = tuple[float, ...]


class WaitingQueue:
    """A sorted list: joining and leaving move pointers only (a few µs at 16,000), so no step sorts the whole queue."""

    def __init__(self) -> None:
        self._entries: list[tuple[Key, int, Sequence]] = []  # the id before the sequence: equal keys compare by it
        self._keys: dict[int, Key] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, _, sequence in self._entries)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.id in self._keys

    def entries(self) -> list[tuple[Key, int, Sequence]]:
        """Keys, ids and sequences, in order: a copy, that nobody who joins or leaves disturbs."""
        return self._entries[:]

    def drop_last(self) -> None:
        """The last of them waits no longer. IndexError if there is none."""
        del self._keys[self._entries.pop()[1]]

    def add(self, sequence: Sequence, key: Key) -> None:
        """Let the sequence wait; its id must not be waiting already."""
        assert sequence.id not in self._keys, f"sequence {sequence.id} waits already"
        self._keys[sequence.id] = key
        insort(self._entries, (key, sequence.id, sequence))

    def remove(self, sequence: Sequence) -> None:
        """The sequence waits no longer. KeyError if it did not."""
        at = bisect_left(self._entries, (self._keys.pop(sequence.id), sequence.id))
        del self._entries[at]
