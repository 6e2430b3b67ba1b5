"""Which tokens each constrained slot may take next, as a mask for the sampler. See docs/constrained.md."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from superinfer.runtime.scheduler.plan import SlotInit

if TYPE_CHECKING:
    import xgrammar

    from superinfer.runtime.engine.grammar import GrammarCompiler

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
        # Tokens sampled and not read yet: the matchers they are for, and who waits for the step and returns them.
        self._unread: list[tuple[list[xgrammar.GrammarMatcher], Callable[[], list[int]]]] = []

    def start(self, init: SlotInit) -> None:
        """A constrained sequence takes its slot."""
        assert init.sampling.grammar is not None
        self._matchers[init.slot] = self._grammars.matcher(init.sampling.grammar, init.stop_ids, init.output)

    def release(self, slot: int) -> None:
        """The slot is free, whether it was constrained or not."""
        self._matchers.pop(slot, None)

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
        indices, matchers = list(at), list(at.values())
        self._batch.batch_fill_next_token_bitmask(matchers, self._bitmask, indices)
        used = self._bitmask[: indices[-1] + 1]
        _let_dead_ends_end(used.numpy(), at)
        masked: Any = indices if len(indices) < len(logits) else None
        if self._device.type == "cuda":
            # A list of rows would be copied from pageable memory, which waits for all that the device has to do.
            used = self._send(used.numpy())
            if masked is not None:
                masked = self._send(np.array(indices, dtype=np.int32))
        xgrammar.apply_token_bitmask_inplace(logits, used, indices=masked)

    def sampled(self, slots: np.ndarray, rows: np.ndarray, read: Callable[[], list[int]]) -> None:
        """Tokens have been picked for all rows of a step. read: returns them, when they are wanted."""
        matchers = [self._matchers[slot] for slot in slots[rows].tolist()]
        self._unread.append((matchers, lambda: np.array(read())[rows].tolist()))

    def _read(self) -> None:
        for matchers, read in self._unread:
            for matcher, token in zip(matchers, read(), strict=True):
                if not matcher.is_terminated() and not matcher.accept_token(token):
                    log.error("token %d does not follow its grammar, and was chosen all the same", token)
        self._unread.clear()


def _let_dead_ends_end(bitmask: np.ndarray, matchers: dict[int, xgrammar.GrammarMatcher]) -> None:
    """Where nothing is allowed, allow the end. bitmask: [rows, vocab / 32] int32. matchers: by row."""
    rows = np.array(list(matchers))
    for row in rows[~bitmask[rows].any(axis=1)].tolist():
        log.error("a grammar allows no token that the vocabulary has; the sequence ends there")
        for token_id in matchers[row].stop_token_ids:
            bitmask[row].view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)
