"""All live sequences as columns, so that a policy can look at thousands at once. NumPy; no torch."""

from __future__ import annotations

import math

import numpy as np

from superinfer.runtime.scheduler.sequence import Sequence

COLUMNS = (
    "id",
    "prompt",  # tokens of it
    "arrival",
    "base",  # when token 0 is due, s; inf: nothing is promised
    "pace",  # from one token's due time to the next one's, s; inf: only the first is promised
    "deadline",  # s; inf: none
    "weight",
    "produced",  # tokens generated, or planned to be
    "most",  # max_tokens
    "expected",  # output tokens that the caller expects; 0: it does not say
    "context",  # tokens whose KV the next decode reads
    "prefill",  # tokens to compute before the next one can be sampled; 0 for what decodes or is rotated out
    "shared",  # prompt tokens that siblings have too: whoever comes first computes them, and all come together
    "left",  # tokens still to come, as last predicted
    "load",  # blocks to bring back before the next one; 0 for what has none in DRAM
)
FIRST_ROWS = 256


class Roster:
    """One row for each live sequence, at `sequence.row`. Times are seconds on the engine's clock.

    late: its promise is broken for good. kept: it is to be kept, and whole: not only for its first token's sake.
    kind: index into `kinds`, of its length predictor.
    """

    id: np.ndarray
    prompt: np.ndarray
    arrival: np.ndarray
    base: np.ndarray
    pace: np.ndarray
    deadline: np.ndarray
    weight: np.ndarray
    produced: np.ndarray
    most: np.ndarray
    expected: np.ndarray
    context: np.ndarray
    prefill: np.ndarray
    shared: np.ndarray
    left: np.ndarray
    load: np.ndarray

    def __init__(self) -> None:
        self._table = np.zeros((len(COLUMNS), FIRST_ROWS))
        self._name()
        self.late = np.zeros(FIRST_ROWS, dtype=bool)
        self.live = np.zeros(FIRST_ROWS, dtype=bool)
        self.kept = np.zeros(FIRST_ROWS, dtype=bool)
        self.whole = np.zeros(FIRST_ROWS, dtype=bool)
        self.kind = np.zeros(FIRST_ROWS, dtype=np.int32)
        self.kinds: list[tuple[str, ...]] = []
        self.sequences: list[Sequence | None] = [None] * FIRST_ROWS
        self._kind_ids: dict[tuple[str, ...], int] = {}
        self._free = list(range(FIRST_ROWS - 1, -1, -1))

    def add(self, sequence: Sequence, prefill: int, shared: int = 0) -> None:
        """Give a new sequence its row. prefill: tokens to compute; shared: of its prompt, what siblings compute."""
        if not self._free:
            self._grow()
        row = sequence.row = self._free.pop()
        slo = sequence.slo
        self.base[row] = self.pace[row] = self.deadline[row] = math.inf
        self.id[row], self.prompt[row] = sequence.id, sequence.num_prompt
        self.arrival[row], self.weight[row] = sequence.arrival, 1.0
        if slo is not None:
            self.weight[row] = slo.weight
            if slo.ttft is not None:
                self.base[row] = sequence.arrival + slo.ttft
            if slo.tbt is not None:
                self.pace[row] = slo.tbt
            if slo.deadline is not None:
                self.deadline[row] = sequence.arrival + slo.deadline
        self.produced[row], self.most[row] = 0, max(1, sequence.max_tokens)
        hints = sequence.hints
        self.expected[row] = (hints.expected_tokens or 0.0) if hints is not None else 0.0
        self.context[row], self.prefill[row], self.load[row] = len(sequence.tokens), prefill, 0
        self.left[row], self.shared[row] = self.most[row], shared
        self.late[row], self.live[row] = False, True
        sequence.kept = self.kept[row] = slo is not None and slo.promises_anything
        self.kind[row] = self._kind_of(sequence)
        self.sequences[row] = sequence

    def remove(self, sequence: Sequence) -> None:
        """The sequence ended."""
        row = sequence.row
        self.live[row] = False
        self.sequences[row] = None
        self._free.append(row)
        sequence.row = -1

    def update(self, sequences: list[Sequence], rows: np.ndarray) -> None:
        """Note how far sequences have come, whose rows these are."""
        lengths = np.array([s.length for s in sequences], dtype=float)
        self.context[rows] = lengths
        self.produced[rows] = lengths - self.prompt[rows]
        self.prefill[rows] = np.maximum(np.array([s.resume_at - s.scheduled for s in sequences], dtype=float), 0.0)
        self.load[rows] = 0
        self.late[rows] |= np.array([s.is_late for s in sequences], dtype=bool)
        for row in rows[np.isinf(self.base[rows]) & np.isfinite(self.pace[rows])].tolist():
            sequence = self.sequences[row]  # a stream without a ttft is timed from its first token
            assert sequence is not None
            if sequence.timeline.first is not None:
                self.base[row] = sequence.arrival + sequence.timeline.first

    def due(self, rows: np.ndarray, left: np.ndarray, quickest: float) -> tuple[np.ndarray, np.ndarray]:
        """When the next token of each is due, s, and its pace. left: tokens to come; quickest: a resident's pace."""
        produced, pace = self.produced[rows], self.pace[rows]
        paced = np.isfinite(pace)
        stream = self.base[rows] + np.where(paced, produced * np.where(paced, pace, 0.0), 0.0)
        stream = np.where(~paced & (produced > 0), math.inf, stream)
        end = self.deadline[rows] - left * quickest
        return np.minimum(stream, end), np.where(end < stream, quickest, pace)

    def _kind_of(self, sequence: Sequence) -> int:
        kinds = tuple(name for name in (sequence.program, sequence.slo_class) if name)
        found = self._kind_ids.get(kinds)
        if found is None:
            if len(self.kinds) > 4 * len(self.sequences):  # ids of programs that are gone
                self._renumber()
            found = self._kind_ids[kinds] = len(self.kinds)
            self.kinds.append(kinds)
        return found

    def _renumber(self) -> None:
        used = np.flatnonzero(self.live)
        kept = sorted(set(self.kind[used].tolist()))
        self.kind[used] = np.searchsorted(kept, self.kind[used])
        self.kinds = [self.kinds[at] for at in kept]
        self._kind_ids = {kinds: at for at, kinds in enumerate(self.kinds)}

    def _grow(self) -> None:
        size = len(self.sequences)
        self._table = np.hstack([self._table, np.zeros_like(self._table)])
        self._name()
        self.late = np.append(self.late, np.zeros(size, dtype=bool))
        self.live = np.append(self.live, np.zeros(size, dtype=bool))
        self.kept = np.append(self.kept, np.zeros(size, dtype=bool))
        self.whole = np.append(self.whole, np.zeros(size, dtype=bool))
        self.kind = np.append(self.kind, np.zeros(size, dtype=np.int32))
        self.sequences += [None] * size
        self._free = list(range(2 * size - 1, size - 1, -1))

    def _name(self) -> None:
        for name, column in zip(COLUMNS, self._table, strict=True):
            setattr(self, name, column)
