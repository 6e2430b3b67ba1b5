"""When steps are planned: a device and a clock that the test moves, around the real loop and scheduler."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from superinfer.runtime.engine import loop as loop_module
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.engine.intake import Intake
from superinfer.runtime.engine.loop import EngineLoop
from superinfer.runtime.engine.plan_timing import PlanTiming
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.protocol import Generate, ModelInfo, SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.cost import StepCost, StepRates
from superinfer.runtime.scheduler.plan import StepPlan, StepResult
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.sim.executor import SimExecutor

LIMITS = ExecutorLimits(num_blocks=4096, page_size=16, num_slots=16, max_model_len=8192, vocab_size=100)
RATES = StepRates(0.02, 0.0, 0.0, 1e-6, 0.0, 0.0, 0.0, 0.0)  # 20 ms a step
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


class Clock:
    """Time as the loop sees it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Device(SimExecutor):
    """Steps that take what `rates` says times `factor`. submit_s: of the host's time."""

    def __init__(self, clock: Clock, submit_s: float, factor: float) -> None:
        super().__init__(RATES._replace(dense_s=RATES.dense_s * factor), LIMITS, depth=2)
        self.clock, self.submit_s = clock, submit_s
        self.plans: list[tuple[float, StepPlan]] = []
        self.idle_s: list[float] = []  # the device was without work before each step

    def submit(self, plan: StepPlan) -> None:
        self.plans.append((self.clock.now, plan))
        self.clock.now += self.submit_s
        self.now = self.clock.now
        self.idle_s.append(max(0.0, self.clock.now - self.free_at))
        super().submit(plan)

    @property
    def busy(self) -> bool:
        return self.clock.now < self.free_at

    def collect(self) -> StepResult:
        result = super().collect()
        self.clock.now = max(self.clock.now, self.last.end)
        return result


class Door:
    """Requests that come at given times; `receive` lets time pass as a poll does."""

    orphaned = False

    def __init__(self, clock: Clock, arrivals: list[tuple[float, Generate]], until: float) -> None:
        self.clock, self.arrivals, self.until = clock, deque(arrivals), until
        self.loop: EngineLoop
        self.gone: set[bytes] = set()
        self.clients = {b"client"}

    def receive(self, timeout_ms: int, seconds: float = 0.0) -> Iterator[tuple[bytes, Any]]:
        clock = self.clock
        end = clock.now + timeout_ms / 1e3
        if self.arrivals and self.arrivals[0][0] <= end:
            clock.now = max(clock.now, self.arrivals[0][0])
        else:
            clock.now = end
        while self.arrivals and self.arrivals[0][0] <= clock.now:
            yield b"client", self.arrivals.popleft()[1]
        if clock.now >= self.until:
            self.loop.stop("the test is over")

    def send(self, client: bytes, message: Any) -> None: ...

    def flush(self) -> None: ...

    def close(self, reason: str) -> None: ...


def asked(name: str) -> Generate:
    return Generate(request_id=name, prompt=[1, 2, 3], sampling=LONG)


def run(
    monkeypatch: pytest.MonkeyPatch, arrivals: list[tuple[float, Generate]], *, until: float = 4.0, late: bool = True,
    submit_s: float = 0.001, factor: float = 1.0, prepare: Callable[[float], None] | None = None,
) -> Device:  # fmt: skip
    """prepare: see EngineLoop; told the time."""
    clock = Clock()
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
    info = ModelInfo(
        model="timed", path="", architecture="none", vocab_size=100, max_model_len=8192, eos_token_ids=(2,),
        dtype="none", device="none", page_size=16, num_blocks=4096, policy="fcfs", pid=0,
    )  # fmt: skip
    kv = build_cache(LIMITS.num_blocks, 0, LIMITS.page_size, prefix_cache=False)
    scheduler = build_scheduler("fcfs", kv, SchedulerLimits(16, 512, 8192), StepCost(RATES))
    door, device = Door(clock, arrivals, until), Device(clock, submit_s, factor)
    told = None if prepare is None else lambda: prepare(clock.now)
    door.loop = EngineLoop(door, Intake(info), scheduler, device, 64, plan_late=late, prepare=told)  # type: ignore[arg-type]
    door.loop.run()
    return device


