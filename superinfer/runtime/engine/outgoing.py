"""Tokens that their clients do not want at once: kept, and told with a later delta. Pure Python.

A delta for each token of each sequence costs the engine, the wire and the client more than the tokens are worth to a
program that reads an answer only when it is whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from superinfer.runtime.protocol import TokenLogprob
from superinfer.runtime.scheduler.sequence import Sequence, SequenceUpdate


@dataclass(slots=True)
class _Paced:
    """interval, told: seconds; told: when the last delta went."""

    interval: float
    told: float = -1.0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Outgoing:
    """The sequences of requests with an `interval_s`, and what of theirs is kept."""

    def __init__(self) -> None:
        self._paced: dict[Sequence, _Paced] = {}

    def pace(self, sequences: Iterable[Sequence], interval_s: float) -> None:
        """Their deltas are to be so far apart: the first comes so long after the first token."""
        for sequence in sequences:
            self._paced[sequence] = _Paced(interval_s)

    def keeps(self, update: SequenceUpdate, now: float) -> bool:
        """Whether this update is kept for a later delta."""
        paced = self._paced.get(update.sequence) if self._paced else None
        if paced is None or update.finish_reason is not None:
            return False
        since = now - paced.told if paced.told >= 0.0 else 0.0
        if paced.told < 0.0:
            paced.told = now  # the interval begins with the first token
        if since < paced.interval:
            paced.token_ids += update.token_ids
            paced.logprobs += update.logprobs or ()
            return True
        paced.told = now
        return False

    def all_of(self, update: SequenceUpdate) -> tuple[list[int], list[TokenLogprob] | None]:
        """The update's tokens with those that were kept before, which are told now."""
        paced = self._paced.get(update.sequence) if self._paced else None
        if paced is None:
            return update.token_ids, update.logprobs
        token_ids, logprobs = paced.token_ids + update.token_ids, paced.logprobs + (update.logprobs or [])
        paced.token_ids, paced.logprobs = [], []
        if update.finish_reason is not None:
            del self._paced[update.sequence]
        return token_ids, logprobs or update.logprobs

    def forget(self, sequence: Sequence) -> None:
        """It ends without a last delta."""
        self._paced.pop(sequence, None)
