"""The life of one sequence, as plain state. Pure Python; no torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING

import msgspec

from superinfer.runtime.kv.cache import BlockTable
from superinfer.runtime.protocol import FinishReason, Hints, RequestReport, SamplingParams, TokenLogprob
from superinfer.runtime.scheduler import stages
from superinfer.runtime.scheduler.stages import StageClock
from superinfer.runtime.slo import SLO, TokenTimeline, why_late

if TYPE_CHECKING:
    from superinfer.runtime.scheduler.cohort import Cohort

MAX_STOP_IDS = 8  # of a sequence in a cohort


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One continuation of one request (or one prompt to score). Times are seconds on the engine's monotonic clock.

    tokens: prompt and generated ids. num_prompt: how many of them are the prompt. stages: where its time goes.
    scheduled: positions whose KV some planned step computes; committed: of those of its prefill, steps that are done.
    in_flight: tokens that planned steps will sample and that are not known yet. untold: planned decodes whose tokens
    tell nothing new, for a grammar has forced them meanwhile.
    last_position: where the last token may be: nothing is computed there. -1 where nothing is generated.
    resume_at: tokens to prefill when it last took a slot; from there on it decodes.
    let_in: when it last took a slot, and let_in_with how many tokens generated, at which position.
    rotations: times its KV went to the second tier; its table is then kept, parked, while it waits.
    slo_class: under which its promise is counted. hints: what its caller knows of it.
    is_degraded: it was taken without its promise, which could not be kept.
    row, kept: a policy's own: its row in a table, and whether its promise is to be kept.
    score_start: score the prompt from this position on instead of generating; None: generate.
    may_join: nothing that was asked for keeps it out of a cohort. cohort: which it is in; `tokens`, `timeline`,
    `scheduled` and `in_flight` then follow that, and what lies under `own_*` lags behind.
    """

    __slots__ = (
        "arrival",
        "cached",
        "cohort",
        "committed",
        "finish_reason",
        "finished_at",
        "first_scheduled",
        "hints",
        "id",
        "index",
        "is_degraded",
        "kept",
        "last_position",
        "let_in",
        "let_in_at",
        "let_in_with",
        "max_tokens",
        "may_join",
        "num_prompt",
        "own_in_flight",
        "own_scheduled",
        "own_timeline",
        "own_tokens",
        "owner",
        "preempted_at",
        "preemptions",
        "program",
        "request_id",
        "resume_at",
        "rotations",
        "row",
        "salt",
        "sampling",
        "score_start",
        "seed",
        "slo",
        "slo_class",
        "slot",
        "stages",
        "status",
        "stop_ids",
        "table",
        "untold",
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
        request_id: str = "",
        index: int = 0,
        owner: bytes = b"",
        salt: str = "",
        program: str = "",
        seed: int = 0,
        stop_ids: tuple[int, ...] = (),
        score_start: int | None = None,
        slo_class: str = "",
        hints: Hints | None = None,
    ) -> None:
        self.id = id
        self.request_id, self.index, self.owner = request_id, index, owner
        self.own_tokens = array("i", prompt)
        self.num_prompt = len(prompt)
        self.last_position = self.num_prompt + max_tokens - 1 if score_start is None else -1
        self.sampling = sampling or SamplingParams()
        self.slo, self.salt, self.program = slo, salt, program
        self.slo_class, self.hints = slo_class, hints
        self.max_tokens, self.seed, self.stop_ids, self.score_start = max_tokens, seed, stop_ids, score_start
        self.arrival = arrival
        self.own_timeline = TokenTimeline(slo)
        self.stages = StageClock(arrival)
        self.status = Status.WAITING
        self.slot = -1
        self.table: BlockTable | None = None
        self.cohort: Cohort | None = None
        self.own_scheduled = self.own_in_flight = 0
        self.committed = self.untold = self.resume_at = 0
        self.cached = 0
        self.first_scheduled: float | None = None
        self.finished_at: float | None = None
        self.finish_reason: FinishReason | None = None
        self.preempted_at: float | None = None
        self.preemptions = self.rotations = 0
        self.let_in, self.let_in_with, self.let_in_at = arrival, 0, 0
        self.row, self.kept, self.is_degraded = -1, False, False
        self.may_join = (
            score_start is None
            and self.sampling.logprobs is None
            and self.sampling.grammar is None
            and len(stop_ids) <= MAX_STOP_IDS
        )

    @property
    def tokens(self) -> array[int]:
        if self.cohort is not None:
            self.cohort.tell(self)
        return self.own_tokens

    @property
    def timeline(self) -> TokenTimeline:
        if self.cohort is not None:
            self.cohort.tell_timelines()
        return self.own_timeline

    @property
    def scheduled(self) -> int:
        return self.own_scheduled if self.cohort is None else self.own_scheduled + self.cohort.planned

    @scheduled.setter
    def scheduled(self, position: int) -> None:
        assert self.cohort is None, "in a cohort, positions are planned for all"
        self.own_scheduled = position

    @property
    def in_flight(self) -> int:
        return self.own_in_flight if self.cohort is None else self.cohort.in_flight(self)

    @in_flight.setter
    def in_flight(self, tokens: int) -> None:
        self.own_in_flight += tokens - self.in_flight  # of steps before it joined a cohort

    @property
    def is_late(self) -> bool:
        """Whether a token came after it was due, as its timeline says."""
        return self.own_timeline.is_late or (self.cohort is not None and self.cohort.is_late(self))

    @property
    def length(self) -> int:
        """Tokens known and in flight, the prompt's included."""
        if self.cohort is not None:  # the next position reads the last token in flight
            return self.own_scheduled + self.cohort.planned + 1
        return len(self.own_tokens) + self.own_in_flight

    @property
    def num_output(self) -> int:
        """Tokens generated and known."""
        if self.cohort is not None:
            return self.length - self.in_flight - self.num_prompt
        return len(self.own_tokens) - self.num_prompt

    @property
    def compute_length(self) -> int:
        """Positions that can be computed by now: of tokens known and in flight. Scoring needs no last position."""
        return self.length if self.score_start is None else self.num_prompt - 1

    @property
    def is_prefilling(self) -> bool:
        """Whether its next work is a chunk of known tokens rather than one decode."""
        return self.scheduled < self.resume_at

    @property
    def is_under_way(self) -> bool:
        """Whether planned work of it has no result yet that a new residency would have to know."""
        if self.in_flight > 0 or self.untold > 0:
            return True
        return self.table is not None and self.committed < min(self.scheduled, self.resume_at)

    @property
    def wants_more(self) -> bool:
        """False once planned steps sample its last possible token."""
        if self.score_start is not None:
            return self.scheduled < self.compute_length
        return self.scheduled < self.compute_length and self.num_output + self.in_flight < self.max_tokens

    def report(self, now: float) -> RequestReport:
        """How it went, as of `now`."""
        end = self.finished_at if self.finished_at is not None else now
        e2e_s = end - self.arrival
        spent = self.stages.seconds if self.finished_at is not None else self.stages.so_far(now)
        report = RequestReport(
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached,
            output_tokens=self.num_output,
            queue_s=spent.get(stages.QUEUE, 0.0),
            prefill_s=spent.get(stages.PREFILL, 0.0),
            decode_s=spent.get(stages.DECODE, 0.0),
            e2e_s=e2e_s,
            ttft_s=self.timeline.first,
            max_tbt_s=self.timeline.max_tbt,
            preempted_s=spent.get(stages.PREEMPTED, 0.0),
            preemptions=self.preemptions,
            rotations=self.rotations,
            rotated_s=spent.get(stages.ROTATED, 0.0),
            copy_wait_s=spent.get(stages.COPY_WAIT, 0.0),
        )
        if self.slo is None or not self.slo.promises_anything:
            return report
        verdict = self.timeline.verdict(e2e_s)
        before = self.stages.before if self.stages.before is not None else spent
        after = {stage: seconds - before.get(stage, 0.0) for stage, seconds in spent.items()}
        why = why_late(verdict, self.slo, self.num_output, before, after)
        return msgspec.structs.replace(
            report,
            met=verdict.met,
            ttft_met=verdict.ttft_met,
            tbt_met=verdict.tbt_met,
            deadline_met=verdict.deadline_met,
            lateness_s=verdict.lateness,
            why="overload" if why and self.is_degraded else why,
            degraded=self.is_degraded,
        )


class SequenceUpdate(msgspec.Struct, frozen=True, gc=False):  # made for every token: a tenth of a NamedTuple
    """What is new about a sequence: tokens (or scores) of a step, or its end."""

    sequence: Sequence
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None


class StepUpdates:
    """What a step's result brought. tokens: one for each of `sequences`, to which nothing else happened. others: the
    rest. Iterating makes a SequenceUpdate of each. not_finite: sequences that ended without a finish reason, as their
    logits were no numbers; of them there is no update."""

    __slots__ = ("not_finite", "others", "sequences", "tokens")

    def __init__(
        self, sequences: list[Sequence], tokens: list[int], others: list[SequenceUpdate], not_finite: list[Sequence]
    ) -> None:
        self.sequences, self.tokens, self.others, self.not_finite = sequences, tokens, others, not_finite

    def __iter__(self) -> Iterator[SequenceUpdate]:
        for sequence, token in zip(self.sequences, self.tokens, strict=True):
            yield SequenceUpdate(sequence, [token], None, None)
        yield from self.others