def wait_for_first_chunk(device: Device, arrival: float) -> float:
    """From a request's coming to the beginning of the step that computes its prompt, in steps of 20 ms."""
    index = next(i for i, (at, plan) in enumerate(device.plans) if plan.num_prefill_tokens and at > arrival)
    ends = 0.0
    for at, _ in device.plans[: index + 1]:
        begins = max(ends, at + device.submit_s)
        ends = begins + 0.02
    return begins - arrival


@pytest.mark.parametrize(("late", "bounds"), [(True, (0.0, 0.0201)), (False, (0.02, 0.0401))])
def test_who_comes_while_a_step_runs_is_in_the_next(monkeypatch, late, bounds):
    for into in (0.001, 0.007, 0.015):  # of a step
        arrival = 2.0 + into
        device = run(monkeypatch, [(0.0, asked("first")), (arrival, asked("second"))], late=late)
        waited = wait_for_first_chunk(device, arrival)
        assert bounds[0] <= waited <= bounds[1], (into, waited)
        assert sum(device.idle_s[1:]) == 0.0


def test_a_step_is_planned_as_late_as_submitting_it_allows(monkeypatch):
    device = run(monkeypatch, [(0.0, asked("first"))], submit_s=0.005)
    begins = [device.submit_s + 0.02 * step for step in range(len(device.plans))]  # the device is never without work
    assert sum(device.idle_s[1:]) == 0.0
    ahead = [begin - planned for begin, (planned, _) in list(zip(begins, device.plans, strict=True))[60:]]
    assert min(ahead) >= device.submit_s and max(ahead) < device.submit_s + 0.0005


def test_steps_quicker_than_foreseen_are_soon_planned_in_time(monkeypatch):
    """The cost model begins with twice the time that steps take."""
    device = run(monkeypatch, [(0.0, asked("first"))], factor=0.5)
    assert sum(device.idle_s[1:]) == 0.0


def test_what_is_known_of_short_steps_says_nothing_of_long_ones():
    """Which the model, right about the others, has at a fifth more than they take: a few, then often."""
    short, long = [0.005] * 400, [0.1] * 30
    took = [*short, *long, *short, *long]
    foreseen = [one * (1.2 if one > 0.01 else 1.0) for one in took]
    idle, put_off = follow(PlanTiming(), took, foreseen, [0.001] * len(took))
    assert idle == 0.0
    assert put_off > 0.2


def test_a_device_that_is_done_sooner_than_ever_before_does_not_wait_long(monkeypatch):
    """Its steps take a quarter of the time at once, from the two hundredth on."""
    real = SimExecutor.submit

    def submit(device: Device, plan: StepPlan) -> None:
        device.rates = RATES._replace(dense_s=RATES.dense_s * (0.25 if len(device.plans) > 200 else 1.0))
        real(device, plan)

    monkeypatch.setattr(SimExecutor, "submit", submit)
    device = run(monkeypatch, [(0.0, asked("first"))], until=6.0)
    assert len(device.plans) > 300
    assert max(device.idle_s[1:]) < 0.0035  # 2 ms until it is seen, and 1 ms to submit
    assert sum(device.idle_s[1:]) < 0.1


@pytest.mark.parametrize("late", [True, False])
def test_a_request_never_counts_from_later_than_it_came(monkeypatch, late):
    """Also where the host was busy when it came, and sleeps when it is read."""
    rng = random.Random(3)
    came = sorted(rng.uniform(1.0, 3.5) for _ in range(60))
    seen: dict[str, float] = {}

    class Recording(Intake):
        def sequences(self, client: bytes, request: Any, arrival: float) -> Any:
            seen[request.request_id] = arrival
            return super().sequences(client, request, arrival)

    monkeypatch.setitem(globals(), "Intake", Recording)
    short = SamplingParams(max_tokens=2, ignore_eos=True)
    arrivals = [(at, Generate(request_id=str(at), prompt=[1], sampling=short)) for at in came]
    device = run(monkeypatch, [(0.0, asked("first")), *arrivals], late=late, submit_s=0.004)
    assert len(seen) == 61 and len(device.plans) > 100
    for at in came:
        assert at - 0.025 <= seen[str(at)] <= at + 1e-9  # nor from long before: messages are read once a step at least


