"""Makes StepPlans by hand: sequences with block tables of the test's choosing, no scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from superinfer.runtime.engine.executor import Executor
from superinfer.runtime.protocol import SamplingParams, TokenLogprob
from superinfer.runtime.scheduler.plan import NO_DECODES, Decodes, SlotInit, SlotWork, StepPlan, StepResult

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Sequence:
    """One sequence on a slot. known: prompt plus re-prefilled output. computed: positions whose KV is written."""

    slot: int
    known: list[int]
    blocks: list[int]
    computed: int = 0
    handed: int = 0
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)


class Stepper:
    """Drives an executor. Blocks are handed out in a shuffled order, so that no test passes by contiguity.

    arrays: every other decode of a step comes in the plan's `decodes`, as a scheduler's cohort does.
    """

    def __init__(self, executor: Executor, seed: int = 0, arrays: bool = False) -> None:
        self.executor = executor
        self.arrays = arrays
        self.page = executor.limits.page_size
        self.free = np.random.default_rng(seed).permutation(executor.limits.num_blocks).tolist()
        self.slots = list(range(executor.limits.num_slots))
        self.inits: list[SlotInit] = []
        self.freed: list[int] = []
        self.steps = 0

    def add(
        self,
        prompt: list[int],
        sampling: SamplingParams = GREEDY,
        seed: int = 0,
        room: int = 64,
        slot: int | None = None,
        output: list[int] = [],  # noqa: B006 - never modified
        stop_ids: tuple[int, ...] = (),
        shared: tuple[int, ...] = (),
    ) -> Sequence:
        """room: tokens that will be generated. shared: full blocks of an equal prefix, already computed."""
        slot = self.slots.pop(0) if slot is None else slot
        if slot in self.slots:
            self.slots.remove(slot)
        needed = -(-(len(prompt) + room) // self.page) - len(shared)
        blocks = [*shared, *(self.free.pop(0) for _ in range(needed))]
        self.inits.append(SlotInit(slot, sampling, seed, tuple(prompt), tuple(output), stop_ids))
        return Sequence(slot, [*prompt, *output], blocks, computed=len(shared) * self.page)

    def remove(self, sequence: Sequence) -> None:
        self.freed.append(sequence.slot)
        self.slots.append(sequence.slot)
        self.free += sequence.blocks

    def prefill(self, sequence: Sequence, length: int | None = None, score: bool = False) -> SlotWork:
        """The next `length` known tokens, or all; the last chunk samples unless the sequence is scored."""
        start = sequence.computed
        end = len(sequence.known) if length is None else min(start + length, len(sequence.known))
        sample = end == len(sequence.known) and not score
        scored = tuple(sequence.known[start + 1 : end + 1]) if score else ()
        if score and end == len(sequence.known):  # the last position has no known successor: end one earlier
            end -= 1
        tokens = tuple(sequence.known[start:end])
        return self._work(sequence, start, end, tokens=tokens, sample=sample, score=scored)

    def decode(self, sequence: Sequence) -> SlotWork:
        return self._work(sequence, sequence.computed, sequence.computed + 1, sample=True)

    def _work(self, sequence: Sequence, start: int, end: int, **kwargs: object) -> SlotWork:
        blocks = -(-end // self.page)
        new = tuple(sequence.blocks[sequence.handed : blocks])
        sequence.handed = max(sequence.handed, blocks)
        sequence.computed = end
        return SlotWork(sequence.slot, start, end - start, new_blocks=new, **kwargs)  # type: ignore[arg-type]

    def step(self, *pairs: tuple[Sequence, SlotWork]) -> StepResult:
        """Run one step and hand each sequence its results."""
        works = [work for _, work in pairs]
        steady = [work for work in works if work.is_decode and work.sample][::2] if self.arrays else []
        others = tuple(work for work in works if work not in steady)
        decodes = _as_arrays(steady) if steady else NO_DECODES
        plan = StepPlan(self.steps, others, tuple(self.inits), tuple(self.freed), decodes=decodes)
        self.inits, self.freed = [], []
        self.steps += 1
        self.executor.submit(plan)
        result = self.executor.collect()
        if steady and result.decoded is not None:
            result.tokens.update(zip(decodes.slots.tolist(), result.decoded.tolist(), strict=True))
        for sequence, work in pairs:
            if work.sample:
                sequence.output.append(result.tokens[work.slot])
            if work.slot in result.logprobs:
                sequence.logprobs.append(result.logprobs[work.slot])
            sequence.scores += result.scores.get(work.slot, [])
        return result

    def run(self, sequences: list[Sequence], tokens: int, chunk: int | None = None) -> None:
        """Prefill everyone (in chunks, one chunk each a step) beside decodes, until all have `tokens` outputs."""
        while True:
            pairs = []
            for sequence in sequences:
                if sequence.computed < len(sequence.known):
                    pairs.append((sequence, self.prefill(sequence, chunk)))
                elif len(sequence.output) < tokens:
                    pairs.insert(0, (sequence, self.decode(sequence)))
            if not pairs:
                return
            self.step(*pairs)


def _as_arrays(works: list[SlotWork]) -> Decodes:
    slots, positions = ([getattr(work, name) for work in works] for name in ("slot", "start"))
    grown = tuple((work.slot, work.new_blocks) for work in works if work.new_blocks)
    return Decodes(np.array(slots), np.array(positions), grown)
