"""Requests made together over a common prefix: what of a prompt its siblings have too. Pure Python and NumPy."""

from __future__ import annotations

import numpy as np

from superinfer.runtime.scheduler.sequence import Sequence


class Siblings:
    """The groups with live members, by `hints.group` and salt. Its first member is what the others share with."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._groups: dict[tuple[str, str], tuple[Sequence, set[int]]] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def join(self, sequence: Sequence) -> int:
        """A request came: how many tokens, whole blocks, it shares with the first of its group. 0: it is the first."""
        key = _key(sequence)
        if key is None:
            return 0
        first, members = self._groups.setdefault(key, (sequence, set()))
        members.add(sequence.id)
        if first is sequence:
            return 0
        limit = min(first.num_prompt, sequence.num_prompt - 1)  # a prompt's last token is computed by whoever samples
        mine = np.frombuffer(sequence.tokens, dtype=np.int32, count=limit)
        theirs = np.frombuffer(first.tokens, dtype=np.int32, count=limit)
        differs = np.flatnonzero(mine != theirs)
        common = int(differs[0]) if len(differs) else limit
        return common // self._page_size * self._page_size

    def leave(self, sequence: Sequence) -> None:
        """It ended. A group without members is forgotten."""
        key = _key(sequence)
        if key is not None and key in self._groups:
            members = self._groups[key][1]
            members.discard(sequence.id)
            if not members:
                del self._groups[key]


def _key(sequence: Sequence) -> tuple[str, str] | None:
    group = sequence.hints.group if sequence.hints is not None else ""
    return (group, sequence.salt) if group else None
