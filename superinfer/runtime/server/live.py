"""/v1/live: what the engine does now, as events for the page at `/`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import msgspec

from superinfer.errors import SuperinferError
from superinfer.runtime.client import AsyncEngineClient
from superinfer.runtime.protocol import LiveReport, StatsReport
from superinfer.runtime.server.metrics import Metrics
from superinfer.runtime.server.stream import event

PERIOD_S = 0.25
MAX_LANES = 256
MAX_WATCHERS = 64
STATS_EVERY = 4  # reports


class Live:
    """Asks the engine while somebody watches, and once for all who do."""

    def __init__(self, client: AsyncEngineClient, metrics: Metrics) -> None:
        self._client, self._metrics = client, metrics
        self._watchers = 0
        self._lock = asyncio.Lock()
        self._latest, self._at, self._asked = b"", 0.0, 0
        self._stats: StatsReport | None = None

    @property
    def full(self) -> bool:
        """Whether no further watcher is let in."""
        return self._watchers >= MAX_WATCHERS

    async def events(self) -> AsyncGenerator[bytes, None]:
        """An event every PERIOD_S, until the engine is gone."""
        self._watchers += 1
        try:
            while True:
                try:
                    data = await self._now()
                except SuperinferError as error:
                    yield event(msgspec.json.encode({"error": str(error)}))
                    return
                yield data
                await asyncio.sleep(PERIOD_S)
        finally:
            self._watchers -= 1

    async def _now(self) -> bytes:
        async with self._lock:
            if time.monotonic() - self._at > PERIOD_S / 2:
                if self._asked % STATS_EVERY == 0:
                    self._stats = await self._client.stats()
                self._asked += 1
                report = await self._client.live(MAX_LANES)
                self._latest = event(_encoded(report, self._stats, self._metrics.attainment()))
                self._at = time.monotonic()
            return self._latest


def _encoded(report: LiveReport, stats: StatsReport | None, attainment: dict[str, tuple[int, int]]) -> bytes:
    tiers = stats.tiers if stats is not None else None
    body = {
        "sequences": report.sequences,
        "unfinished": report.unfinished,
        "output_tokens": report.output_tokens,
        "bytes_in": report.bytes_in,
        "bytes_out": report.bytes_out,
        "attainment": {name: {"met": met, "total": total} for name, (met, total) in attainment.items()},
        "gpu_blocks": None if stats is None else [stats.blocks_total - stats.blocks_free, stats.blocks_total],
        "cpu_blocks": None if tiers is None else [tiers.dram_blocks - tiers.dram_free, tiers.dram_blocks],
        "rotations": 0 if tiers is None else tiers.rotations_out,
    }
    return msgspec.json.encode(body)
