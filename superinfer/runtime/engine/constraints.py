"""Which tokens each constrained slot may take next, as a mask for the sampler. See docs/constrained.md."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from superinfer.runtime.engine.grammar_jump import TAIL
from superinfer.runtime.scheduler.plan import SlotInit

if TYPE_CHECKING:
    import xgrammar

    from superinfer.runtime.engine.grammar import GrammarCompiler

log = logging.getLogger("superinfer.engine")


@dataclass(slots=True, eq=False)
class _Constrained:
    """One slot's. tail: the tokens before; None where what the grammar forces is sampled all the same. given: forced
    tokens that the matcher has accepted ahead of the slot's steps. has_ended: a token of stop_ids has been accepted,
    nothing else could come, or the logits were no numbers."""

    matcher: xgrammar.GrammarMatcher
    stop_ids: frozenset[int]
    tail: deque[int] | None
    given: deque[int] = field(default_factory=deque)
    has_ended: bool = False


class Constraints:
    """One matcher for each slot whose request has a grammar."""

    def __init__(
        self, slots: int, device: torch.device, grammars: GrammarCompiler, send: Callable[[np.ndarray], torch.Tensor]
    ) -> None:
        """send: an array to the device, before the work that comes next."""
        self._grammars = grammars
        self._device = device
        self._send = send
        self._num_slots = slots
        self._slots: dict[int, _Constrained] = {}
        self._bitmask: torch.Tensor | None = None  # [slots, vocab / 32] int32, on the host
        self._batch: xgrammar.BatchGrammarMatcher | None = None
        self.forced: dict[int, tuple[int, ...]] = {}  # what the last `mask` found to be forced from its tokens on
        # Tokens sampled and not read yet: whose they are, and who waits for the step and returns them.
        self._unread: list[tuple[list[_Constrained], Callable[[], list[int]]]] = []
        self._known: Collection[int] = ()  # rows of the last `mask` whose token it forced

    def start(self, init: SlotInit, *, jumps: bool) -> None:
        """A constrained sequence takes its slot. jumps: what the grammar forces need not be sampled."""
        assert init.sampling.grammar is not None
        matcher = self._grammars.matcher(init.sampling.grammar, init.stop_ids, init.output)
        tail = deque(init.output[-TAIL:], TAIL) if jumps else None
        has_ended = matcher.is_terminated()
        self._slots[init.slot] = _Constrained(matcher, frozenset(matcher.stop_token_ids), tail, has_ended=has_ended)

    def release(self, slot: int) -> None:
        """The slot is free, whether it was constrained or not."""
        self._slots.pop(slot, None)

    def caught_up(self, slot: int) -> None:
        """The slot computes all tokens that are known of it, forced ones included, and samples the next."""
        constrained = self._slots.get(slot)
        if constrained is not None:
            constrained.given.clear()

    def mask(self, logits: torch.Tensor, slots: np.ndarray, rows: np.ndarray) -> None:
        """Forbid in place what may not come next. Waits for the tokens of steps before, if they are not known yet.

        logits: [rows, vocab] float32. slots: of all rows. rows: the constrained ones.
        """
        import xgrammar

        from superinfer.runtime.engine.grammar_matcher import CountingMatcher

        self._read()
        if self._bitmask is None or self._batch is None:
            self._bitmask = xgrammar.allocate_token_bitmask(self._num_slots, self._grammars.vocab_size)
            self._batch = xgrammar.BatchGrammarMatcher(max_threads=1)
        only, free = self._divided(slots[rows].tolist(), rows.tolist())
        indices = sorted([*only, *free])
        if not indices:
            return
        used = self._bitmask[: indices[-1] + 1]
        bits = used.numpy().view(np.uint32)
        if free:
            matchers = [constrained.matcher for constrained in free.values()]
            self._batch.batch_fill_next_token_bitmask(matchers, self._bitmask, list(free))
            for row, matcher in zip(free, matchers, strict=True):
                if isinstance(matcher, CountingMatcher):
                    matcher.narrow(bits[row])
            _let_dead_ends_end(bits, free)
        if only:
            _allow_alone(bits, np.array(list(only), dtype=np.int64), np.array(list(only.values()), dtype=np.int64))
        masked: Any = indices if len(indices) < len(logits) else None
        if self._device.type == "cuda":
            # A list of rows would be copied from pageable memory, which waits for all that the device has to do.
            used = self._send(used.numpy())
            if masked is not None:
                masked = self._send(np.array(indices, dtype=np.int32))
        xgrammar.apply_token_bitmask_inplace(logits, used, indices=masked)

    def _divided(self, slots: list[int], rows: list[int]) -> tuple[dict[int, int], dict[int, _Constrained]]:
        """The token of each row that has no choice; what constrains the others. By row, without those that have ended:
        they are in a step planned ahead, whose token nobody will see. Says in `forced` what is forced from here on."""
        only: dict[int, int] = {}
        free: dict[int, _Constrained] = {}
        self.forced = {}
        for slot, row in zip(slots, rows, strict=True):
            constrained = self._slots[slot]
            if constrained.has_ended:
                continue
            given, tail = constrained.given, constrained.tail
            if not given and tail is not None:
                tokens = self._grammars.forced(constrained.matcher, tail)
                if tokens:
                    given.extend(tokens)
                    tail.extend(tokens)
                    self.forced[slot] = tuple(tokens)
            if given:
                only[row] = given.popleft()
            else:
                free[row] = constrained
        self._known = only.keys()
        return only, free

    def sampled(self, slots: np.ndarray, rows: np.ndarray, read: Callable[[], list[int]]) -> None:
        """Tokens have been picked for all rows of a step. read: returns them, when they are wanted; below 0 where the
        logits were no numbers."""
        known = self._known
        unknown = [row for row in rows.tolist() if row not in known] if known else rows.tolist()
        if not unknown:
            return
        whose = [self._slots[slot] for slot in slots[unknown].tolist()]

        def read_unknown() -> list[int]:
            tokens = read()
            return [tokens[row] for row in unknown]

        self._unread.append((whose, read_unknown))

    def _read(self) -> None:
        from xgrammar import BatchGrammarMatcher

        from superinfer.runtime.engine.grammar_matcher import CountingMatcher

        for whose, read in self._unread:
            told = list(zip(whose, read(), strict=True))
            for constrained, token in told:
                constrained.has_ended |= token < 0  # it has failed
            pairs = [pair for pair in told if not pair[0].has_ended]
            if not pairs:
                continue
            matchers, tokens = [constrained.matcher for constrained, _ in pairs], [token for _, token in pairs]
            accepted = BatchGrammarMatcher.batch_accept_token(matchers, tokens)
            for (constrained, token), taken in zip(pairs, accepted, strict=True):
                if not taken:
                    log.error("token %d does not follow its grammar, and was chosen all the same", token)
                elif token in constrained.stop_ids:
                    constrained.has_ended = constrained.matcher.is_terminated()
                elif isinstance(constrained.matcher, CountingMatcher):
                    constrained.matcher.took(token)
                if constrained.tail is not None:
                    constrained.tail.append(token)
        self._unread.clear()


def split_forced(
    forced: dict[int, tuple[int, ...]], told: Container[int], before: Container[int]
) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]:
    """What a step's masks force, by slot: what its own result is to tell, behind the token that it samples, and what
    the result of the step before can tell already, as that sampled the token in front of it.

    told: slots of the step whose tokens its plan gave. before: slots whose token the step before samples; empty where
    its result is no longer to be changed.
    """
    earlier = {slot: tokens for slot, tokens in forced.items() if slot in before and slot not in told}
    return {slot: tokens[1:] for slot, tokens in forced.items() if slot not in earlier}, earlier


def _let_dead_ends_end(bits: np.ndarray, free: dict[int, _Constrained]) -> None:
    """Where nothing is allowed, allow the end, which the matcher would not accept: it has no more to say. bits: [rows,
    vocab / 32] uint32. free: by row."""
    if np.bitwise_or.reduce(bits, axis=1).all():
        return
    for row, constrained in free.items():
        if not bits[row].any():
            log.error("a grammar allows no token that the vocabulary has; the sequence ends there")
            constrained.has_ended = bool(constrained.stop_ids)
            for token_id in constrained.stop_ids:
                bits[row, token_id // 32] |= np.uint32(1 << token_id % 32)


def _allow_alone(bits: np.ndarray, rows: np.ndarray, tokens: np.ndarray) -> None:
    """Leave each of these rows one token. bits: [rows, vocab / 32] uint32."""
    bits[rows] = 0
    bits[rows, tokens // 32] = np.left_shift(np.uint32(1), (tokens % 32).astype(np.uint32))
