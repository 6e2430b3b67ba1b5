"""What each simple policy prefers, and that preferring never becomes starving."""

from __future__ import annotations

import pytest

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.lengths import ENOUGH
from superinfer.runtime.scheduler.plan import StepResult
from superinfer.runtime.scheduler.registry import POLICIES, build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence, Status
from superinfer.runtime.scheduler.sjf import AGING
from superinfer.runtime.slo import SLO

STEP_S = 0.05


class Server:
    """One slot unless said otherwise; a step takes STEP_S."""

    def __init__(self, policy: str, slots: int = 1, blocks: int = 64) -> None:
        self.scheduler = build_scheduler(policy, KVCache(blocks, 16), SchedulerLimits(slots, 64, blocks * 16))
        self.now = 0.0
        self.ids = 0
        self.finished: list[int] = []

    def add(self, max_tokens=4, prompt=4, **given) -> Sequence:
        self.ids += 1
        sequence = Sequence(
            id=self.ids, prompt=[self.ids] * prompt, max_tokens=max_tokens, arrival=self.now, **given
        )  # fmt: skip
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> bool:
        plan = self.scheduler.plan(self.now)
        self.now += STEP_S
        if plan is not None:
            result = StepResult(plan.step, {work.slot: 1 for work in plan.work if work.sample})
            for update in self.scheduler.commit(result, self.now):
                if update.finish_reason is not None:
                    self.finished.append(update.sequence.id)
        return plan is not None

    def run(self) -> None:
        while self.step():
            assert self.now < 1000


def order(server: Server, *sequences: Sequence) -> list[int]:
    server.run()
    wanted = {sequence.id: at for at, sequence in enumerate(sequences)}
    return [wanted[id] for id in server.finished if id in wanted]


def test_edf_serves_whose_token_is_due_first_whenever_it_came():
    server = Server("edf")
    nothing = server.add()
    late = server.add(slo=SLO(deadline=30.0))
    soon = server.add(slo=SLO(ttft=1.0, tbt=0.1))
    sooner = server.add(slo=SLO(ttft=0.2))
    assert order(server, sooner, soon, late, nothing) == [0, 1, 2, 3]


def test_edf_takes_the_place_of_whom_its_timeline_gives_most_time():
    server = Server("edf", slots=2, blocks=5)
    patient = server.add(prompt=20, max_tokens=20, slo=SLO(ttft=50.0, tbt=1.0))
    server.step()
    urgent = server.add(prompt=20, max_tokens=20, slo=SLO(ttft=1.0, tbt=0.1))
    server.run()
    assert (patient.preemptions > 0, urgent.preemptions) == (True, 0)


def test_sjf_serves_the_shortest_predicted_first():
    server = Server("sjf")
    long, short, wordy = server.add(max_tokens=30), server.add(max_tokens=5), server.add(max_tokens=5, prompt=60)
    assert order(server, short, wordy, long) == [0, 1, 2]


def test_sjf_learns_what_a_program_takes():
    server = Server("sjf")
    for _ in range(ENOUGH):
        server.add(max_tokens=20, program="essay")
        server.add(max_tokens=20, program="label", stop_ids=(1,))
    server.run()
    essay, label = server.add(max_tokens=20, program="essay"), server.add(max_tokens=20, program="label", stop_ids=(1,))
    assert order(server, label, essay) == [0, 1]


def test_sjf_remembers_no_finished_sequence():
    server = Server("sjf")
    for _ in range(20):
        server.add()
    cancelled = server.add()
    server.scheduler.cancel(cancelled, server.now)
    server.run()
    assert server.scheduler._expected == {}


def test_priority_serves_the_heavier_first_and_equals_in_order():
    server = Server("priority")
    light, first = server.add(slo=SLO.batch()), server.add()
    server.now += 0.01
    second, heavy = server.add(), server.add(slo=SLO(weight=4.0))
    assert order(server, heavy, first, second, light) == [0, 1, 2, 3]


FAVOURED = {
    "fcfs": {},
    "lru": {},
    "lvf-time": {},
    "rota": {"slo": SLO(ttft=5.0, tbt=1.0)},
    "edf": {"slo": SLO(ttft=0.1)},
    "sjf": {"max_tokens": 1},
    "priority": {"slo": SLO(weight=16.0)},
}
SCORNED = {
    "fcfs": {},
    "lru": {},
    "lvf-time": {},
    "rota": {},
    "edf": {},
    "sjf": {"max_tokens": 500},
    "priority": {"slo": SLO(weight=0.5)},
}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_nobody_starves_under_an_endless_stream_of_the_favoured(policy):
    server = Server(policy, slots=2)
    for _ in range(20):
        server.add(**FAVOURED[policy])
    scorned = server.add(**SCORNED[policy])
    while scorned.status is not Status.FINISHED:
        while server.scheduler.counts().waiting < 20:  # more always come than can be served
            server.add(**FAVOURED[policy])
        server.step()
        assert server.now < 120, "it starves"
    assert scorned.num_output == scorned.max_tokens


def test_one_second_of_waiting_makes_up_for_its_tokens():
    server = Server("sjf")
    blocker = server.add(max_tokens=60)
    server.step()
    long = server.add(max_tokens=60)
    server.now += 60 / AGING + 0.1
    short = server.add(max_tokens=2)
    assert order(server, blocker, long, short) == [0, 1, 2]


def test_whoever_is_let_in_leaves_the_running_a_block_each_to_grow():
    server = Server("fcfs", slots=4, blocks=4)
    first, second = server.add(prompt=20, max_tokens=40), server.add(prompt=20, max_tokens=40)
    server.run()
    assert first.preemptions == second.preemptions == 0  # two blocks each would fit, and then one had to go

    server.scheduler.headroom = 0
    first, second = server.add(prompt=20, max_tokens=40), server.add(prompt=20, max_tokens=40)
    server.run()
    assert (first.preemptions, second.preemptions) == (0, 1)