def follow(timing: PlanTiming, took: list[float], foreseen: list[float], host_s: list[float]) -> tuple[float, float]:
    """Two steps under way. Returns the device's idle share and the share of time that planning was put off."""
    now = free_at = idle = put_off = 0.0
    ends: deque[tuple[float, float]] = deque()
    for duration, expected, host in zip(took, foreseen, host_s, strict=True):
        while len(ends) == 1 and (wait := timing.wait_s(now)) > 0.0:
            now += wait
            put_off += wait
        planned_at, now = now, now + host
        idle += max(0.0, now - free_at) if ends else 0.0
        free_at = max(free_at, now) + duration
        timing.submitted(expected, planned_at, now)
        ends.append((free_at, duration))
        if len(ends) == 2:
            ended, lasted = ends.popleft()
            now = max(now, ended)
            timing.ended(lasted, now)
    return idle / free_at, put_off / free_at


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_the_device_hardly_waits_however_well_steps_are_foreseen(noise):
    rng = random.Random(7)
    took = [rng.choice((0.006, 0.01, 0.04)) for _ in range(5000)]
    foreseen = [one * rng.gauss(1.0, noise) for one in took]
    host = [rng.uniform(0.0004, 0.001) for _ in took]
    idle, put_off = follow(PlanTiming(), took, foreseen, host)
    assert idle < 0.002
    assert put_off > {0.0: 0.85, 0.02: 0.75, 0.1: 0.5}[noise]


def test_where_nothing_is_foreseen_little_is_put_off():
    rng = random.Random(7)
    took = [rng.uniform(0.005, 0.05) for _ in range(5000)]
    foreseen = [rng.uniform(0.005, 0.05) for _ in took]
    idle, put_off = follow(PlanTiming(), took, foreseen, [0.001] * len(took))
    assert idle < 0.002
    assert put_off < 0.2


def test_a_device_that_becomes_quicker_is_followed():
    took = [0.03] * 1000 + [0.01] * 1000
    foreseen = [0.03] * 1005 + [0.01] * 995  # learnt after five steps
    idle, put_off = follow(PlanTiming(), took, foreseen, [0.001] * len(took))
    assert idle < 0.004
    assert put_off > 0.6


def test_put_off_only_when_asked_to():
    assert follow(PlanTiming(late=False), [0.01] * 500, [0.01] * 500, [0.001] * 500) == (0.0, 0.0)


def test_waiting_for_the_device_is_no_work_of_the_host():
    """Each step is submitted only when the one before has ended, as with grammars: planning is put off all the same."""
    timing, now, waits = PlanTiming(), 0.0, []
    timing.submitted(0.02, now, now)
    for _ in range(300):
        began, waited = now, timing.wait_s(now)
        waits.append(waited)
        planned_at = now + waited
        now = began + 0.02
        timing.submitted(0.02, planned_at, now + 0.001, now - planned_at)
        timing.ended(0.02, now)
    assert waits[-1] >= 0.017


def test_what_a_later_request_may_need_is_prepared_once_and_only_when_there_is_nothing_to_do(monkeypatch):
    arrivals = [(1.0, asked("first")), (1.5 + 400 * 0.02, asked("second"))]  # a second's pause in between
    prepared: list[float] = []
    device = run(monkeypatch, arrivals, until=60.0, prepare=prepared.append)
    ended = device.plans[-1][0]
    assert len(device.plans) > 700 and len(prepared) == 1
    assert ended + loop_module.IDLE_S <= prepared[0] < ended + loop_module.IDLE_S + 0.3
