"""A scheduler over two tiers and a TieredMemoryExecutor in step, with a clock of our own."""

from __future__ import annotations

import math

from memory_executor import expected_output
from tiered_executor import TieredMemoryExecutor

from superinfer.runtime.kv.duplex import DuplexCache, build_cache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence, Status

PAGE = 4


class Bench:
    """A scheduler over two tiers and a TieredMemoryExecutor in step, with a clock of our own."""

    def __init__(
        self, blocks=12, dram=40, slots=4, batch_tokens=12, depth=1, policy="lru", quantum=0, cost=None, **executor
    ):
        self.kv = build_cache(blocks, dram, PAGE, prefix_cache=executor.pop("prefix_cache", True))
        self.scheduler = build_scheduler(policy, self.kv, SchedulerLimits(slots, batch_tokens, blocks * PAGE), cost)
        self.scheduler.quantum, self.scheduler.headroom = quantum, 0
        self.scheduler.worth, self.scheduler.idle_share = 0.0, math.inf  # whatever it costs
        self.executor = TieredMemoryExecutor(blocks, dram, PAGE, **executor)
        if cost is not None:  # what it says is not to be learnt away
            self.executor.step_s = 0.0
        self.depth = depth
        self.now = 0.0
        self.ids = 0
        self.outputs: dict[int, list[int]] = {}
        self.planned: list[int] = []
        self.plans = []

    def add(self, prompt, max_tokens=5, **kw) -> Sequence:
        self.ids += 1
        sequence = Sequence(id=self.ids, prompt=list(prompt), max_tokens=max_tokens, arrival=self.now, **kw)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> bool:
        self.now += 0.01
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.plans.append(plan)
            try:
                self.executor.submit(plan)
                self.planned.append(plan.step)
            except RuntimeError:
                self.scheduler.abort(plan.step, self.now)
        if self.planned and (plan is None or len(self.planned) >= self.depth):
            self.planned.pop(0)
            for update in self.scheduler.commit(self.executor.collect(), self.now):
                self.outputs.setdefault(update.sequence.id, []).extend(update.token_ids)
            return True
        return plan is not None

    def run(self, limit=4000):
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError("the scheduler does not come to an end")

    def run_disturbed(self, sequences, cancels, failing_steps):
        """cancels: pairs of the number of a sequence and of the turn at which it is cancelled. failing_steps: turns."""
        for turn in range(26):
            for who, when in cancels:
                if when == turn and who < len(sequences):
                    self.scheduler.cancel(sequences[who], self.now)
            self.executor.fail_next = turn in failing_steps
            self.step()
        self.executor.fail_next = False
        self.run(20_000)

    def check(self, sequences, max_tokens=None):
        for sequence in sequences:
            assert sequence.status is Status.FINISHED
            if sequence.finish_reason not in ("cancelled", None):
                prompt = list(sequence.tokens[: sequence.num_prompt])
                expected = expected_output(prompt, sequence.max_tokens, forces=self.executor.forces)
                assert self.outputs[sequence.id] == expected

    def check_all_given_back(self):
        kv = self.kv
        counts = self.scheduler.counts()
        assert (counts.running, counts.waiting) == (0, 0)
        if not isinstance(kv, DuplexCache):
            kv.clear()
            assert sorted(kv._free) == list(range(kv.num_blocks))
            return
        assert kv.num_pending == 0
        kv.clear()
        assert (kv.num_free, kv.num_dram_free, kv.num_dram_pinned) == (kv.num_blocks, kv.num_dram, 0)
        assert sorted(kv._free) == list(range(kv.num_blocks))
        assert sorted(kv._free_dram) == list(range(kv.num_dram))
        assert not (kv._roots or kv._idle or kv._order or kv._order.mirrors)
        assert kv.copies.is_clear()
