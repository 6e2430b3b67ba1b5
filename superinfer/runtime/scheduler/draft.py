"""A plan while it is being made. Pure Python; no torch."""

from __future__ import annotations

import msgspec
import numpy as np

from superinfer.runtime.scheduler.cohort import CohortStep
from superinfer.runtime.scheduler.cost import StepLoad
from superinfer.runtime.scheduler.plan import NO_DECODES, Decodes, SlotInit, SlotWork
from superinfer.runtime.scheduler.sequence import Sequence


class Draft(msgspec.Struct):  # two are made for every step: half of a dataclass
    """A plan being made. budget: tokens left. waits: copies its work depends on; `patient`: however many they are.

    decodes, kv_read, prefill, pairs: what its work comes to, as in a `StepLoad`. cohorts: their parts in it; work: all
    the rest.
    """

    budget: int
    decodes: int = 0
    kv_read: int = 0
    prefill: int = 0
    pairs: float = 0.0
    work: dict[Sequence, SlotWork] = {}  # as the others, of each draft its own
    cohorts: list[CohortStep] = []
    init: list[SlotInit] = []
    waits: set[int] = set()
    preempted: bool = False
    patient: bool = False

    @property
    def num_sequences(self) -> int:
        """How many compute."""
        return len(self.work) + sum(map(len, self.cohorts))

    def all_decodes(self) -> Decodes:
        """Of all cohorts, one after another."""
        steps = self.cohorts
        if not steps:
            return NO_DECODES
        for step in steps:
            step.compact()
        slots, positions = steps[0].slots, steps[0].positions
        if len(steps) > 1:
            slots, positions = (np.concatenate(a) for a in zip(*((s.slots, s.positions) for s in steps), strict=True))
        grown = [(s.slot, blocks) for step in steps for s, blocks in step.grown.items() if blocks]
        return Decodes(slots, positions, tuple(grown))

    @property
    def load(self) -> StepLoad:
        """What the work comes to."""
        return StepLoad(self.prefill + self.decodes, self.decodes, self.kv_read, self.pairs)

    def count(self, item: SlotWork, sign: int = 1) -> None:
        """Count a prefill chunk's or a decode's load in, or out with -1."""
        if item.tokens:
            self.prefill += sign * item.length
            self.kv_read += sign * item.start
            self.pairs += sign * item.length * (item.start + (item.length + 1) / 2)
        else:
            self.decodes += sign
            self.kv_read += sign * (item.start + 1)

    def count_decodes(self, count: int, kv_read: int) -> None:
        """Count `count` decodes in, that read so many cached positions, their own included."""
        self.budget -= count
        self.decodes += count
        self.kv_read += kv_read
