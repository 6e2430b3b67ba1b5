"""A MemoryExecutor with a second tier: copies land late, in any order the plan allows, and poison what they touch.

A copy reads its source when it lands, not when it starts, and until then its destination holds POISON: work that reads
a block too early, and a block written again before its copy out has ended, both change tokens. Nothing is checked
against the bookkeeping; only tokens tell.
"""

from __future__ import annotations

import random

from memory_executor import EMPTY, MemoryExecutor

from superinfer.runtime.kv.copies import BlockCopy, LinkUse
from superinfer.runtime.scheduler.plan import StepPlan, StepResult

POISON = -2
STEP_S = 0.01  # of 3 blocks at most, which therefore come back sooner than they are computed again, at 1 ms each


class TieredMemoryExecutor(MemoryExecutor):
    """`eager`: chance that a copy lands at a chance it gets, 0..1. `fails`: chance that it errs instead.

    step_s: what a step is told to have taken; 0: nothing is learnt from it.
    obey_waits, obey_after: turn off to plant the faults "work does not wait" and "copies do not wait".
    """

    def __init__(
        self, num_blocks: int, num_dram: int, page: int, *, seed: int = 0, eager: float = 0.3, forces: bool = False
    ) -> None:
        super().__init__(num_blocks, page, forces)
        self.dram = [[EMPTY] * page for _ in range(num_dram)]
        self.random = random.Random(seed)
        self.eager = eager
        self.step_s = STEP_S
        self.fails = 0.0
        self.obey_waits = self.obey_after = True
        self.under_way: dict[int, BlockCopy] = {}
        self.copied: list[int] = []
        self.failed: list[int] = []
        self.stalls = 0
        self.outs: set[int] = set()

    def submit(self, plan: StepPlan) -> None:
        for copy in plan.copies:
            self._begin(copy)
        self._some_land()
        if self.obey_waits:
            for id in plan.waits:
                self.stalls += id in self.under_way
                self._land_with_those_before(id)
        super().submit(plan)
        self._some_land(idle=not plan.work)
        self._report(self.done[-1])

    def _report(self, result: StepResult) -> None:
        result.copied, result.failed_copies = self.copied, self.failed
        outs = sum(id in self.outs for id in self.copied)
        result.link = LinkUse(in_s=0.001 * (len(self.copied) - outs), out_s=0.001 * outs)
        result.elapsed = self.step_s
        self.copied, self.failed = [], []

    def _begin(self, copy: BlockCopy) -> None:
        self.under_way[copy.id] = copy
        if copy.out:
            self.outs.add(copy.id)
        if self._may_touch(copy):
            self._poison(copy)

    def _may_touch(self, copy: BlockCopy) -> bool:
        return not self.obey_after or not any(id in self.under_way for id in copy.after)

    def _poison(self, copy: BlockCopy) -> None:
        tier, block = (self.dram, copy.dram) if copy.out else (self.memory, copy.hbm)
        tier[block] = [POISON] * self.page

    def _some_land(self, idle: bool = False) -> None:
        """Time passes; more of it in a step without work."""
        ids, chance = list(self.under_way), max(self.eager, 0.5 * idle)
        self.random.shuffle(ids)
        for id in ids:
            if id in self.under_way and self._may_touch(self.under_way[id]) and self.random.random() < chance:
                self._land(id)

    def _land_with_those_before(self, id: int) -> None:
        if id in self.under_way:
            for before in self.under_way[id].after if self.obey_after else ():
                self._land_with_those_before(before)
            self._land(id)

    def _land(self, id: int) -> None:
        copy = self.under_way.pop(id)
        if self.random.random() < self.fails:
            self._poison(copy)
            self.failed.append(id)
        else:
            if copy.out:
                self.dram[copy.dram] = list(self.memory[copy.hbm])
            else:
                self.memory[copy.hbm] = list(self.dram[copy.dram])
            self.copied.append(id)
        for waiting in self.under_way.values():
            if id in waiting.after and self._may_touch(waiting):
                self._poison(waiting)

    def _read(self, slot: int, length: int) -> list[int]:
        table = self.tables[slot]
        return [self.memory[table[p // self.page]][p % self.page] for p in range(length)]
