"""Two tiers: whatever rotates, loads, fails or is cancelled, every sequence gets the tokens it would get alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from memory_executor import expected_output
from tiered_executor import TieredMemoryExecutor

from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence, Status

PAGE = 4


class Bench:
    """A scheduler over two tiers and a TieredMemoryExecutor in step, with a clock of our own."""

    def __init__(self, blocks=12, dram=40, slots=4, batch_tokens=12, depth=1, policy="lru", quantum=0, **executor):
        self.kv = DuplexCache(blocks, dram, PAGE, prefix_cache=executor.pop("prefix_cache", True))
        self.scheduler = build_scheduler(policy, self.kv, SchedulerLimits(slots, batch_tokens, blocks * PAGE))
        self.scheduler.quantum = quantum
        self.executor = TieredMemoryExecutor(blocks, dram, PAGE, **executor)
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

    def check(self, sequences, max_tokens=None):
        for sequence in sequences:
            assert sequence.status is Status.FINISHED
            if sequence.finish_reason not in ("cancelled", None):
                prompt = list(sequence.tokens[: sequence.num_prompt])
                assert self.outputs[sequence.id] == expected_output(prompt, sequence.max_tokens)

    def check_all_given_back(self):
        kv = self.kv
        assert kv.num_pending == 0
        kv.clear()
        assert (kv.num_free, kv.num_dram_free, kv.num_dram_pinned) == (kv.num_blocks, kv.num_dram, 0)
        assert sorted(kv._free) == list(range(kv.num_blocks))
        assert sorted(kv._free_dram) == list(range(kv.num_dram))
        assert not (kv._roots or kv._idle or kv._lru or kv._mirrors or kv._busy or kv._busy_dram)
        counts = self.scheduler.counts()
        assert (counts.running, counts.waiting) == (0, 0)


prompts = st.builds(
    lambda shared, own: [7] * shared + own,
    st.integers(0, 14),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
)
jobs = st.lists(st.tuples(prompts, st.integers(1, 14), st.integers(0, 6)), min_size=2, max_size=10)
shapes = st.fixed_dictionaries(
    dict(
        blocks=st.integers(10, 16),
        dram=st.integers(1, 60),
        slots=st.integers(1, 5),
        batch_tokens=st.integers(5, 20),
        depth=st.integers(1, 3),
        policy=st.sampled_from(["lru", "lru", "fcfs"]),
        quantum=st.sampled_from([0, 0, 1, 3]),
        prefix_cache=st.sampled_from([True, True, True, False]),
        seed=st.integers(0, 2**16),
        eager=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    )
)


def play(bench: Bench, work, max_waits=8, mirror_blocks=32) -> list[Sequence]:
    rotation = bench.scheduler._rotation
    rotation.max_waits, rotation.mirror_blocks = max_waits, mirror_blocks
    sequences = []
    for prompt, max_tokens, pause in work:
        sequences.append(bench.add(prompt, max_tokens))
        for _ in range(pause):
            bench.step()
    return sequences


@settings(max_examples=400, deadline=None)
@given(jobs, shapes, st.sampled_from([0, 1, 3, 100]), st.sampled_from([0, 1, 32]))
def test_tokens_do_not_depend_on_rotation_or_on_when_copies_land(work, shape, max_waits, mirror_blocks):
    bench = Bench(**shape)
    sequences = play(bench, work, max_waits, mirror_blocks)
    bench.run()
    bench.check(sequences)
    bench.check_all_given_back()


@settings(max_examples=300, deadline=None)
@given(
    jobs,
    shapes,
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 25)), max_size=6),
    st.sampled_from([0.0, 0.02, 0.2]),
    st.sets(st.integers(0, 25), max_size=2),
)
def test_failed_copies_failed_steps_and_cancels_disturb_no_other(work, shape, cancels, fails, failing_steps):
    bench = Bench(**shape)
    bench.executor.fails = fails
    sequences = play(bench, work)
    for turn in range(26):
        for who, when in cancels:
            if when == turn and who < len(sequences):
                bench.scheduler.cancel(sequences[who], bench.now)
        bench.executor.fail_next = turn in failing_steps
        bench.step()
    bench.executor.fail_next = False
    bench.run(20_000)
    bench.check(sequences)
    bench.check_all_given_back()
