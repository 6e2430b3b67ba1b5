"""A MemoryExecutor whose memory lies behind the CUDA body on a `StreamDouble`: steps and copies really run ahead.

`submit` only enqueues, as on a GPU: a step's work reads and writes its blocks when the double gets to it. Nothing is
checked against the bookkeeping; only tokens tell.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from memory_executor import EMPTY, MemoryExecutor
from stream_double import COMPUTE, LateSubmitter, StreamDouble

from superinfer.runtime.kv.copy_batches import Places
from superinfer.runtime.kv.duplex_cuda import CudaDuplex
from superinfer.runtime.scheduler.plan import StepPlan, StepResult


class StreamExecutor(MemoryExecutor):
    """Like TieredMemoryExecutor; obey_waits=False plants the fault "work does not wait"."""

    def __init__(
        self, num_blocks: int, num_dram: int, page: int, *, seed: int = 0, lazy: float = 0.3, late: float = 0.3
    ) -> None:
        super().__init__(num_blocks, page)
        self.memory = np.full((num_blocks, page), EMPTY, dtype=np.int32)
        self.dram = np.full((num_dram, page), EMPTY, dtype=np.int32)
        self.device = StreamDouble(seed, lazy=lazy)
        places = Places(self.memory.ctypes.data, self.dram.ctypes.data, self.memory[0].nbytes, 3)
        self.submitter = LateSubmitter(seed, late)
        self.duplex = CudaDuplex(self.device, places, submitter=self.submitter)
        self.obey_waits = True
        self.waiting: deque[tuple[int, list[StepResult]]] = deque()

    @property
    def fails(self) -> float:
        return self.device.fails

    @fails.setter
    def fails(self, chance: float) -> None:
        self.device.fails = chance

    def submit(self, plan: StepPlan) -> None:
        self.duplex.start(plan.copies, plan.waits)
        if self.obey_waits:
            self.duplex.wait(plan.waits)
        fails, self.fail_next = self.fail_next, False
        result: list[StepResult] = []
        self.device.launch(lambda: self._compute(plan, fails, result))
        if fails:
            raise RuntimeError("planted failure")
        ended = self.device.new_event()
        self.device.record(ended, COMPUTE)
        self.waiting.append((ended, result))

    def collect(self) -> StepResult:
        ended, result = self.waiting.popleft()
        self.device.until(ended)
        result[0].copied, result[0].failed_copies, result[0].link = self.duplex.report()
        return result[0]

    def _compute(self, plan: StepPlan, fails: bool, result: list[StepResult]) -> None:
        self.fail_next = fails
        try:
            super().submit(plan)
        except RuntimeError:
            return
        result.append(self.done.pop())

    def _read(self, slot: int, length: int) -> list[int]:
        table = self.tables[slot]
        return [int(self.memory[table[p // self.page]][p % self.page]) for p in range(length)]
