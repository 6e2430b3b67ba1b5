"""Which tokens each constrained slot may take next, as a mask for the sampler. See docs/constrained.md."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from superinfer.runtime.engine.grammar_jump import TAIL
from superinfer.runtime.scheduler.plan import SlotInit

if TYPE_CHECKING:
    import xgrammar

    from superinfer.runtime.engine.grammar import GrammarCompiler

    _Whose = tuple[xgrammar.GrammarMatcher, deque[int] | None]

log = logging.getLogger("superinfer.engine")


class Constraints:
    """One matcher for each slot whose request has a grammar."""

    def __init__(
        self, slots: int, device: torch.device, grammars: GrammarCompiler, send: Callable[[np.ndarray], torch.Tensor]
    ) -> None:
        """send: an array to the device, before the work that comes next."""
        self._grammars = grammars
        self._device = device
        self._send = send
        self._slots = slots
        self._matchers: dict[int, xgrammar.GrammarMatcher] = {}
        self._bitmask: torch.Tensor | None = None  # [slots, vocab / 32] int32, on the host
        self._batch: xgrammar.BatchGrammarMatcher | None = None
        self._tails: dict[int, deque[int]] = {}  # last tokens of the slots whose grammar may jump
        self._given: dict[int, deque[int]] = {}  # forced tokens that the slot's matcher has accepted ahead of its steps
        self.forced: dict[int, tuple[int, ...]] = {}  # what the last `mask` found to follow the token it forces
        # Tokens sampled and not read yet: the matchers they are for, and who waits for the step and returns them.
        self._unread: list[tuple[list[_Whose], Callable[[], list[int]]]] = []
        self._known: Collection[int] = ()  # rows of the last `mask` whose token it forced

    def start(self, init: SlotInit, *, jumps: bool) -> None:
        """A constrained sequence takes its slot. jumps: what the grammar forces need not be sampled."""
        assert init.sampling.grammar is not None
        self._matchers[init.slot] = self._grammars.matcher(init.sampling.grammar, init.stop_ids, init.output)
        self._given.pop(init.slot, None)
        self._tails.pop(init.slot, None)
        if jumps:
            self._tails[init.slot] = deque(init.output[-TAIL:], TAIL)

    def release(self, slot: int) -> None:
        """The slot is free, whether it was constrained or not."""
        self._matchers.pop(slot, None)
        self._tails.pop(slot, None)
        self._given.pop(slot, None)

    def caught_up(self, slot: int) -> None:
        """The slot computes all tokens that are known of it, forced ones included, and samples the next."""
        self._given.pop(slot, None)

    def mask(self, logits: torch.Tensor, slots: np.ndarray, rows: np.ndarray) -> None:
        """Forbid in place what may not come next. Waits for the tokens of steps before, if they are not known yet.

        logits: [rows, vocab] float32. slots: of all rows. rows: the constrained ones.
        """
        import xgrammar

        self._read()
        if self._bitmask is None or self._batch is None:
            self._bitmask = xgrammar.allocate_token_bitmask(self._slots, self._grammars.vocab_size)
            self._batch = xgrammar.BatchGrammarMatcher(max_threads=1)
        # One that has ended is in a step planned ahead, whose token nobody will see.
        at = {row: self._matchers[slot] for row, slot in zip(rows.tolist(), slots[rows].tolist(), strict=True)}
        at = {row: matcher for row, matcher in at.items() if not matcher.is_terminated()}
        if not at:
            return
        only = self._only(slots, at)
        free = {row: matcher for row, matcher in at.items() if row not in only}
        if free:
            self._batch.batch_fill_next_token_bitmask(list(free.values()), self._bitmask, list(free))
        indices = list(at)
        used = self._bitmask[: indices[-1] + 1]
        _let_dead_ends_end(used.numpy(), free)
        for row, token in only.items():
            used[row] = 0
            _allow(used[row].numpy(), token)
        masked: Any = indices if len(indices) < len(logits) else None
        if self._device.type == "cuda":
            # A list of rows would be copied from pageable memory, which waits for all that the device has to do.
            used = self._send(used.numpy())
            if masked is not None:
                masked = self._send(np.array(indices, dtype=np.int32))
        xgrammar.apply_token_bitmask_inplace(logits, used, indices=masked)

    def _only(self, slots: np.ndarray, at: dict[int, xgrammar.GrammarMatcher]) -> dict[int, int]:
        """The token of each row that has no choice. at: matchers by row. Says in `forced` what follows, where a text
        is forced from here on."""
        only: dict[int, int] = {}
        self.forced = {}
        for row, matcher in at.items():
            slot = int(slots[row])
            tail = self._tails.get(slot)
            if tail is None:
                continue
            given = self._given.get(slot)
            if not given:
                tokens = self._grammars.forced(matcher, tail)
                if not tokens:
                    continue
                given = self._given[slot] = deque(tokens)
                tail.extend(tokens)
                self.forced[slot] = tuple(tokens[1:])
            only[row] = given.popleft()
        self._known = only.keys()
        return only

    def sampled(self, slots: np.ndarray, rows: np.ndarray, read: Callable[[], list[int]]) -> None:
        """Tokens have been picked for all rows of a step. read: returns them, when they are wanted."""
        rows = np.array([row for row in rows.tolist() if row not in self._known], dtype=np.int64)
        if not len(rows):
            return
        whose = [(self._matchers[slot], self._tails.get(slot)) for slot in slots[rows].tolist()]
        self._unread.append((whose, lambda: np.array(read())[rows].tolist()))

    def _read(self) -> None:
        for whose, read in self._unread:
            for (matcher, tail), token in zip(whose, read(), strict=True):
                if not matcher.is_terminated() and not matcher.accept_token(token):
                    log.error("token %d does not follow its grammar, and was chosen all the same", token)
                if tail is not None:
                    tail.append(token)
        self._unread.clear()


def _let_dead_ends_end(bitmask: np.ndarray, matchers: dict[int, xgrammar.GrammarMatcher]) -> None:
    """Where nothing is allowed, allow the end. bitmask: [rows, vocab / 32] int32. matchers: by row."""
    rows = np.array(list(matchers), dtype=np.int64)
    for row in rows[~bitmask[rows].any(axis=1)].tolist():
        log.error("a grammar allows no token that the vocabulary has; the sequence ends there")
        for token_id in matchers[row].stop_token_ids:
            _allow(bitmask[row], token_id)


def _allow(row: np.ndarray, token_id: int) -> None:
    """row: [vocab / 32] int32."""
    row.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)
