"""A sequence whose logits are no numbers fails alone, and nobody finds what may be why in the cache."""

from __future__ import annotations

import pytest
from drawn import drawn
from hypothesis import strategies as st
from memory_executor import MemoryExecutor, expected_output

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.plan import StepPlan
from superinfer.runtime.scheduler.registry import POLICIES, build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence, Status

PAGE = 4
SPOILS = 49  # the token behind which no logits are numbers


class SpoiltExecutor(MemoryExecutor):
    """Its logits are no numbers at a position that reads SPOILS, or a place in memory that is marked as spoilt."""

    def __init__(self, num_blocks: int, page: int) -> None:
        super().__init__(num_blocks, page)
        self.spoilt_blocks: set[int] = set()

    def submit(self, plan: StepPlan) -> None:
        works = plan.work
        super().submit(plan)
        self.done[-1].not_finite = frozenset(w.slot for w in works if (w.sample or w.score) and self._is_spoilt(w))

    def _is_spoilt(self, work) -> bool:
        end = work.start + work.length
        blocks = self.tables[work.slot][: -(-end // self.page)]
        return SPOILS in self._read(work.slot, end) or bool(self.spoilt_blocks & set(blocks))


class Bench:
    """A scheduler and an executor that run `ahead` steps before results are committed."""

    def __init__(self, kv: KVCache, slots=4, batch_tokens=8, ahead=1, policy="fcfs") -> None:
        self.kv = kv
        self.scheduler = build_scheduler(policy, kv, SchedulerLimits(slots, batch_tokens, kv.num_blocks * PAGE))
        self.executor = SpoiltExecutor(kv.num_blocks, PAGE)
        self.ahead, self.waiting, self.now = ahead, 0, 0.0
        self.outputs: dict[int, list[int]] = {}
        self.failed: list[int] = []
        self.copies: list[list[int]] = []  # of the steps under way; whatever they hold, they are over with the step

    def add(self, id: int, prompt: list[int], max_tokens=5, **kw) -> Sequence:
        sequence = Sequence(id=id, prompt=prompt, max_tokens=max_tokens, arrival=self.now, **kw)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> bool:
        self.now += 0.01
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.executor.submit(plan)
            self.copies.append([copy.id for copy in plan.copies])
            self.waiting += 1
        elif not self.waiting:
            return False
        if plan is None or self.waiting > self.ahead:
            self.waiting -= 1
            result = self.executor.collect()
            result.copied = self.copies.pop(0)
            updates = self.scheduler.commit(result, self.now)
            for update in updates:
                self.outputs.setdefault(update.sequence.id, []).extend(update.token_ids)
            self.failed += [sequence.id for sequence in updates.not_finite]
        return True

    def run(self) -> None:
        for _ in range(3000):
            if not self.step():
                return
        raise AssertionError("the scheduler does not come to an end")


jobs = st.lists(
    st.tuples(
        st.integers(0, 14),  # of a beginning that many share
        st.lists(st.sampled_from([0, 1, 2, SPOILS]), min_size=1, max_size=12),
        st.integers(1, 9),
    ),
    min_size=1,
    max_size=12,
)


@drawn(
    60,
    300,
    jobs=jobs,
    blocks=st.integers(10, 20),
    slots=st.integers(1, 5),
    batch_tokens=st.integers(5, 20),
    ahead=st.integers(0, 2),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_all_others_get_their_tokens_and_all_blocks_are_given_back(jobs, blocks, slots, batch_tokens, ahead, policy):
    bench = Bench(KVCache(blocks, PAGE), slots, batch_tokens, ahead, policy)
    prompts = [[7] * shared + own for shared, own, _ in jobs]
    sequences = [bench.add(id, prompt, jobs[id][2]) for id, prompt in enumerate(prompts)]
    bench.run()
    for id, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        assert sequence.status is Status.FINISHED
        wanted = expected_output(prompt, jobs[id][2])
        if SPOILS in prompt:
            assert id in bench.failed and not bench.outputs.get(id)
        elif SPOILS in wanted[:-1]:
            assert id in bench.failed and bench.outputs[id] == wanted[: wanted.index(SPOILS) + 1]
        else:
            assert id not in bench.failed and bench.outputs[id] == wanted
        if id in bench.failed:
            assert sequence.finish_reason is None
    assert len(bench.failed) == len(set(bench.failed))
    for prompt in prompts:  # no position that reads SPOILS can be found
        path = bench.kv.match(Sequence(id=99, prompt=prompt, max_tokens=1, arrival=0.0).tokens, "", len(prompt))
        assert SPOILS not in prompt[: len(path) * PAGE]
    bench.kv.clear()
    assert bench.kv.num_free == bench.kv.num_blocks
    counts = bench.scheduler.counts()
    assert (counts.running, counts.waiting) == (0, 0)


def cached(bench: Bench, prompt: list[int]) -> int:
    """Tokens of it that a request would find."""
    sequence = Sequence(id=999, prompt=prompt, max_tokens=1, arrival=0.0)
    return len(bench.kv.match(sequence.tokens, "", len(prompt))) * PAGE


@pytest.mark.parametrize("ahead", [0, 1])
def test_what_was_right_before_stays_cached_and_what_is_suspect_does_not(ahead):
    bench = Bench(KVCache(40, PAGE), ahead=ahead)
    shared = list(range(16))
    bench.add(1, [*shared, 20], 1)
    bench.run()
    assert cached(bench, shared) == 16
    prompt = shared + [30, 31, 32, 33] * 3 + [SPOILS] + [34] * 8
    failing = bench.add(2, prompt)
    bench.run()
    assert bench.failed == [2] and failing.cached == 16
    assert cached(bench, prompt) == 16  # also not what lies before SPOILS: who knows what spoilt the logits


def test_what_generated_tokens_filled_stays_as_logits_were_right_up_to_there():
    bench = Bench(KVCache(40, PAGE))
    prompt = next(p for p in ([i, i + 1, 3] for i in range(4000)) if 9 < _spoilt_at(p) < 30)
    wanted = expected_output(prompt, 40)
    bench.add(1, prompt, 40)
    bench.run()
    right = len(prompt) + wanted.index(SPOILS)
    assert bench.failed == [1] and bench.outputs[1] == wanted[: wanted.index(SPOILS) + 1]
    assert cached(bench, prompt + wanted) == right // PAGE * PAGE


def _spoilt_at(prompt: list[int]) -> int:
    wanted = expected_output(prompt, 40)
    return wanted.index(SPOILS) if SPOILS in wanted else -1


@pytest.mark.parametrize("ahead", [0, 1])
def test_blocks_of_a_prompt_that_was_given_up_are_forgotten_by_the_first_who_fails_over_them(ahead):
    """Cancelled before its logits told that they are spoilt, it left them in the cache."""
    bench = Bench(KVCache(40, PAGE), ahead=ahead)
    prompt = list(range(28))
    first = bench.add(1, prompt)
    while first.committed < 16:
        bench.step()
    bench.executor.spoilt_blocks = set(first.table.blocks[:2])
    bench.scheduler.cancel(first, bench.now)
    bench.run()
    assert cached(bench, prompt) >= 16
    second = bench.add(2, prompt)
    bench.run()
    assert bench.failed == [2] and second.cached >= 16
    assert cached(bench, prompt) == 0
    bench.executor.spoilt_blocks = set()  # they are computed again
    bench.add(3, prompt)
    bench.run()
    assert bench.failed == [2] and bench.outputs[3] == expected_output(prompt, 5)


@pytest.mark.parametrize("ahead", [0, 1])
def test_who_shares_suspect_blocks_without_logits_of_its_own_starts_again(ahead):
    """One prompt's chunk is spoilt; another adopts it before either has logits."""
    bench = Bench(KVCache(60, PAGE), batch_tokens=8, ahead=ahead)
    prompt = list(range(16))
    first = bench.add(1, [*prompt, 20, 21, 22])
    while not first.table or not first.table.num_cached:
        bench.step()
    bench.executor.spoilt_blocks = {first.table.blocks[0]}
    second = bench.add(2, prompt + [30] * 40)
    while first.status is not Status.FINISHED:
        assert second.status is not Status.FINISHED
        bench.step()
    assert bench.failed == [1] and second.status is Status.WAITING and second.table is None
    assert second.preemptions == 1 and cached(bench, prompt) == 0
    bench.executor.spoilt_blocks = set()
    bench.run()
    assert bench.failed == [1] and bench.outputs[2] == expected_output(prompt + [30] * 40, 5)
    bench.kv.clear()
    assert bench.kv.num_free == bench.kv.num_blocks


def test_a_prompt_that_is_scored_fails_and_keeps_nothing():
    bench = Bench(KVCache(40, PAGE))
    prompt = [*list(range(10)), SPOILS, *list(range(10))]
    bench.add(1, prompt, 0, score_start=1)
    bench.add(2, list(range(21)), 0, score_start=1)
    bench.run()
    assert bench.failed == [1]
    assert cached(bench, prompt) <= 8 and cached(bench, list(range(20))) == 20


def test_a_second_tier_forgets_its_copies_too():
    bench = Bench(build_cache(40, 40, PAGE), policy="lru")
    prompt = list(range(40))
    first = bench.add(1, prompt)
    while first.committed < 16:
        bench.step()
    bench.kv.mirror(8)
    assert bench.kv.num_dram_free < 40
    bench.executor.spoilt_blocks = set(first.table.blocks)
    bench.run()
    assert bench.failed == [1] and cached(bench, prompt) == 0
    assert bench.kv.num_free == 40 and bench.kv.num_dram_free == 40
