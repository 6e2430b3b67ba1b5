"""Updates as the deltas that clients read. Pure Python.

A delta for each token of each sequence costs the engine, the wire and the client more than the tokens are worth to a
program that reads an answer only when it is whole: tokens that a client does not want at once are kept, and told with a
later delta. And what says whose a token is need not be made anew for a sequence that gets one in every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from superinfer.runtime.protocol import SequenceDelta, TokenLogprob
from superinfer.runtime.scheduler.sequence import Sequence, SequenceUpdate


@dataclass(slots=True)
class _Paced:
    """interval, told: seconds; told: when the last delta went."""

    interval: float
    told: float = -1.0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Outgoing:
    """The sequences of requests with an `interval_s`, and what of theirs is kept; and deltas that are used again."""

    def __init__(self) -> None:
        self._paced: dict[Sequence, _Paced] = {}
        self._roll: list[Sequence] = []  # whom `steady` was asked for last
        self._deltas: dict[Sequence, SequenceDelta] = {}  # theirs, but for paced ones'
        self._by_client: dict[bytes, list[SequenceDelta]] = {}  # the same
        self._kept: list[tuple[int, _Paced]] = []  # the paced of them, by their places in the roll

    def steady(
        self, sequences: list[Sequence], tokens: list[int], now: float
    ) -> tuple[dict[bytes, list[SequenceDelta]], list[SequenceUpdate]]:
        """Deltas by client of one new token for each of `sequences`, and updates of those that are paced and whose
        interval is over; of the other paced ones it is kept.

        They hold until the next call: encode them first. The quicker if `sequences` is the same list as last time.
        """
        if sequences is not self._roll:
            known, self._roll, self._deltas, self._by_client = self._deltas, sequences, {}, {}
            self._kept = []
            for at, sequence in enumerate(sequences):
                if self._paced and (kept := self._paced.get(sequence)) is not None:
                    self._kept.append((at, kept))
                    continue
                delta = known.get(sequence)
                if delta is None:
                    delta = SequenceDelta(request_id=sequence.request_id, index=sequence.index, token_ids=[0])
                self._deltas[sequence] = delta
                self._by_client.setdefault(sequence.owner, []).append(delta)
        if not self._kept:
            for delta, token in zip(self._deltas.values(), tokens, strict=True):
                delta.token_ids[0] = token
            return self._by_client, []
        if self._deltas:
            for sequence, token in zip(sequences, tokens, strict=True):
                if (delta := self._deltas.get(sequence)) is not None:
                    delta.token_ids[0] = token
        paced = []
        for at, kept in self._kept:
            if kept.told < 0.0:
                kept.told = now
            if now - kept.told < kept.interval:
                kept.token_ids.append(tokens[at])
            else:
                paced.append(SequenceUpdate(sequences[at], [tokens[at]], None, None))
        return self._by_client, paced

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
