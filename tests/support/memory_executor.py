"""An executor without a model: its KV cache is an array of token ids, its next token a hash of what it reads there.

Whatever the bookkeeping gets wrong (a block handed out twice, a prefix shared that is not equal, a position skipped)
changes the tokens, so equality with `expected_output` proves the bookkeeping.
"""

from __future__ import annotations

import zlib
from array import array

from superinfer.runtime.protocol import TokenLogprob
from superinfer.runtime.scheduler.plan import SlotInit, StepPlan, StepResult

VOCAB = 50
EMPTY = -1


def next_token(tokens: list[int]) -> int:
    """The token this "model" puts after `tokens`."""
    return zlib.crc32(array("i", tokens).tobytes()) % VOCAB


def forced_run(tokens: list[int]) -> list[int]:
    """What this "grammar" forces after `tokens`: mostly nothing, sometimes a few tokens, none of them below 10."""
    drawn = zlib.crc32(array("i", [VOCAB, *tokens]).tobytes())
    return [10 + (drawn >> at) % 40 for at in range(3 + drawn % 5)] if drawn % 4 == 0 else []


def expected_output(
    prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = (), forces: bool = False
) -> list[int]:
    """What a sequence alone, with all the memory it wants, generates."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens += (forced_run(tokens) if forces else []) or [next_token(tokens)]
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :][:max_tokens]


class MemoryExecutor:
    """Runs StepPlans over `num_blocks` blocks of `page` token ids. Results wait in order until collected.

    forces: what `forced_run` says follows a token for certain is told with it, as a grammar's forced text is.
    """

    def __init__(self, num_blocks: int, page: int, forces: bool = False) -> None:
        self.forces = forces
        self.given: dict[int, list[int]] = {}  # of a forced run, what steps planned before it was known still sample
        self.page = page
        self.memory = [[EMPTY] * page for _ in range(num_blocks)]
        self.tables: dict[int, list[int]] = {}
        self.last_token: dict[int, int] = {}
        self.done: list[StepResult] = []
        self.fail_next = False

    def submit(self, plan: StepPlan) -> None:
        for slot in plan.freed:
            self.tables.pop(slot, None)
            self.given.pop(slot, None)
        for init in plan.init:
            self._init(init)
        result = StepResult(step=plan.step)
        seen = set()
        for work in plan.work:
            assert work.slot not in seen, "a slot works once a step"
            seen.add(work.slot)
            table = self.tables[work.slot]
            table += work.new_blocks
            tokens = work.tokens or (self.last_token[work.slot],)
            assert len(tokens) == work.length
            for position, token in enumerate(tokens, work.start):
                self.memory[table[position // self.page]][position % self.page] = token
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("planted failure")
        for work in plan.work:
            known = self._read(work.slot, work.start + work.length)
            if work.sample:
                if work.tokens:
                    self.given.pop(work.slot, None)
                if self.forces and not self.given.get(work.slot):
                    self.given[work.slot] = forced_run(known)
                    if self.given[work.slot]:
                        result.forced[work.slot] = tuple(self.given[work.slot][1:])
                given = self.given.get(work.slot)
                result.tokens[work.slot] = self.last_token[work.slot] = given.pop(0) if given else next_token(known)
            first = work.start + work.length + 1 - len(work.score)
            result.scores[work.slot] = [
                TokenLogprob(token_id=token, logprob=-float(next_token(known[:at])))
                for at, token in enumerate(work.score, first)
            ]
        self.done.append(result)

    def collect(self) -> StepResult:
        return self.done.pop(0)

    def close(self) -> None:
        pass

    def _init(self, init: SlotInit) -> None:
        assert init.slot not in self.tables, "a slot is given out once"
        self.tables[init.slot] = []

    def _read(self, slot: int, length: int) -> list[int]:
        table = self.tables[slot]
        tokens = [self.memory[table[p // self.page]][p % self.page] for p in range(length)]
        assert EMPTY not in tokens, "a position was read before it was computed"
        return tokens
