"""The interface every scheduling policy implements. Pure Python, deterministic: time is always an argument."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from superinfer.runtime.kv.copies import LinkUse, TierCounts
from superinfer.runtime.scheduler.plan import StepPlan, StepResult
from superinfer.runtime.scheduler.sequence import Sequence, SequenceUpdate, StepUpdates

if TYPE_CHECKING:
    from superinfer.runtime.scheduler.cost import StepCost


class SchedulerLimits(NamedTuple):
    """What one step may hold. max_batch_tokens: computed in a step; num_slots: sequences that run at a time."""

    num_slots: int
    max_batch_tokens: int
    max_model_len: int


class Scheduler(Protocol):
    """Decides who computes and whose KV stays. `now` is the engine's monotonic clock, seconds.

    The engine calls, in a loop: `expire`, `plan`, the executor, `commit`. With overlap, `plan` for step n + 1 comes
    before `commit` of step n; results are committed in the order of their plans.
    """

    name: str
    cost: StepCost

    def overload(self, sequence: Sequence, now: float) -> float | None:
        """Asked right after `add`: None if it may stay. Else it is to be refused, and another try is worth it in so
        many seconds; the caller cancels it. Always None unless admission is "refuse"."""

    def add(self, sequence: Sequence) -> None:
        """Take on a new sequence (status WAITING)."""

    def cancel(self, sequence: Sequence, now: float) -> SequenceUpdate | None:
        """End a sequence at once. None if it had ended before."""

    def expire(self, now: float) -> list[SequenceUpdate]:
        """End what is not to run past its deadline (`on_miss` other than "finish")."""

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when there is nothing to compute."""

    def expected_s(self, step: int) -> float:
        """How long a planned step, not committed yet, will take the device, waits for copies apart; seconds.
        0.0 if copies are all there is."""

    def commit(self, result: StepResult, now: float) -> StepUpdates:
        """Take in what a planned step produced. Sequences whose logits were no numbers end without a finish reason."""

    def abort(self, step: int, now: float) -> list[Sequence]:
        """A planned step failed: end its sequences without a finish reason, keeping all others. Returns them."""

    def counts(self) -> SchedulerCounts:
        """Gauges and counters for reports."""


class TierGauges(NamedTuple):
    """The DRAM tier, in blocks; dram_pinned: of rotated-out sequences. pending: copies under way."""

    dram_total: int
    dram_free: int
    dram_pinned: int
    pending: int
    totals: TierCounts
    link: LinkUse


class SchedulerCounts(NamedTuple):
    """running, waiting: sequences now; rotated: of the waiting, those whose KV is in DRAM. preemptions: since start.

    blocks_*: of the HBM pool. tiers: with DRAM only.
    """

    running: int
    waiting: int
    preemptions: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    tiers: TierGauges | None = None
    rotated: int = 0
