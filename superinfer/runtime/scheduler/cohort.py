"""Decodes that need no look: sequences that get one token in every step, kept as arrays from step to step. No torch.

docs/architecture.md says why. A member's state lags behind: `Sequence` asks here where it is read. Whatever happens to
a member that does not happen to all makes it leave first, and it is then as if it had never been one.
"""

from __future__ import annotations

from collections import deque
from itertools import chain

import numpy as np

from superinfer.runtime.scheduler.plan import SlotWork
from superinfer.runtime.scheduler.sequence import MAX_STOP_IDS, Sequence
from superinfer.runtime.scheduler.timelines import Timelines

ROWS = 64  # steps whose tokens may wait to be told to the sequences


class CohortStep:
    """A cohort's part of one planned step, the cohort's `index`-th.

    slots, positions: [members] int64. sequences: the same. gone: slots of those that have left since; what they were to
    compute is in `works`, the step's. grown: of those that have not, blocks that their tables got for it; full: whose
    last block it fills. joined: all whose first it was. is_void: the cohort knows nothing of it any more.
    """

    __slots__ = (
        "cohort",
        "full",
        "gone",
        "grown",
        "index",
        "is_void",
        "joined",
        "positions",
        "sequences",
        "slots",
        "stops",
        "works",
    )

    def __init__(
        self, cohort: Cohort, index: int, slots: np.ndarray, positions: np.ndarray, sequences: list[Sequence],
        stops: np.ndarray, works: dict[Sequence, SlotWork], grown: dict[Sequence, tuple[int, ...]],
        full: dict[Sequence, None], joined: list[Sequence],
    ) -> None:  # fmt: skip
        self.cohort, self.index, self.works = cohort, index, works
        self.slots, self.positions, self.sequences, self.stops = slots, positions, sequences, stops
        self.grown, self.full, self.joined = grown, full, joined
        self.gone: set[int] = set()
        self.is_void = False

    def __len__(self) -> int:
        """Those who have not left."""
        return len(self.slots) - len(self.gone)

    def stay(self) -> np.ndarray:
        """[members] bool: who has not left."""
        return ~np.isin(self.slots, np.fromiter(self.gone, dtype=np.int64, count=len(self.gone)))

    def compact(self) -> None:
        """Forget those who have left: nobody has been told of the step yet."""
        if self.gone:
            stay = self.stay()
            self.slots, self.positions, self.stops = self.slots[stay], self.positions[stay], self.stops[:, stay]
            self.sequences = [s for s, stays in zip(self.sequences, stay.tolist(), strict=True) if stays]
            self.gone.clear()

    def has(self, sequence: Sequence) -> bool:
        """Whether it is a member that was one when this step was planned."""
        return sequence.cohort is self.cohort and self.cohort.joined_at(sequence) <= self.index

    def tokens(self, by_slot: dict[int, int]) -> np.ndarray:
        """[members] int64: of a result that has them by slot."""
        return np.fromiter((by_slot[slot] for slot in self.slots.tolist()), dtype=np.int64, count=len(self.slots))


