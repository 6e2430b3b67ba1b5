"""What the phases measure, in numbers; the small plan tries the harness on a model of a few megabytes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from arms import Arm
from clients import Clients, Outcome, Work
from servers import Server

from superinfer.bench.load import Asking
from superinfer.bench.openai_stream import Server as Described
from superinfer.runtime.sim.workload import Job
from superinfer.runtime.slo import SLO


@dataclass(frozen=True)
class Plan:
    """Lengths in tokens, times in seconds, rates in requests/s.

    scale: of the Azure trace's lengths. slo_rates: of all arms; an arm's `rates` may name fewer.
    turns_scale: of the Mooncake trace's lengths; turns_s: the time in which its conversations are replayed,
    as many as have `turns_set` times the pool's tokens. pace: of this plan, in the seconds that the schedule expects.
    """

    azure: Path
    mooncake: Path
    vocab: int = 128_000
    seed: int = 0
    batches: tuple[int, ...] = (1, 32, 128, 256)
    prompt: int = 512
    output: int = 160
    rounds: int = 3
    prefill: tuple[tuple[int, int], ...] = ((16, 2048), (16, 8000))
    prefill_rounds: int = 3
    offline: tuple[int, int, int] = (1024, 100, 1024)
    scale: float = 1.0
    online_rates: tuple[float, ...] = (16.0, 20.0, 24.0)
    online_s: float = 40.0
    slo_rates: tuple[float, ...] = (15.0, 25.0, 35.0)
    slo_s: float = 60.0
    drain_s: float = 20.0
    slo: SLO = field(default_factory=SLO.interactive)
    turns_scale: float = 0.25
    turns_s: float = 45.0
    turns_set: int = 10
    pace: float = 1.0

    @classmethod
    def small(cls, azure: Path, mooncake: Path) -> Plan:
        """Seconds on a CPU, with the embedded model."""
        return cls(
            azure, mooncake, vocab=1000, batches=(1, 4), prompt=24, output=24, rounds=1, prefill=((4, 64),),
            prefill_rounds=1, offline=(12, 8, 40), scale=0.05, online_rates=(3.0,), online_s=3.0, slo_rates=(3.0, 6.0),
            slo_s=3.0, drain_s=20.0, turns_scale=0.01, turns_s=4.0, pace=0.1,
        )  # fmt: skip


@dataclass
class Bench:
    """One server under measurement, and who measures it. blocks: of its KV pool. until: on time.monotonic."""

    plan: Plan
    arm: Arm
    server: Server
    described: Described
    clients: Clients
    blocks: int
    until: float

    def left_s(self) -> float:
        """Seconds that are left for measuring."""
        return self.until - time.monotonic()

    def asking(self, stream: bool = True) -> Asking:
        """How this arm is asked."""
        return Asking(self.described, send_slo=self.arm.send_slo, priority=self.arm.priority, stream=stream)

    def run(
        self, jobs: list[Job], seed: int, *, stream: bool = True, drain_s: float = 150.0, window_s: float | None = None
    ) -> Outcome:
        """All clients together. seed: of the prompts; runs with the same one would find them in the cache."""
        return self.clients.run(Work(self.asking(stream), jobs, self.plan.vocab, seed, drain_s, window_s))

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{self.arm.name}] {text}", flush=True)


def closed(count: int, prompt: int, output: int) -> list[Job]:
    """`count` jobs at once, of these lengths, that share nothing."""
    return [Job(0.0, prompt, output, (-1 - at,), prompt) for at in range(count)]


def check(outcome: Outcome) -> None:
    """Every job answered with all its tokens. Raises RuntimeError."""
    for sample in outcome.samples:
        if sample.error or sample.tokens != sample.wanted:
            why = sample.error or "stopped early"
            raise RuntimeError(f"{sample.tokens} of {sample.wanted} tokens: {why} {sample.detail}")
