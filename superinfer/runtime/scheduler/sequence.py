"""The life of one sequence, as plain state. Pure Python; no torch."""

from __future__ import annotations

from array import array
from enum import Enum
from typing import NamedTuple

import msgspec

from superinfer.runtime.kv.cache import BlockTable
from superinfer.runtime.protocol import FinishReason, RequestReport, SamplingParams, TokenLogprob
from superinfer.runtime.slo import SLO, TokenTimeline


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One continuation of one request (or one prompt to score). Times are seconds on the engine's monotonic clock.

    tokens: prompt and generated ids. num_prompt: how many of them are the prompt.
    scheduled: positions whose KV some planned step computes; committed: of those, steps that are done.
    in_flight: tokens that planned steps will sample and that are not known yet.
    resume_at: tokens to prefill when it last took a slot; from there on it decodes.
    let_in: when it last took a slot, and let_in_with how many tokens generated, at which position.
    rotations: times its KV went to the second tier; its table is then kept, parked, while it waits.
    score_start: score the prompt from this position on instead of generating; None: generate.
    """

    __slots__ = (
        "arrival",
        "cached",
        "committed",
        "finish_reason",
        "finished_at",
        "first_scheduled",
        "id",
        "in_flight",
        "index",
        "let_in",
        "let_in_at",
        "let_in_with",
        "max_tokens",
        "num_prompt",
        "owner",
        "preempted_at",
        "preempted_s",
        "preemptions",
        "program",
        "request_id",
        "resume_at",
        "rotations",
        "salt",
        "sampling",
        "scheduled",
        "score_start",
        "seed",
        "slo",
        "slo_class",
        "slot",
        "status",
        "stop_ids",
        "table",
        "timeline",
        "tokens",
    )

    def __init__(
        self,
        *,
        id: int,
        prompt: list[int],
        arrival: float,
        max_tokens: int,
        sampling: SamplingParams | None = None,
        slo: SLO | None = None,
        slo_class: str = "",
        request_id: str = "",
        index: int = 0,
        owner: bytes = b"",
        salt: str = "",
        program: str = "",
        seed: int = 0,
        stop_ids: tuple[int, ...] = (),
        score_start: int | None = None,
    ) -> None:
        self.id = id
        self.request_id, self.index, self.owner = request_id, index, owner
        self.tokens = array("i", prompt)
        self.num_prompt = len(prompt)
        self.sampling = sampling or SamplingParams()
        self.slo, self.slo_class, self.salt, self.program = slo, slo_class, salt, program
        self.max_tokens, self.seed, self.stop_ids, self.score_start = max_tokens, seed, stop_ids, score_start
        self.arrival = arrival
        self.timeline = TokenTimeline(slo)
        self.status = Status.WAITING
        self.slot = -1
        self.table: BlockTable | None = None
        self.scheduled = self.committed = self.in_flight = self.resume_at = 0
        self.cached = 0
        self.first_scheduled: float | None = None
        self.finished_at: float | None = None
        self.finish_reason: FinishReason | None = None
        self.preempted_at: float | None = None
        self.preempted_s = 0.0
        self.preemptions = self.rotations = 0
        self.let_in, self.let_in_with, self.let_in_at = arrival, 0, 0

    @property
    def num_output(self) -> int:
        """Tokens generated and known."""
        return len(self.tokens) - self.num_prompt

    @property
    def compute_length(self) -> int:
        """Positions that can be computed by now: of tokens known and in flight. Scoring needs no last position."""
        return len(self.tokens) + self.in_flight if self.score_start is None else self.num_prompt - 1

    @property
    def is_prefilling(self) -> bool:
        """Whether its next work is a chunk of known tokens rather than one decode."""
        return self.scheduled < self.resume_at

    @property
    def is_under_way(self) -> bool:
        """Whether planned work of it has no result yet that a new residency would have to know."""
        return self.in_flight > 0 or (self.table is not None and self.committed < self.scheduled)

    @property
    def wants_more(self) -> bool:
        """False once planned steps sample its last possible token."""
        if self.score_start is not None:
            return self.scheduled < self.compute_length
        return self.scheduled < self.compute_length and self.num_output + self.in_flight < self.max_tokens

    def report(self, now: float) -> RequestReport:
        """How it went, as of `now`."""
        end = self.finished_at if self.finished_at is not None else now
        started = self.first_scheduled if self.first_scheduled is not None else end
        first = self.timeline.first
        queue_s = started - self.arrival
        prefill_s = (self.arrival + first if first is not None else end) - started
        e2e_s = end - self.arrival
        stages = {"queue": queue_s, "prefill": prefill_s, "decode": e2e_s - queue_s - prefill_s}
        report = RequestReport(
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached,
            output_tokens=self.num_output,
            queue_s=queue_s,
            prefill_s=prefill_s,
            decode_s=stages["decode"],
            e2e_s=e2e_s,
            ttft_s=first,
            max_tbt_s=self.timeline.max_tbt,
            preempted_s=self.preempted_s,
            preemptions=self.preemptions,
            rotations=self.rotations,
        )
        if self.slo is None or not self.slo.promises_anything:
            return report
        return _with_verdict(report, self.timeline, e2e_s, stages | {"preempted": self.preempted_s})


def _with_verdict(
    report: RequestReport, timeline: TokenTimeline, e2e_s: float, stages: dict[str, float]
) -> RequestReport:
    verdict = timeline.verdict(e2e_s)
    return msgspec.structs.replace(
        report,
        met=verdict.met,
        ttft_met=verdict.ttft_met,
        tbt_met=verdict.tbt_met,
        deadline_met=verdict.deadline_met,
        lateness_s=verdict.lateness,
        why="" if verdict.met else max(stages, key=lambda stage: stages[stage]),
    )


class SequenceUpdate(NamedTuple):
    """What is new about a sequence: tokens (or scores) of a step, or its end."""

    sequence: Sequence
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
