"""Blocks of a pool that hold nothing. Pure Python; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class FreeBlocks:
    """Of 0 .. count - 1, all at first. Those that a copy may still touch are handed out last, in their order."""

    def __init__(self, count: int) -> None:
        self._clear = list(range(count - 1, -1, -1))  # the next one is the last
        self._later: list[int] = []

    def __len__(self) -> int:
        return len(self._clear) + len(self._later)

    def __iter__(self) -> Iterator[int]:
        yield from self._clear
        yield from self._later

    def give(self, blocks: Sequence[int]) -> None:
        """They are free."""
        self._clear += blocks

    def give_later(self, blocks: Sequence[int]) -> None:
        """They are free, with a copy pending on them."""
        self._later += blocks

    def take(self, count: int) -> list[int]:
        """So many, of which there must be that many."""
        clear, later = self._clear, self._later
        if count == 1 and clear:
            return [clear.pop()]
        at = len(clear) - count
        if at >= 0:
            taken = clear[at:]
            del clear[at:]
            taken.reverse()
            return taken
        assert -at <= len(later), "more blocks were asked for than are free"
        taken = clear[::-1] + later[:-at]
        clear.clear()
        del later[:-at]
        return taken
