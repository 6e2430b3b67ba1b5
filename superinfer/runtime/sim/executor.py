"""An executor that runs steps in time only: it computes nothing and says how long a machine would have taken."""

from __future__ import annotations

from collections import deque

from superinfer.runtime.engine.executor import ExecutorLimits, TierLimits
from superinfer.runtime.scheduler.cost import StepLoad, StepRates
from superinfer.runtime.scheduler.plan import StepPlan, StepResult

DUMMY_TOKEN = 0


class SimExecutor:
    """Implements `Executor`. Every sampled token is DUMMY_TOKEN: outputs end at their max_tokens.

    Steps are timed by `rates`, one after another. It has no clock: who collects adds up the `elapsed` of the results.
    """

    def __init__(self, rates: StepRates, limits: ExecutorLimits, *, depth: int = 1) -> None:
        self.rates = rates
        self.limits = limits
        self.tier: TierLimits | None = None
        self.depth = depth
        self._slots: set[int] = set()
        self._done: deque[tuple[StepResult, StepLoad]] = deque()
        self.last_load = StepLoad(0, 0, 0, 0.0)

    def submit(self, plan: StepPlan) -> None:
        """Time a step. RuntimeError if it works on a slot that no sequence took."""
        self._slots.difference_update(plan.freed)
        self._slots.update(init.slot for init in plan.init)
        tokens = {work.slot: DUMMY_TOKEN for work in plan.work if work.sample}
        if not tokens.keys() <= self._slots:
            raise RuntimeError(
                f"step {plan.step} works on slots {sorted(tokens.keys() - self._slots)} that nobody took"
            )
        load = StepLoad.of(plan)
        result = StepResult(plan.step, tokens, elapsed=self.rates.seconds(load))
        self._done.append((result, load))

    def collect(self) -> StepResult:
        """The result of the oldest step not collected; `last_load` is then its load."""
        result, self.last_load = self._done.popleft()
        return result

    def close(self) -> None:
        """Nothing to give back."""
