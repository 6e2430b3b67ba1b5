"""All live sequences as columns, so that a policy can look at thousands at once. NumPy; no torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from superinfer.runtime.scheduler.residents import Residents
from superinfer.runtime.scheduler.sequence import Sequence

FLAGS = ("late", "live", "hopeful", "kept", "whole")
FIRST_ROWS = 256


class Columns(NamedTuple):
    """What is known of sequences in numbers, one entry of each array a sequence. Times are seconds on the engine's
    clock.

    prompt: tokens of it. base: when token 0 is due; inf: nothing is promised. pace: from one token's due time to the
        next one's; inf: only the first is promised. deadline: inf: none.
    produced: tokens generated, or planned to be. most: max_tokens. expected: output tokens that the caller expects; 0:
        it does not say. context: tokens whose KV the next decode reads.
    prefill: tokens to compute before the next one can be sampled; 0 for what decodes or is rotated out.
    shared: prompt tokens that siblings have too: whoever comes first computes them, and all come together.
    common: prompt tokens in blocks that others hold as well, which take no room of its own.
    left: tokens still to come, as last predicted. load: blocks to bring back before the next one; 0 for what has none
        in DRAM.
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
    common: np.ndarray
    left: np.ndarray
    load: np.ndarray

    def streamed(self) -> np.ndarray:
        """When the next token of each is due for its stream to be in time, s; inf: no stream is promised."""
        pace, produced = self.pace, self.produced
        paced = np.isfinite(pace)
        if paced.all():
            return self.base + produced * pace
        stream: np.ndarray = self.base + np.where(paced, produced * np.where(paced, pace, 0.0), 0.0)
        stream[~paced & (produced > 0)] = math.inf
        return stream


class Roster:
    """One row for each live sequence, at `sequence.row`. It has all of `Columns` as attributes, by row.

    live: the row is somebody's. late: its promise is broken for good. hopeful: it is live, something with a time was
    promised to it, and that is not late. kept: it is to be kept, and whole: not only for its first token's sake.
    kind: index into `kinds`, of its length predictor. fresh: rows of who has come or
    been let in since the last look began. ended: how many sequences have, since the start.
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
    common: np.ndarray
    left: np.ndarray
    load: np.ndarray
    late: np.ndarray
    live: np.ndarray
    hopeful: np.ndarray
    kept: np.ndarray
    whole: np.ndarray

    def __init__(self) -> None:
        self._table = np.zeros((len(Columns._fields), FIRST_ROWS))
        self._taken = np.empty(self._table.size)
        self._flags = np.zeros((len(FLAGS), FIRST_ROWS), dtype=bool)
        self._name()
        self.kind = np.zeros(FIRST_ROWS, dtype=np.int32)
        self.kinds: list[tuple[str, ...]] = []
        self.sequences: list[Sequence | None] = [None] * FIRST_ROWS
        self.fresh: list[int] = []
        self.ended = 0
        self._kind_ids: dict[tuple[str, ...], int] = {}
        self._free = list(range(FIRST_ROWS - 1, -1, -1))
        self._untimed: set[int] = set()  # rows of streams that are timed from a first token that has not come

    def add(self, sequence: Sequence, prefill: int, shared: int = 0, common: int = 0) -> None:
        """Give a new sequence its row. prefill: tokens to compute; shared: of its prompt, what siblings compute;
        common: what others hold."""
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
        self.left[row], self.shared[row], self.common[row] = self.most[row], shared, common
        self.late[row], self.whole[row], self.live[row] = False, False, True
        self.hopeful[row] = min(self.base[row], self.deadline[row]) < math.inf
        if self.pace[row] < math.inf and self.base[row] == math.inf:
            self._untimed.add(row)
        sequence.kept = self.kept[row] = slo is not None and slo.promises_anything
        self.kind[row] = self._kind_of(sequence)
        self.sequences[row] = sequence
        self.fresh.append(row)

    def remove(self, sequence: Sequence) -> None:
        """The sequence ended."""
        row = sequence.row
        self.ended += 1
        self.live[row] = self.hopeful[row] = self.kept[row] = False
        self.produced[row] = 0
        self.sequences[row] = None
        self._untimed.discard(row)
        self._free.append(row)
        sequence.row = -1

    def update(self, residents: Residents) -> tuple[np.ndarray, np.ndarray]:
        """Note how far those that run have come, and which of them a token came late for. Returns their rows, and the
        `context` of each."""
        loose = residents.loose()
        rows = residents.rows(loose)
        self.context[rows] = known = residents.lengths(loose)
        self.produced[rows] = known - self.prompt[rows]
        self.prefill[rows] = self.load[rows] = 0.0
        for sequence in [s for s in loose if s.scheduled < s.resume_at]:
            self.prefill[sequence.row] = sequence.resume_at - sequence.scheduled
        late = residents.late(loose)
        if late:
            self.give_up(np.array([s.row for s in late], dtype=np.intp))
        if self._untimed:
            self._time([s for s in residents if s.row in self._untimed])
        return rows, known

    def columns(self, rows: np.ndarray) -> np.ndarray:
        """[len(Columns), rows]: how the sequences of these rows stand now, a copy that holds until the next."""
        size = len(self._table) * len(rows)  # kept: memory that is asked for anew is zeroed page by page
        return self._table.take(rows, axis=1, out=self._taken[:size].reshape(len(self._table), -1), mode="clip")

    def keep(self, rows: np.ndarray, whole: np.ndarray) -> None:
        """The sequences of these rows are kept, and of `whole` all of them; all others are not, but for fresh ones."""
        fresh = self.kept[self.fresh]
        self.kept[:] = self.whole[:] = False
        self.kept[rows] = self.whole[whole] = True
        self.kept[self.fresh] = fresh

    def give_up(self, rows: np.ndarray | int) -> None:
        """What was promised to the sequences of these rows is late for good."""
        self.late[rows], self.hopeful[rows] = True, False

    def _time(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence.timeline.first is not None:
                row = sequence.row
                self.base[row] = sequence.arrival + sequence.timeline.first
                self.hopeful[row] = not self.late[row]
                self._untimed.discard(row)

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
        self._taken = np.empty(self._table.size)
        self._flags = np.hstack([self._flags, np.zeros_like(self._flags)])
        self._name()
        self.kind = np.append(self.kind, np.zeros(size, dtype=np.int32))
        self.sequences += [None] * size
        self._free = list(range(2 * size - 1, size - 1, -1))

    def _name(self) -> None:
        for name, column in zip(Columns._fields + FLAGS, [*self._table, *self._flags], strict=True):
            setattr(self, name, column)
