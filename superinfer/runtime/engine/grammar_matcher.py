"""Follows a grammar that has signs before its long texts: takes the signs in, counts, and keeps the texts' bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xgrammar

from superinfer.runtime.engine.grammar_lengths import Bound, TokenLengths, piece_of, sign_of


class _Place(NamedTuple):
    """bound: of the text that is being written; None outside of one. written: its characters so far.
    escaped: it ends behind a backslash."""

    bound: Bound | None
    written: int
    escaped: bool = False


_OUTSIDE = _Place(None, 0)


class CountingMatcher(xgrammar.GrammarMatcher):
    """A matcher whose masks are to be `narrow`ed once they are filled, and which is told by `took` of tokens that were
    accepted in a batch."""

    def __init__(
        self,
        compiled: xgrammar.CompiledGrammar,
        bounds: Sequence[Bound],
        lengths: TokenLengths,
        stop_ids: Sequence[int] = (),
    ) -> None:
        super().__init__(compiled, override_stop_tokens=list(stop_ids) or None)
        self._lengths = lengths
        self._signs = [(bound, sign_of(number)) for number, bound in enumerate(bounds)]
        self._place = _OUTSIDE
        self._undo: list[tuple[int, _Place]] = []  # of tokens since the last `took`: the library's steps; place before

    def accept_token(self, token_id: int, *, debug_print: bool = False) -> bool:
        if not super().accept_token(token_id, debug_print=debug_print):
            return False
        before = self._place
        self._undo.append((1 + self._follow(token_id), before))
        return True

    def took(self, token_id: int) -> None:
        """The token has been accepted, and will not be taken back."""
        self._undo.clear()
        self._follow(token_id)

    def rollback(self, num_tokens: int = 1) -> None:
        if num_tokens:
            undone, self._undo = self._undo[-num_tokens:], self._undo[:-num_tokens]
            super().rollback(sum(steps for steps, _ in undone))
            self._place = undone[0][1]

    def find_jump_forward_string(self) -> str:
        text = super().find_jump_forward_string()
        for _, sign in self._signs:
            text = text.partition(sign)[0]
        return text

    def narrow(self, bits: np.ndarray) -> None:
        """Keep the bound of the text that is being written. bits: [vocab / 32] uint32, of this matcher's mask."""
        bound, written, escaped = self._place
        if bound is not None:
            most = None if bound.most is None else bound.most - written
            self._lengths.narrow(bits, escaped, bound.least - written, most)

    def _follow(self, token_id: int) -> int:
        """Count a token's characters. How many signs have been taken in behind it."""
        text, place = self._lengths.vocabulary[token_id], self._place
        if place.bound is not None:
            piece = piece_of(text, place.escaped)
            if not piece.ends:
                self._place = _Place(place.bound, place.written + piece.characters, piece.escapes)
                return 0
            self._place = _OUTSIDE
        if text.endswith(b'"'):
            for bound, sign in self._signs:
                if self.accept_string(sign):
                    self._place = _Place(bound, 0)
                    return 1
        return 0
