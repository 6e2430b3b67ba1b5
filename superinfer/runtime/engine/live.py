"""What the engine does now, for a person who watches: made only when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

from superinfer.runtime.kv.tiers import TierTable
from superinfer.runtime.protocol import LiveSequence, LiveState
from superinfer.runtime.scheduler.sequence import Sequence, Status


def live_sequences(sequences: Iterable[Sequence], limit: int, now: float) -> list[LiveSequence]:
    """The first `limit` of them as they are at `now`, the engine's clock."""
    return [_live(sequence, now) for sequence in islice(sequences, max(0, limit))]


def _live(sequence: Sequence, now: float) -> LiveSequence:
    due = sequence.timeline.due(sequence.num_output)
    age = now - sequence.arrival
    return LiveSequence(
        request_id=sequence.request_id,
        index=sequence.index,
        state=_state(sequence),
        prompt_tokens=sequence.num_prompt,
        output_tokens=sequence.num_output,
        age_s=age,
        slack_s=None if math.isinf(due) else due - age,
        slo_class=getattr(sequence, "slo_class", ""),
        program=sequence.program,
    )


def _state(sequence: Sequence) -> LiveState:
    if sequence.status is Status.WAITING:
        return "cpu" if sequence.table is not None else "waiting"
    table = sequence.table
    return "loading" if isinstance(table, TierTable) and table.awaits else "gpu"
