"""Turns that will go on: the KV of a request whose caller said `keep_s`, kept for that long and brought back in time.

An agent's turn ends with a tool call; the next turn extends its tokens when the tool has answered. Meanwhile its KV is
cached like any other, except that DRAM drops it last; shortly before it is expected back, what of it has left HBM is
copied in. Nothing that would be lost makes room for it. Pure Python; no torch.
"""

from __future__ import annotations

from array import array
from bisect import insort
from itertools import count

from superinfer.runtime.scheduler.rotation import Rotation
from superinfer.runtime.scheduler.sequence import Sequence

MOST = 1024  # turns expected back at a time, the soonest; others are kept all the same, and loaded when they come
KEEP = 2.0  # times as long as was said: a tool is late now and then
EARLY_SHARE = 0.2  # share of the time by which a turn may be back before it was said to be
RETRY_S = 0.1  # where nothing could make room


class Returns:
    """What is expected back, soonest first. Times are seconds on the engine's clock."""

    def __init__(self, rotation: Rotation) -> None:
        self._rotation = rotation
        self._expected: list[tuple[float, int, float, array[int], str]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._expected)

    def ended(self, sequence: Sequence, now: float) -> None:
        """Before the table of a finished sequence is given up: keep it, if its caller comes back."""
        keep_s = sequence.hints.keep_s if sequence.hints is not None else None
        table = sequence.table
        if keep_s is None or table is None or not table.num_cached:
            return
        until = now + KEEP * keep_s
        self._rotation.kv.keep(table, until)
        load_s = 2.0 * table.num_cached * self._rotation.block_s
        start = now + max(0.0, (1.0 - EARLY_SHARE) * keep_s - load_s)
        self._expect(start, next(self._numbers), until, sequence.tokens, sequence.salt)

    def bring_back(self, now: float, most: int) -> None:
        """Before a plan takes its copies: at most `most` blocks of those expected soon; and let go of those overdue."""
        kv = self._rotation.kv
        kv.let_go(now)
        while most > 0 and self._expected and self._expected[0][0] <= now:
            _, number, until, tokens, salt = self._expected.pop(0)
            path = kv.match(tokens, salt, len(tokens))
            absent, _ = kv.absent(path)
            if not absent or now >= until:
                continue
            loaded = kv.prefetch(path, min(most, absent))
            most -= loaded
            if loaded < absent:
                again = now if loaded else now + RETRY_S
                self._expect(again, number, until, tokens, salt)
                if loaded:
                    return  # the rest with the next plan

    def _expect(self, start: float, number: int, until: float, tokens: array[int], salt: str) -> None:
        insort(self._expected, (start, number, until, tokens, salt))
        del self._expected[MOST:]
