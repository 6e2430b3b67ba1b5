"""The second tier on CPU: a pool in plain memory behind a link in virtual time, with the ordering that a GPU's has.

A copy is planned on the link when it is started and carried out when the link says that it is over, in that order. So
it takes the time a real link would, reads its source as late as one could, and needs no thread: time is looked at when
a step begins, waits and ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable

import torch

from superinfer.runtime.kv.copies import BlockCopy, LinkUse
from superinfer.runtime.kv.link import VirtualLink
from superinfer.runtime.memory import zeros_on_demand

log = logging.getLogger("superinfer.engine")


class CpuDuplex:
    """DRAM blocks behind `hbm`, [blocks, ...], block-first and contiguous.

    bytes_per_s: of the link, each way; None: as fast as memory copies. latency_s: of each copy.
    clock, sleep: seconds; replaced in tests.
    """

    def __init__(
        self,
        hbm: torch.Tensor,
        num_dram: int,
        *,
        bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.hbm = hbm
        self.dram = zeros_on_demand((num_dram, *hbm.shape[1:]), hbm.dtype)  # memory is taken as blocks are first used
        self._link = VirtualLink(hbm[0].nbytes, bytes_per_s, latency_s)
        self._measured = bytes_per_s is None
        self._clock, self._sleep = clock, sleep
        self._copied: list[int] = []
        self._failed: list[int] = []
        self._copy_s = [0.0, 0.0]
        self._stall_s = 0.0

    def start(self, copies: Iterable[BlockCopy], wanted: Collection[int] = ()) -> None:
        """Begin a plan's copies; call before its work, after that of the plans before it. They go in their order,
        whichever are `wanted`."""
        now = self._clock()
        self._carry_out(now)
        self._link.start(copies, now)

    def wait(self, ids: Collection[int]) -> None:
        """Return when all of `ids` are over."""
        before = self._clock()
        over_at = self._link.over_at(ids, before)
        if over_at > before:
            self._sleep(over_at - before)
            self._stall_s += self._clock() - before
        self._carry_out(max(over_at, self._clock()))

    def report(self) -> tuple[list[int], list[int], LinkUse]:
        """Ids copied and ids failed that no report has had, and the link's seconds since the last one."""
        self._carry_out(self._clock())
        use = self._link.take_use()
        if self._measured:
            use = use._replace(in_s=self._copy_s[0], out_s=self._copy_s[1])
        told = self._copied, self._failed, use._replace(stall_s=self._stall_s)
        self._copied, self._failed, self._copy_s, self._stall_s = [], [], [0.0, 0.0], 0.0
        return told

    def close(self) -> None:
        """Copies under way are dropped."""

    def copy_block(self, copy: BlockCopy) -> None:
        """Move one block's bytes."""
        if copy.out:
            self.dram[copy.dram].copy_(self.hbm[copy.hbm])
        else:
            self.hbm[copy.hbm].copy_(self.dram[copy.dram])

    def _carry_out(self, now: float) -> None:
        for copy in self._link.finished(now):
            started = time.perf_counter()
            try:
                self.copy_block(copy)
                self._copied.append(copy.id)
            except Exception as error:  # the scheduler knows what a lost copy means; the engine serves on
                log.error("copy of a KV block failed: %s", copy, exc_info=error)
                self._failed.append(copy.id)
            self._copy_s[copy.out] += time.perf_counter() - started
