"""Continuous batching: whatever the pressure, every sequence gets the tokens it would get alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_executor import MemoryExecutor, expected_output, next_token

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import POLICIES, build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence, Status
from superinfer.runtime.slo import SLO

PAGE = 4


class Bench:
    """A scheduler and a MemoryExecutor in step, with a clock of our own."""

    def __init__(
        self, blocks=32, slots=4, batch_tokens=8, overlap=False, policy="fcfs", prefix_cache=True, forces=False
    ):
        self.kv = KVCache(blocks, PAGE, prefix_cache=prefix_cache)
        self.scheduler = build_scheduler(policy, self.kv, SchedulerLimits(slots, batch_tokens, blocks * PAGE))
        self.executor = MemoryExecutor(blocks, PAGE, forces)
        self.overlap = overlap
        self.now = 0.0
        self.ids = 0
        self.outputs: dict[int, list[int]] = {}
        self.scores: dict[int, list[float]] = {}
        self.planned = 0
        self.plans = []

    def add(self, prompt, max_tokens=5, **kw) -> Sequence:
        self.ids += 1
        sequence = Sequence(id=self.ids, prompt=list(prompt), max_tokens=max_tokens, arrival=self.now, **kw)
        self.scheduler.add(sequence)
        return sequence

    def _take(self, updates):
        for update in updates:
            self.outputs.setdefault(update.sequence.id, []).extend(update.token_ids)
            if update.logprobs:
                self.scores.setdefault(update.sequence.id, []).extend(t.logprob for t in update.logprobs)

    def step(self) -> bool:
        self.now += 0.01
        self._take(self.scheduler.expire(self.now))
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.plans.append(plan)
            assert plan.num_tokens <= self.scheduler._limits.max_batch_tokens
            self.executor.submit(plan)
            self.planned += 1
        if self.planned and (plan is None or self.planned > int(self.overlap)):
            self.planned -= 1
            self._take(self.scheduler.commit(self.executor.collect(), self.now))
            return True
        return plan is not None

    def run(self, limit=5000):
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError("the scheduler does not come to an end")

    def check_all_given_back(self):
        self.kv.clear()
        assert self.kv.num_free == self.kv.num_blocks
        counts = self.scheduler.counts()
        assert (counts.running, counts.waiting) == (0, 0)


prompts = st.builds(
    lambda shared, own: [7] * shared + own,
    st.integers(0, 14),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
)


slos = st.one_of(
    st.none(),
    st.builds(SLO, ttft=st.sampled_from([0.02, 0.3]), tbt=st.sampled_from([None, 0.01, 0.1])),
    st.builds(SLO, deadline=st.sampled_from([0.05, 5.0]), weight=st.sampled_from([0.1, 1.0, 8.0])),
)


@drawn(
    80,
    300,
    jobs=st.lists(st.tuples(prompts, st.integers(1, 14), st.integers(0, 6), slos), min_size=1, max_size=12),
    blocks=st.integers(10, 20),
    slots=st.integers(1, 5),
    batch_tokens=st.integers(5, 20),
    overlap=st.booleans(),
    prefix_cache=st.booleans(),
    policy=st.sampled_from(sorted(POLICIES)),
    forces=st.booleans(),
)
def test_tokens_do_not_depend_on_policy_pressure_chunks_sharing_or_overlap(
    jobs, blocks, slots, batch_tokens, overlap, prefix_cache, policy, forces
):
    bench = Bench(blocks, slots, batch_tokens, overlap, policy, prefix_cache, forces)
    sequences = []
    for prompt, max_tokens, pause, slo in jobs:
        sequences.append(bench.add(prompt, max_tokens, stop_ids=(3,), slo=slo))
        for _ in range(pause):
            bench.step()
    bench.run()
    for (prompt, max_tokens, _, _), sequence in zip(jobs, sequences, strict=True):
        expected = expected_output(prompt, max_tokens, (3,), forces)
        assert bench.outputs[sequence.id] == expected
        assert sequence.finish_reason == ("stop" if expected[-1] == 3 else "length")
    bench.check_all_given_back()


def test_forced_tokens_take_no_step_of_their_own():
    def steps(forces: bool, overlap: bool) -> tuple[int, int]:
        bench = Bench(blocks=64, slots=2, batch_tokens=16, overlap=overlap, forces=forces)
        sequences = [bench.add([at, 2, 3], 60) for at in (1, 5)]
        bench.run()
        for at, sequence in zip((1, 5), sequences, strict=True):
            assert bench.outputs[sequence.id] == expected_output([at, 2, 3], 60, forces=forces)
        return len(bench.plans), sum(len(outputs) for outputs in bench.outputs.values())

    for overlap in (False, True):
        (one_by_one, tokens), (jumping, same) = steps(False, overlap), steps(True, overlap)
        assert tokens == same == 120 and jumping < 0.75 * one_by_one


@settings(max_examples=100, deadline=None)
@given(
    jobs=st.lists(st.tuples(prompts, st.integers(1, 14)), min_size=1, max_size=8),
    cancels=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 12)), max_size=6),
    failures=st.sets(st.integers(0, 12), max_size=2),
    overlap=st.booleans(),
    forces=st.booleans(),
)
def test_cancelled_and_failed_sequences_disturb_no_other(jobs, cancels, failures, overlap, forces):
    bench = Bench(blocks=12, slots=3, batch_tokens=8, overlap=overlap, forces=forces)
    sequences = [bench.add(prompt, max_tokens) for prompt, max_tokens in jobs]
    lost = set()
    for turn in range(14):
        for who, when in cancels:
            if when == turn and who < len(sequences):
                update = bench.scheduler.cancel(sequences[who], bench.now)
                if update is not None:
                    assert update.finish_reason == "cancelled"
                    lost.add(sequences[who].id)
        if turn in failures and not overlap:
            bench.executor.fail_next = True
            plan = bench.scheduler.plan(bench.now)
            if plan is not None:
                with pytest.raises(RuntimeError):
                    bench.executor.submit(plan)
                lost |= {s.id for s in bench.scheduler.abort(plan.step, bench.now)}
            bench.executor.fail_next = False
        bench.step()
    bench.run()
    for (prompt, max_tokens), sequence in zip(jobs, sequences, strict=True):
        assert sequence.status is Status.FINISHED
        if sequence.id not in lost:
            assert bench.outputs[sequence.id] == expected_output(prompt, max_tokens, forces=forces)
    bench.check_all_given_back()


def test_sequences_of_a_common_prompt_compute_it_once():
    bench = Bench(blocks=64, slots=8, batch_tokens=64)
    prompt = list(range(33))
    for _ in range(6):
        bench.add(prompt, 3)
    bench.run()
    computed = sum(w.length for plan in bench.plans for w in plan.work if w.tokens)
    assert computed == 33 + 5 * 1  # all but the last token is shared in whole blocks


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks():
    bench = Bench(blocks=64, slots=4, batch_tokens=8)
    first = bench.add([1, 2, 3], 30)
    bench.step()
    bench.add([5] * 60, 2)
    before = first.num_output
    for _ in range(8):
        bench.step()
    assert first.num_output == before + 8


def chunks_of(bench: Bench) -> list[list[int]]:
    """Lengths of the prefill chunks of each step that has any, in order of arrival."""
    steps = [[work.length for work in plan.work if work.tokens] for plan in bench.plans]
    return [lengths for lengths in steps if lengths]


def test_a_prompt_that_one_step_can_take_whole_is_not_begun_in_the_little_that_is_left_of_another():
    bench = Bench(blocks=400, slots=8, batch_tokens=100)
    for start in range(3):  # no common prefix
        bench.add(range(start, start + 90), 1)
    bench.run()
    assert chunks_of(bench) == [[90], [90], [90]]


def test_a_prompt_is_begun_where_much_is_left_or_no_step_can_take_it_whole():
    bench = Bench(blocks=400, slots=8, batch_tokens=100)
    for start, length in enumerate((70, 60, 95, 150)):
        bench.add(range(start, start + length), 1)
    bench.run()
    assert chunks_of(bench) == [[70, 30], [30, 70], [25, 75], [75]]


def test_the_latest_arrival_gives_way_when_blocks_run_out_and_still_ends_right():
    bench = Bench(blocks=6, slots=4, batch_tokens=32)
    first, second = bench.add([1] * 7, 14), bench.add([2] * 7, 14)
    bench.run()
    assert second.preemptions > 0
    assert first.preemptions == 0
    assert bench.outputs[second.id] == expected_output([2] * 7, 14)
    report = second.report(bench.now)
    assert report.preemptions == second.preemptions
    assert report.preempted_s > 0


@settings(max_examples=60, deadline=None)
@given(prompt=st.lists(st.integers(0, 9), min_size=2, max_size=30), data=st.data(), batch=st.integers(4, 9))
def test_scores_cover_the_asked_positions_in_any_chunks(prompt, data, batch):
    start = data.draw(st.integers(1, len(prompt) - 1))
    bench = Bench(batch_tokens=batch)
    other = bench.add(prompt[: start + 3], 4)  # a prefix in the cache, and company
    sequence = bench.add(prompt, 0, score_start=start)
    bench.run()
    assert bench.scores[sequence.id] == [-float(next_token(prompt[:p])) for p in range(start, len(prompt))]
    assert sequence.finish_reason == "scored"
    assert bench.outputs[other.id] == expected_output(prompt[: start + 3], 4)


@pytest.mark.parametrize("on_miss", ["truncate", "raise"])
def test_a_deadline_ends_what_is_not_to_finish_late(on_miss):
    bench = Bench()
    slow = bench.add([1, 2], 1000, slo=SLO(deadline=0.055, on_miss=on_miss))
    late = bench.add([1, 2], 20, slo=SLO(deadline=0.055))
    bench.run()
    assert slow.finish_reason == "deadline"
    assert 0 < slow.num_output < 10
    assert (late.finish_reason, late.num_output) == ("length", 20)
    assert late.report(bench.now).met is False


def test_far_deadlines_of_finished_sequences_are_not_kept():
    bench = Bench()
    for _ in range(500):
        bench.add([1], 1, slo=SLO(deadline=1e9, on_miss="truncate"))
        bench.run()
    assert len(bench.scheduler._deadlines) < 100


def test_a_report_says_which_stage_made_it_late():
    bench = Bench(slots=1)
    bench.add([1, 2, 3], 50)
    waited = bench.add([4, 5, 6], 2, slo=SLO(ttft=0.1))
    bench.run()
    report = waited.report(bench.now)
    assert (report.met, report.ttft_met, report.why) == (False, False, "queue")
    assert report.queue_s == pytest.approx(0.5, abs=0.05)
    assert report.queue_s + report.prefill_s + report.decode_s == pytest.approx(report.e2e_s)


def test_a_resumed_sequence_hands_its_output_to_the_sampler():
    bench = Bench(blocks=6, slots=4, batch_tokens=32)
    bench.add([1] * 7, 14)
    second = bench.add([2] * 7, 14, sampling=SamplingParams(seed=5))
    bench.run()
    inits = [i for plan in bench.plans for i in plan.init if i.prompt == tuple([2] * 7)]
    assert len(inits) == second.preemptions + 1
    assert inits[0].output == ()
    for init in inits[1:]:
        assert list(init.output) == bench.outputs[second.id][: len(init.output)]
        assert init.output


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="'lottery' is unknown"):
        build_scheduler("lottery", KVCache(4, 4), SchedulerLimits(1, 1, 16))


def test_scheduling_imports_no_torch():
    code = "import sys, superinfer.runtime.scheduler.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_sequence_alone_comes_back_at_once_after_giving_way_to_itself():
    # The second computes again what the first left in the cache beyond its prompt, and so holds those blocks twice.
    bench = Bench(blocks=10, slots=1, batch_tokens=5)
    prompt = [7] * 7 + [0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0]
    bench.add(prompt, 10)
    second = bench.add(prompt, 11)
    bench.run()
    assert second.preemptions > 0
    assert bench.outputs[second.id] == expected_output(prompt, 11)


@settings(max_examples=100, deadline=None)
@given(
    jobs=st.lists(st.tuples(prompts, st.integers(1, 14), st.booleans()), min_size=2, max_size=8), overlap=st.booleans()
)
def test_scores_and_generations_under_pressure_do_not_disturb_each_other(jobs, overlap):
    bench = Bench(blocks=10, slots=4, batch_tokens=6, overlap=overlap)
    added = []
    for prompt, max_tokens, scores in jobs:
        scores = scores and len(prompt) > 1
        added.append((prompt, max_tokens, scores, bench.add(prompt, max_tokens, score_start=1 if scores else None)))
        bench.step()
    bench.run()
    for prompt, max_tokens, scores, sequence in added:
        if scores:
            assert bench.scores[sequence.id] == [-float(next_token(prompt[:p])) for p in range(1, len(prompt))]
        else:
            assert bench.outputs[sequence.id] == expected_output(prompt, max_tokens)
    bench.check_all_given_back()
