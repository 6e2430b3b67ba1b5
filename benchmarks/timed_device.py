"""A device that does nothing but take time, on this machine's clock: for the real loop and sockets without a GPU."""

from __future__ import annotations

import time

from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.scheduler.cost import StepRates
from superinfer.runtime.scheduler.plan import StepPlan, StepResult
from superinfer.runtime.sim.executor import SimExecutor


class TimedDevice(SimExecutor):
    """Implements `Executor` with two steps under way, which take as long as `rates` say, give or take `spread`."""

    def __init__(self, rates: StepRates, limits: ExecutorLimits, spread: float) -> None:
        super().__init__(rates, limits, depth=2, spread=spread, seed=1)

    @property
    def busy(self) -> bool:
        """See Executor."""
        return time.monotonic() < self.free_at

    def submit(self, plan: StepPlan) -> None:
        """See Executor."""
        self.now = time.monotonic()
        super().submit(plan)

    def collect(self) -> StepResult:
        """See Executor."""
        result = super().collect()
        time.sleep(max(0.0, self.last.end - time.monotonic()))
        return result