class Cohort:
    """`planned` counts the steps that have been planned with it, of which the first `committed` are done.

    A member's next position is its `own_scheduled` + planned; so nothing is written when a step is planned. Two
    calendars say who is to be looked at in which step: members alone, each once.
    """

    def __init__(self, num_slots: int, page_size: int) -> None:
        self._page_size = page_size
        self.members: dict[int, Sequence] = {}  # by slot
        self.planned = self.committed = 0
        self._under_way: deque[CohortStep] = deque()
        self._new: list[Sequence] = []  # joined since the last step was planned
        self._fills: dict[int, dict[Sequence, None]] = {}  # by index of the step: whose last block it fills
        self._ends: dict[int, dict[Sequence, None]] = {}  # by index of the step: whose last it is
        self._offsets = np.zeros(num_slots, dtype=np.int64)
        self._joined_at = [0] * num_slots
        self._rows = np.full(num_slots, -1, dtype=np.intp)
        self._told = [0] * num_slots  # index of the first step whose token the sequence has not been told
        self._stop_ids = np.full((MAX_STOP_IDS, num_slots), -1, dtype=np.int64)
        self._stop_width = 0
        self._history = np.zeros((ROWS, num_slots), dtype=np.int32)
        self._first_row = 0  # index of the step whose tokens are the history's first
        self._timelines = Timelines(num_slots)
        self._timelines_at = 0  # steps done when all timelines were last brought up to date
        self._late_at, self._late = 0, np.zeros(num_slots, dtype=bool)
        self._changed = True
        self._slots = np.empty(0, dtype=np.int64)
        self._starts = self._stops = self._slots
        self._sum_of_starts = 0
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.members)

    # ------------------------------------------------------------------ who is in

    def join(self, sequence: Sequence) -> None:
        """A sequence decodes from the next step on with the others. It has a token, and more than one to come."""
        slot, start = sequence.slot, sequence.scheduled
        sequence.own_scheduled = start - self.planned
        sequence.cohort = self
        self.members[slot] = sequence
        self._offsets[slot], self._rows[slot] = sequence.own_scheduled, sequence.row
        self._joined_at[slot] = self._told[slot] = self.planned
        self._new.append(sequence)
        self._fills.setdefault(self._fills_at(start), {})[sequence] = None
        self._ends.setdefault(self.planned + sequence.last_position - 1 - start, {})[sequence] = None
        self._stop_ids[:, slot] = -1
        self._stop_ids[: len(sequence.stop_ids), slot] = sequence.stop_ids
        self._stop_width = max(self._stop_width, len(sequence.stop_ids))
        self._changed = True

    def leave(self, sequence: Sequence) -> None:
        """A member's state is brought up to date, what it has under way becomes work of its own."""
        slot = sequence.slot
        joined = self._joined_at[slot]
        self.tell(sequence)
        if self.committed > joined:
            self._timelines.give(slot, sequence.own_timeline)
        sequence.own_in_flight = self.in_flight(sequence)
        offset = sequence.own_scheduled
        self._forget_end(sequence, sequence.last_position - 1 - offset)
        sequence.own_scheduled = offset + self.planned
        sequence.cohort = None
        self._fills.get(self._fills_at(sequence.own_scheduled), {}).pop(sequence, None)
        for step in self._under_way:
            if step.index >= joined:
                step.full.pop(sequence, None)
                blocks = step.grown.pop(sequence, ())
                step.gone.add(slot)
                step.works[sequence] = SlotWork(slot, offset + step.index, 1, (), blocks, True)
        del self.members[slot]
        self._changed = True

    def _fills_at(self, position: int) -> int:
        """Index of the step that fills the block of a member whose next position this is; that of the last one planned
        where the block is full and the next step begins another."""
        return self.planned + -position % self._page_size - 1

    def _forget_end(self, sequence: Sequence, at: int) -> None:
        """Take it out of the calendar, which may reach far ahead. at: index of what was to be its last step."""
        ends = self._ends.get(at)
        if ends is not None:
            ends.pop(sequence, None)
            if not ends:
                del self._ends[at]

    def dissolve(self) -> None:
        """All leave, and results of steps under way mean nothing to the cohort."""
        for sequence in list(self.members.values()):
            self.leave(sequence)
        for step in self._under_way:
            step.is_void = True
        self._under_way.clear()
        self.committed = self._first_row = self.planned
        self._new = []

    # ------------------------------------------------------------------ what members are read as

    def joined_at(self, sequence: Sequence) -> int:
        """Index of a member's first step."""
        return self._joined_at[sequence.slot]

    def in_flight(self, sequence: Sequence) -> int:
        """A member's tokens that planned steps will sample."""
        return sequence.own_in_flight + self.planned - max(self.committed, self._joined_at[sequence.slot])

    def tell(self, sequence: Sequence) -> None:
        """A member's tokens are brought up to date."""
        slot = sequence.slot
        told = self._told[slot]
        if told < self.committed:
            first = self._first_row
            sequence.own_tokens.frombytes(self._history[told - first : self.committed - first, slot].tobytes())
            self._told[slot] = self.committed

    def tell_timelines(self) -> None:
        """All members' timelines are brought up to date: who asks for one mostly asks for all."""
        if self._timelines_at == self.committed:
            return
        self._timelines_at = self.committed
        slots = [slot for slot in self.members if self._joined_at[slot] < self.committed]
        self._timelines.give_all(slots, [self.members[slot].own_timeline for slot in slots])

    def lengths(self) -> np.ndarray:
        """[members] int64: `Sequence.length` of each, in the order of `members`."""
        self._list_members()
        return self._starts + (self.planned + 1)

    def rows(self) -> np.ndarray:
        """[members]: `Sequence.row` of each, in the order of `members`."""
        self._list_members()
        return self._rows[self._slots]

    def at(self, places: np.ndarray) -> list[Sequence]:
        """The members at these places in the order of `members`."""
        self._list_members()
        return [self._sequences[at] for at in places.tolist()]

    def late(self) -> list[Sequence]:
        """Members whose `Sequence.is_late` is true."""
        self._look_for_late()
        self._list_members()
        late, joined_at, committed = self._late[self._slots].nonzero()[0], self._joined_at, self.committed
        found = [s for s in self.at(late) if joined_at[s.slot] < committed]
        for sequence in chain(self._new, *(step.joined for step in self._under_way)):  # marks may be of others
            is_new = sequence.cohort is self and joined_at[sequence.slot] >= committed
            if is_new and sequence.own_timeline.is_late:
                found.append(sequence)
        return found

    def is_late(self, sequence: Sequence) -> bool:
        """Whether a token of a member that the cohort has seen came late."""
        self._look_for_late()
        return self._joined_at[sequence.slot] < self.committed and bool(self._late[sequence.slot])

    def _look_for_late(self) -> None:
        if self._late_at != self.committed:
            self._late_at, self._late = self.committed, self._timelines.late()

    # ------------------------------------------------------------------ a step

    def due(self) -> tuple[list[Sequence], list[Sequence]]:
        """Of the step to be planned: (for whom it is the last, who begins a block)."""
        return list(self._ends.pop(self.planned, ())), list(self._fills.pop(self.planned - 1, ()))

    def plan(self, grown: dict[Sequence, tuple[int, ...]], works: dict[Sequence, SlotWork]) -> CohortStep:
        """A step of all members. grown: the members that were due to begin a block, and the blocks that they got."""
        at = self.planned
        self._list_members()
        self._fills.setdefault(at + self._page_size - 1, {}).update(dict.fromkeys(grown))
        full, joined = self._fills.get(at, {}).copy(), self._new  # who joins before the next step is none of this one
        step = CohortStep(
            self, at, self._slots, self._starts + at, self._sequences, self._stops, works, grown, full, joined
        )
        self._new = []
        self.planned = at + 1
        self._under_way.append(step)
        return step

    @property
    def kv_read(self) -> int:
        """Positions that a step planned now reads, its members' own included: the sum of their lengths."""
        self._list_members()
        return self._sum_of_starts + (self.planned + 1) * len(self._slots)

    def _list_members(self) -> None:
        if self._changed:
            self._changed = False
            self._slots = np.fromiter(self.members, dtype=np.int64, count=len(self.members))
            self._sequences = list(self.members.values())
            self._starts = self._offsets[self._slots]
            self._sum_of_starts = int(self._starts.sum())
            self._stops = self._stop_ids[: self._stop_width, self._slots]

    def commit(self, step: CohortStep, tokens: np.ndarray, now: float) -> list[Sequence]:
        """The oldest step under way is done. tokens: [members] int64. Returns whose block is full now; they are told
        their tokens."""
        assert self._under_way.popleft() is step
        if joined := [s for s in step.joined if step.has(s)]:
            self._timelines.settle()  # what came for those who had their slots before
            for sequence in joined:
                self._timelines.take(sequence.slot, sequence.arrival, sequence.own_timeline)
        row = step.index - self._first_row
        self._history[row, step.slots] = tokens
        self._timelines.note(step.slots, now)
        self.committed = step.index + 1
        if row + 1 == ROWS:
            self._tell_all([s for s in self.members.values() if self._told[s.slot] < self.committed])
            self._timelines.settle()
            self._first_row = self.committed
        full = list(step.full)
        self._tell_all(full)
        return full

    def _tell_all(self, sequences: list[Sequence]) -> None:
        """As `tell`, of many. Of equally many tokens each, mostly: they fill a block."""
        if not sequences:
            return
        slots = [sequence.slot for sequence in sequences]
        first = min(self._told[slot] for slot in slots)
        rows = self._history[first - self._first_row : self.committed - self._first_row].take(slots, axis=1)
        told, size = rows.T.tobytes(), 4 * len(rows)
        for at, (slot, sequence) in enumerate(zip(slots, sequences, strict=True)):
            known = 4 * (self._told[slot] - first)
            sequence.own_tokens.frombytes(told[at * size + known : (at + 1) * size])
            self._told[slot] = self.committed
