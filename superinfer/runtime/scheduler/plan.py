"""A step is data: what one engine step computes, and what came of it. Pure Python; no torch.

A `StepPlan` is the scheduler's whole say: an executor needs nothing else. It carries only what changed since the last
plan (new slots, new blocks), and no sampled token: a decoding slot continues from the token the executor sampled last,
so that a plan can be made before the tokens of the step before it are known.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np

from superinfer.runtime.kv.copies import NO_COPIES, Copies, LinkUse
from superinfer.runtime.protocol import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class SlotInit:
    """A sequence takes executor slot `slot` before this step. Slots are reused once freed.

    prompt: all prompt token ids (the sampler counts them for repetition_penalty).
    output: token ids generated before a preemption; the next sample is number len(output).
    seed: 64-bit; token k of a sequence depends on (seed, k) and the logits alone.
    stop_ids: ids that end the sequence, barred until min_tokens have been generated.
    """

    slot: int
    sampling: SamplingParams
    seed: int
    prompt: tuple[int, ...]
    output: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()


class SlotWork(msgspec.Struct, frozen=True, gc=False):  # made for every decode of every step: a fifth of a dataclass
    """What one slot computes in this step: positions `start .. start + length - 1`.

    tokens: the token ids at these positions; empty for a decode (length 1, the token sampled last in this slot).
    new_blocks: KV block ids appended to the slot's block table before this step.
    sample: pick the token at position `start + length` from the logits of the last position.
    score: token ids whose log probability is wanted: score[i] is the token at position
        `start + length - len(score) + 1 + i`, judged by the logits of the position before it. Empty: none.
    """

    slot: int
    start: int
    length: int
    tokens: tuple[int, ...] = ()
    new_blocks: tuple[int, ...] = ()
    sample: bool = False
    score: tuple[int, ...] = ()

    @property
    def is_decode(self) -> bool:
        return not self.tokens

    @property
    def is_one_step(self) -> bool:
        """Whether it is one row that samples, like a decode's, be its token known here or on the device only."""
        return self.length == 1 and not self.score and (self.sample or not self.tokens)

    @property
    def is_untold(self) -> bool:
        """Whether it is a decode whose token is known from elsewhere: see `StepResult.forced`."""
        return not self.tokens and not self.sample


class Decodes(msgspec.Struct, frozen=True, eq=False):
    """Decodes as arrays: what sampled work of length 1 without tokens of its own would say one by one.

    slots, positions: [decodes] int64, each slot once. new_blocks: (slot, KV block ids appended to its block table
    before this step) of those that grow.
    """

    slots: np.ndarray
    positions: np.ndarray
    new_blocks: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def __len__(self) -> int:
        return len(self.slots)

    def one_by_one(self) -> tuple[SlotWork, ...]:
        """The same as SlotWork."""
        grown = dict(self.new_blocks)
        return tuple(
            SlotWork(slot, position, 1, (), grown.get(slot, ()), True)
            for slot, position in zip(self.slots.tolist(), self.positions.tolist(), strict=True)
        )


NO_DECODES = Decodes(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


class StepPlan(msgspec.Struct, frozen=True):
    """One immutable step: `decodes`, then `others` in execution order, decodes first, then prefill chunks.

    freed: slots given up before this step (their rows may be overwritten by `init` of the same plan).
    copies: block copies to start, after the work of earlier plans. waits: ids of copies, of this or earlier plans, that
        must be over before its work computes. See docs/duplexkv.md. There may be no work when copies are all there is.
    """

    step: int
    others: tuple[SlotWork, ...]
    init: tuple[SlotInit, ...] = ()
    freed: tuple[int, ...] = ()
    copies: Copies = NO_COPIES
    waits: tuple[int, ...] = ()
    decodes: Decodes = NO_DECODES

    @property
    def work(self) -> tuple[SlotWork, ...]:
        """All that is computed, one by one, for who does not care for arrays. O(sequences) at each call."""
        return self.decodes.one_by_one() + self.others if len(self.decodes) else self.others

    @property
    def has_work(self) -> bool:
        return bool(self.others) or len(self.decodes) > 0

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(w.length for w in self.others)

    @property
    def num_prefill_tokens(self) -> int:
        total = 0
        for work in reversed(self.others):  # chunks are last
            if not work.tokens:
                break
            total += len(work.tokens)
        return total


@dataclass(slots=True)
class StepResult:
    """What an executor made of a StepPlan.

    tokens: sampled token id by slot, for every SlotWork with `sample`; for the plan's `decodes` too, unless `decoded`,
        [decodes] of integers in their order, has those.
    logprobs: by slot, for those whose SamplingParams ask for them.
    forced: by slot, tokens that follow the sampled one whatever the model says, a grammar being why. Steps under way
        that sample for the slot pick the first of them.
    scores: by slot, logprobs of the scored prompt tokens of this chunk, in order.
    not_finite: slots whose logits were no numbers. What else the result says of them means nothing.
    elapsed: seconds the executor took.
    copied, failed_copies: ids of copies that are over and in no result before this; those the plan waits for are in it.
    link: what became of the link's time since the last result.
    """

    step: int
    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    forced: dict[int, tuple[int, ...]] = field(default_factory=dict)
    scores: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    not_finite: frozenset[int] = frozenset()
    elapsed: float = 0.0
    copied: list[int] = field(default_factory=list)
    failed_copies: list[int] = field(default_factory=list)
    link: LinkUse = field(default_factory=LinkUse)
    decoded: np.ndarray | None = None
