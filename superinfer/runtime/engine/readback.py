"""Results on their way from the device: copied to pinned memory behind the step, read once its event has come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from superinfer.kernels.sampling import NO_TOKEN
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
    decodes. tokens: of all rows; NO_TOKEN in those whose logits are no numbers, unless `seen` says which these are: see
    keep_sampled. top_wanted: logprobs that each such row asked for."""

    step: int
    begun: Marker
    ended: Marker
    in_order: int = 0
    slots: np.ndarray | None = None
    tokens: torch.Tensor | None = None
    seen: Callable[[], np.ndarray] | None = None
    logprob_rows: np.ndarray | None = None
    logprobs: tuple[torch.Tensor, ...] = ()
    top_wanted: list[int] = field(default_factory=list)
    forced: dict[int, tuple[int, ...]] = field(default_factory=dict)
    scored: Sequence[SlotWork] = ()
    score_tops: Sequence[int] = ()
    scores: tuple[torch.Tensor, ...] = ()

    def keep_sampled(
        self, slots: np.ndarray, sampled: Sampled, top_wanted: list[int], seen: Callable[[], np.ndarray] | None = None
    ) -> None:
        """Start the copies of what was sampled. slots: of the rows. seen: says which rows' logits are numbers, [rows]
        bool, once the step is over; for where `sampled` does not."""
        self.slots, self.seen = slots, seen
        self.tokens = to_host(sampled.tokens) if sampled.told is None else sampled.told
        self.forced = sampled.forced
        if sampled.logprobs is not None:
            self.logprob_rows = sampled.logprob_rows
            self.logprobs = tuple(to_host(part) for part in sampled.logprobs)
            self.top_wanted = top_wanted

    def keep_written(self, slots: np.ndarray, tokens: torch.Tensor) -> None:
        """The step writes its rows' tokens to host memory itself. tokens: [rows] int64 there, NO_TOKEN in rows
        whose logits are no numbers, not written again before this result is read. slots: of the rows."""
        self.slots, self.tokens = slots, tokens

    def keep_scores(self, scored: Sequence[SlotWork], tops: Sequence[int], scores: Sequence[torch.Tensor]) -> None:
        """Start the copies of scored tokens' logprobs. See split_scores."""
        self.scored, self.score_tops = scored, tops
        self.scores = tuple(to_host(part) for part in scores)

    def read_tokens(self) -> list[int]:
        """The tokens of all rows, NO_TOKEN where logits are no numbers. Waits for the step, which must have been
        enqueued whole."""
        self.ended.wait()
        tokens: list[int] = self._told().tolist()
        return tokens

    def _told(self) -> np.ndarray:
        """[rows], when the step is over. Later it is known without `seen`, which the next step but one may change."""
        assert self.tokens is not None
        if self.seen is not None:
            self.tokens = torch.where(torch.from_numpy(self.seen()), self.tokens, NO_TOKEN)
            self.seen = None
        tokens: np.ndarray = self.tokens.numpy()
        return tokens

    def result(self) -> StepResult:
        """Waits for the step."""
        self.ended.wait()
        result = StepResult(self.step, elapsed=self.ended.seconds_since(self.begun))
        if self.slots is not None and self.tokens is not None:
            first, tokens = self.in_order, self._told()
            result.decoded = tokens[:first].copy()  # where the next step but one writes
            result.tokens = dict(zip(self.slots[first:].tolist(), tokens[first:].tolist(), strict=True))
            result.not_finite = without_token(self.slots, tokens)
            result.forced = self.forced
            if self.logprob_rows is not None:
                chosen, ids, values = (part.tolist() for part in self.logprobs)
                for i, row in enumerate(self.logprob_rows.tolist()):
                    top = list(zip(ids[i], values[i], strict=True))[: self.top_wanted[i]]
                    result.logprobs[int(self.slots[row])] = TokenLogprob(int(tokens[row]), chosen[i], top)
        if self.scores:
            result.scores = split_scores(self.scored, self.score_tops, self.scores)
            result.not_finite |= without_score(result.scores)
        return result


def without_token(slots: np.ndarray, tokens: np.ndarray) -> frozenset[int]:
    """Slots whose token is NO_TOKEN. slots, tokens: [rows]."""
    return frozenset(slots[tokens == NO_TOKEN].tolist()) if tokens.min(initial=0) < 0 else frozenset()


def without_score(scores: Mapping[int, Sequence[TokenLogprob]]) -> frozenset[int]:
    """Slots with a logprob that is no number, as all are of a position whose logits are none. scores: by slot."""
    return frozenset(slot for slot, scored in scores.items() if any(math.isnan(score.logprob) for score in scored))


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
