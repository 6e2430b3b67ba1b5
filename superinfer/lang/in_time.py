"""A deadline's `on_miss` enforced at the client: where a service knows no SLOs, or was sent a plan in its stead."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from superinfer.errors import DeadlineMissedError
from superinfer.runtime.slo import SLO
from superinfer.runtime.text import TextDelta


def in_time(deltas: AsyncGenerator[TextDelta, None], slo: SLO | None, n: int) -> AsyncGenerator[TextDelta, None]:
    """The deltas until the deadline; then the request is cancelled, and `on_miss` decides. Close it when leaving early:
    that cancels the request."""
    if slo is None or slo.deadline is None or slo.on_miss == "finish":
        return deltas
    return _until(deltas, slo, slo.deadline, n)


async def _until(
    deltas: AsyncGenerator[TextDelta, None], slo: SLO, deadline: float, n: int
) -> AsyncGenerator[TextDelta, None]:
    due = asyncio.get_running_loop().time() + deadline
    open_indexes = set(range(n))
    async with contextlib.aclosing(deltas):
        while open_indexes:
            try:
                async with asyncio.timeout_at(due):
                    delta = await anext(deltas)
            except TimeoutError:
                if slo.on_miss == "raise":
                    raise DeadlineMissedError(f"no complete answer within the deadline of {slo.deadline} s") from None
                for index in sorted(open_indexes):
                    yield TextDelta(index, "", finish_reason="deadline")
                return
            except StopAsyncIteration:
                return
            if delta.finish_reason is not None:
                open_indexes.discard(delta.index)
            yield delta
