"""An executor that runs steps in time only: it computes nothing and says how long a machine would have taken."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from superinfer.runtime.engine.executor import ExecutorLimits, TierLimits
from superinfer.runtime.kv.copies import BlockCopy, LinkUse
from superinfer.runtime.kv.link import VirtualLink
from superinfer.runtime.scheduler.cost import StepLoad, StepRates
from superinfer.runtime.scheduler.plan import StepPlan, StepResult

DUMMY_TOKEN = 0
END_TOKEN = 1  # of an answer that ends before its max_tokens


PER_BUCKET = 8  # decodes: what steps of decodes alone are padded to


class Quirks(NamedTuple):
    """What a machine's steps were measured to have beside what a roofline says of them.

    slower: where a GPU has reached its power limit its clocks fall: steps take up to so much longer, as a share, and as
        much as steps with prefill chunks had of the time before, which is forgotten within `slower_s` seconds.
    by_decodes: how many times as long as the roofline says steps of decodes alone take: of 1 to PER_BUCKET of them, of
        up to twice as many, and so on; of more than the last as of the last. Empty: as long as it says.
    slower_decodes: how much slower these become, by their number in the same way. Empty: `slower`.
    """

    slower: float = 0.0
    slower_s: float = 1.0
    by_decodes: tuple[float, ...] = ()
    slower_decodes: tuple[float, ...] = ()

    def factor(self, load: StepLoad, chunks: float) -> float:
        """Times what the roofline says. chunks: share of the time before that steps with chunks had."""
        if load.tokens > load.decodes:
            return 1.0 + self.slower * chunks
        bucket = (load.decodes - 1) // PER_BUCKET
        slower, times = _at(self.slower_decodes, bucket, self.slower), _at(self.by_decodes, bucket, 1.0)
        return times * (1.0 + slower * chunks)

    def later(self, chunks: float, seconds: float, had_chunks: bool) -> float:
        """That share after so many seconds more, of a step that had chunks or not, or of nothing."""
        kept = math.exp(-seconds / self.slower_s)
        return chunks * kept + had_chunks * (1.0 - kept)


NO_QUIRKS = Quirks()


def _at(values: tuple[float, ...], bucket: int, default: float) -> float:
    return values[min(bucket, len(values) - 1)] if values else default


class SimStep(NamedTuple):
    """What a step was and when it ended: seconds of simulated time. compute_s: without waiting for copies."""

    load: StepLoad
    compute_s: float
    end: float


class SimExecutor:
    """Implements `Executor`.

    answers: by a sequence's seed, the id of every token that is sampled for it; DUMMY_TOKEN where none are given.
    lengths: by seed, of how many tokens the last one is END_TOKEN. Where none or 0 is given outputs end at their
        max_tokens.

    Steps are timed by `rates`, one after another; copies by `link`, as docs/duplexkv.md orders them: a plan's copies
    start when the steps before it are done, its work when those it waits for are over. It has no clock of its own:
    `now` is set by who submits. free_at: when the last step submitted ends.

    paces: (seconds, factor), in order: steps that begin from then on take so many times as long as `rates` say.
    quirks: what else they take. spread: standard deviation of a step's time as a share of that, drawn from `seed`.
    """

    def __init__(
        self,
        rates: StepRates,
        limits: ExecutorLimits,
        *,
        depth: int = 1,
        tier: TierLimits | None = None,
        link: VirtualLink | None = None,
        paces: Sequence[tuple[float, float]] = (),
        quirks: Quirks = NO_QUIRKS,
        spread: float = 0.0,
        seed: int = 0,
        answers: Sequence[int] = (),
        lengths: Sequence[int] = (),
    ) -> None:
        self.rates = rates
        self.limits = limits
        self.tier = tier
        self.depth = depth
        self.waited_s = 0.0
        self.now = 0.0
        self.last = SimStep(StepLoad(0, 0, 0, 0.0), 0.0, 0.0)
        self._link = link
        self._paces = paces
        self._quirks, self._chunks = quirks, 0.0
        self._spread, self._random = spread, np.random.default_rng(seed)
        self.free_at = 0.0
        self._slots: set[int] = set()
        self._answers, self._lengths = answers, lengths
        self._sampled = np.full(limits.num_slots, DUMMY_TOKEN)  # by slot
        self._last = np.full(limits.num_slots, -1)  # by slot, where the last token of its answer is
        self._done: deque[tuple[StepResult, SimStep]] = deque()

    def submit(self, plan: StepPlan) -> None:
        """Time a step. RuntimeError if it works on a slot that no sequence took, or brings copies to a single tier."""
        self._slots.difference_update(plan.freed)
        self._slots.update(init.slot for init in plan.init)
        if self._answers:
            for init in plan.init:
                self._sampled[init.slot] = self._answers[init.seed]
        if self._lengths:
            for init in plan.init:
                self._last[init.slot] = len(init.prompt) + self._lengths[init.seed] - 1
        tokens = {work.slot: self._token(work.slot, work.start + work.length) for work in plan.others if work.sample}
        decoding = plan.decodes.slots.tolist()
        unknown = {*tokens, *decoding} - self._slots
        if unknown:
            raise RuntimeError(f"step {plan.step} works on slots {sorted(unknown)} that nobody took")
        start = max(self.free_at, self.now)
        begin = self._wait(plan, start)
        load = StepLoad.of(plan)
        pace = next((factor for at, factor in reversed(self._paces) if begin >= at), 1.0)
        quirks, chunks = self._quirks, self._quirks.later(self._chunks, begin - self.free_at, had_chunks=False)
        compute_s = (
            self.rates.seconds(load) * pace * quirks.factor(load, chunks) * self._drawn() if plan.has_work else 0.0
        )
        self._chunks = quirks.later(chunks, compute_s, load.tokens > load.decodes)
        self.free_at = end = begin + compute_s
        copied, use = self._copied(end, stall_s=begin - start if plan.has_work else 0.0)
        slots = plan.decodes.slots
        decoded = np.where(plan.decodes.positions + 1 == self._last[slots], END_TOKEN, self._sampled[slots])
        result = StepResult(plan.step, tokens, elapsed=end - start, copied=copied, link=use, decoded=decoded)
        self._done.append((result, SimStep(load, compute_s, end)))

    def _token(self, slot: int, position: int) -> int:
        return END_TOKEN if position == self._last[slot] else int(self._sampled[slot])

    def collect(self) -> StepResult:
        """The result of the oldest step not collected; `last` then says what it was."""
        result, self.last = self._done.popleft()
        return result

    @property
    def busy(self) -> bool:
        """See Executor; at `now`."""
        return self.now < self.free_at

    def close(self) -> None:
        """Nothing to give back."""

    def _drawn(self) -> float:
        """How many times as long as on average the next step takes: log-normal, with a mean of 1."""
        if not self._spread:
            return 1.0
        sigma = math.sqrt(math.log1p(self._spread**2))
        return float(self._random.lognormal(-(sigma**2) / 2, sigma))

    def _wait(self, plan: StepPlan, start: float) -> float:
        """Start the plan's copies; when those its work waits for are over."""
        if self._link is None:
            if plan.copies or plan.waits:
                raise RuntimeError(f"step {plan.step} moves blocks, and there is one tier only")
            return start
        self._link.start(plan.copies, start)
        if not plan.has_work and not plan.waits:  # all there is to do is to see the copies end
            return self._link.next_over_at(start)
        return self._link.over_at(plan.waits, start) if plan.waits else start

    def _copied(self, end: float, stall_s: float) -> tuple[list[int], LinkUse]:
        if self._link is None:
            return [], LinkUse()
        finished: list[BlockCopy] = self._link.finished(end)
        return [copy.id for copy in finished], self._link.take_use()._replace(stall_s=stall_s)
