"""Results on their way from the device: copied to pinned memory behind the step, read once its event has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from superinfer.runtime.engine.marker import Marker
from superinfer.runtime.engine.sampling_state import Sampled
from superinfer.runtime.protocol import TokenLogprob
from superinfer.runtime.scheduler.plan import SlotWork, StepResult


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory that is valid once a mark set after this call is reached."""
    if not tensor.is_cuda:
        return tensor.clone()
    from superinfer.kernels import host_memory  # needs triton, which comes with CUDA builds of torch

    # The allocator does not know of the kernel: whoever drops this before the mark drops it at his peril.
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host_memory.copy(there, tensor.contiguous())
    return there


@dataclass(slots=True)
class Pending:
    """A step under way. begun, ended: its place in the stream. in_order: so many of its first rows are the plan's
    decodes. top_wanted: logprobs that each such row asked for."""

    step: int
    begun: Marker
    ended: Marker
    in_order: int = 0
    slots: np.ndarray | None = None
    tokens: torch.Tensor | None = None
    logprob_rows: np.ndarray | None = None
    logprobs: tuple[torch.Tensor, ...] = ()
    top_wanted: list[int] = field(default_factory=list)
    forced: dict[int, tuple[int, ...]] = field(default_factory=dict)
    scored: Sequence[SlotWork] = ()
    score_tops: Sequence[int] = ()
    scores: tuple[torch.Tensor, ...] = ()

    def keep_sampled(self, slots: np.ndarray, sampled: Sampled, top_wanted: list[int]) -> None:
        """Start the copies of what was sampled. slots: of the rows."""
        self.slots = slots
        self.tokens = to_host(sampled.tokens)
        self.forced = sampled.forced
        if sampled.logprobs is not None:
            self.logprob_rows = sampled.logprob_rows
            self.logprobs = tuple(to_host(part) for part in sampled.logprobs)
            self.top_wanted = top_wanted

    def keep_written(self, slots: np.ndarray, tokens: torch.Tensor) -> None:
        """The step writes its rows' tokens to host memory itself. tokens: [rows] int64 there, not written again before
        this result is read. slots: of the rows."""
        self.slots, self.tokens = slots, tokens

    def keep_scores(self, scored: Sequence[SlotWork], tops: Sequence[int], scores: Sequence[torch.Tensor]) -> None:
        """Start the copies of scored tokens' logprobs. See split_scores."""
        self.scored, self.score_tops = scored, tops
        self.scores = tuple(to_host(part) for part in scores)

    def read_tokens(self) -> list[int]:
        """The tokens of all rows. Waits for the step, which must have been enqueued whole."""
        assert self.tokens is not None
        self.ended.wait()
        tokens: list[int] = self.tokens.tolist()
        return tokens

    def result(self) -> StepResult:
        """Waits for the step."""
        self.ended.wait()
        result = StepResult(self.step, elapsed=self.ended.seconds_since(self.begun))
        if self.slots is not None and self.tokens is not None:
            first = self.in_order
            result.decoded = self.tokens[:first].numpy().copy()  # where the next step but one writes
            result.tokens = dict(zip(self.slots[first:].tolist(), self.tokens[first:].tolist(), strict=True))
            result.forced = self.forced
            if self.logprob_rows is not None:
                slots, tokens = self.slots.tolist(), self.tokens.tolist()
                chosen, ids, values = (part.tolist() for part in self.logprobs)
                for i, row in enumerate(self.logprob_rows.tolist()):
                    top = list(zip(ids[i], values[i], strict=True))[: self.top_wanted[i]]
                    result.logprobs[slots[row]] = TokenLogprob(tokens[row], chosen[i], top)
        if self.scores:
            result.scores = split_scores(self.scored, self.score_tops, self.scores)
        return result


def split_scores(
    scored: Sequence[SlotWork], tops: Sequence[int], scores: Sequence[torch.Tensor]
) -> dict[int, list[TokenLogprob]]:
    """The logprobs of scored tokens by slot.

    tops: how many rivals each of `scored` wants. scores: on the host, of all scored tokens in order, [tokens] logprobs,
    and unless nobody wants rivals [tokens, max(tops)] ids and logprobs of the most likely.
    """
    columns = [part.tolist() for part in scores]
    chosen = columns[0]
    found: dict[int, list[TokenLogprob]] = {}
    at = 0
    for work, top in zip(scored, tops, strict=True):
        rows = range(at, at + len(work.score))
        at += len(work.score)
        if not top:
            found[work.slot] = [TokenLogprob(token, chosen[i]) for token, i in zip(work.score, rows, strict=True)]
            continue
        _, ids, values = columns
        found[work.slot] = [
            TokenLogprob(token, chosen[i], list(zip(ids[i][:top], values[i][:top], strict=True)))
            for token, i in zip(work.score, rows, strict=True)
        ]
    return found
