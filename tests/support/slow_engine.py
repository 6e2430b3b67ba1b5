"""A real engine loop behind a real door, in this process, whose steps take as long as a test says.

What must still be under way while a test does something is so by far, even where this process stands still for a
second: a request of a few hundred tokens lasts for half a minute.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from memory_executor import MemoryExecutor
from own_time import pass_time

from superinfer.runtime.config import Admission
from superinfer.runtime.engine import loop as loop_module
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.engine.frontdoor import FrontDoor
from superinfer.runtime.engine.intake import Intake
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.protocol import ModelInfo
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.plan import StepResult
from superinfer.runtime.scheduler.registry import build_scheduler

PAGE = 16
VOCAB = 512


class SlowExecutor(MemoryExecutor):
    """Without a model; a step takes `step_s`, and its result says `told_s`. meanwhile: called once, on the engine's
    thread, while a step runs."""

    tier = None
    depth = 1
    waited_s = 0.0

    def __init__(self, num_slots: int, context: int, step_s: float) -> None:
        blocks = num_slots * context // PAGE
        super().__init__(blocks, PAGE)
        self.limits = ExecutorLimits(
            num_blocks=blocks, page_size=PAGE, num_slots=num_slots, max_model_len=context, vocab_size=VOCAB
        )
        self.step_s, self.told_s = step_s, 0.0
        self.clock: StepClock | None = None
        self.meanwhile: Callable[[], None] | None = None

    def collect(self) -> StepResult:
        pass_time(self.step_s)
        if self.clock is not None:
            self.clock.now += self.clock.step_s
        call, self.meanwhile = self.meanwhile, None
        if call is not None:
            call()
        result = super().collect()
        result.elapsed = self.told_s
        result.tokens = {slot: 5 + token for slot, token in result.tokens.items()}  # letters and digits
        return result


@dataclass
class StepClock:
    """An engine's clock, on which a step takes exactly `step_s` and nothing else takes any time."""

    step_s: float
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class SlowEngine:
    """A running one."""

    address: str
    door: FrontDoor
    executor: SlowExecutor

    def keep_time(self, monkeypatch: pytest.MonkeyPatch, step_s: float) -> StepClock:
        """For the rest of the test, its steps take exactly `step_s` by its own clock, whatever they really take."""
        clock = self.executor.clock = StepClock(step_s)
        monkeypatch.setattr(loop_module, "time", clock)
        return clock

    def compute_until_a_message_comes(self) -> None:
        """Returns in the midst of a step, which ends once the door has a message that the engine has not read."""
        inside = threading.Event()

        def until_a_message_comes() -> None:
            inside.set()
            self.door._poller.poll(60_000)

        self.executor.meanwhile = until_a_message_comes
        assert inside.wait(60), "the engine makes no steps"


@contextlib.contextmanager
def slow_engine(
    checkpoint: Path,
    *,
    step_s: float = 0.05,
    num_slots: int = 16,
    max_queue: int = 64,
    context: int = 1024,
    policy: str = "fcfs",
    admission: Admission = "accept",
    told_s: float = 0.0,
) -> Iterator[SlowEngine]:
    """One that serves text with the tokenizer of `checkpoint`, `num_slots` sequences at a time. told_s: how long its
    results say that a step took, which a policy that foresees learns from."""
    executor = SlowExecutor(num_slots, context, step_s)
    executor.told_s = told_s
    limits = executor.limits
    info = ModelInfo(
        model="slow", path=str(checkpoint), architecture="none", vocab_size=limits.vocab_size, max_model_len=context,
        eos_token_ids=(2,), dtype="none", device="none", page_size=PAGE, num_blocks=limits.num_blocks, policy=policy,
        pid=0,
    )  # fmt: skip
    kv = build_cache(limits.num_blocks, 0, limits.page_size, prefix_cache=False)
    scheduler = build_scheduler(policy, kv, SchedulerLimits(num_slots, 64, context), admission=admission)
    door = FrontDoor("tcp://127.0.0.1:0", info)
    loop = loop_module.EngineLoop(door, Intake(info), scheduler, executor, max_queue)  # type: ignore[arg-type]
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    yield SlowEngine(door.address, door, executor)
    loop.stop("the tests are over")
    thread.join(30)
    assert not thread.is_alive()
