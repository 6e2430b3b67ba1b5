"""What an answer says of itself: usage, the SLO report, finish reasons. Milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from superinfer.errors import RequestCancelledError
from superinfer.runtime.protocol import FinishReason, RequestReport
from superinfer.runtime.server.promises import Promise
from superinfer.runtime.server.schema import CountedStreamOptions
from superinfer.runtime.tokenization import Tokenizer

Observe = Callable[[RequestReport, FinishReason, Promise], None]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """cached_tokens: tokens of the prompt whose KV was already there."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """reasoning_tokens: those of the reasoning's text, markers left out."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Token counts; a prompt counts once however many choices it has. Details are known at the end."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | msgspec.UnsetType = msgspec.UNSET
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET


class StreamedUsage:
    """What the chunks of one stream say of usage, as its `stream_options` ask.

    at_end: one more chunk, without choices, holds all of it. in_each: every chunk holds what it is so far.
    """

    def __init__(self, options: CountedStreamOptions | None, prompt_tokens: int) -> None:
        self.at_end = bool(options and options.include_usage)
        self.in_each = bool(options and options.continuous_usage_stats)
        self.prompt_tokens, self._output_tokens = prompt_tokens, 0

    def count(self, output_tokens: int) -> None:
        """So many more have come."""
        self._output_tokens += output_tokens

    def so_far(self) -> Usage | msgspec.UnsetType | None:
        """For a chunk with a choice: null, as OpenAI has it, where the usage comes at the end only."""
        if self.in_each:
            return Usage(self.prompt_tokens, self._output_tokens, self.prompt_tokens + self._output_tokens)
        return None if self.at_end else msgspec.UNSET


class SloReport(msgspec.Struct, frozen=True):
    """What became of the SLO, as the engine saw it; times since the request reached it.

    Of several choices: `met` says whether all met it, the rest is of the one that was latest.
    truncated: the deadline passed and `on_miss="truncate"` ended the answer there.
    queue_ms .. preempted_ms: a stage each, see RequestReport; they sum to e2e_ms. lateness_ms: the worst lag behind
    the promise, negative where it was kept. why: the stage that cost most, where it was missed; "overload" where it was
    degraded: taken without the promise, which could not be kept when it came. Of several choices, whether one was.
    ttft_met, tbt_met, deadline_met: null where that was not promised. slo_class: the operator's class it counts under.
    """

    met: bool | None
    ttft_ms: float | None
    e2e_ms: float
    max_tbt_ms: float
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    rotated_ms: float
    copy_wait_ms: float
    preempted_ms: float
    lateness_ms: float | None
    truncated: bool
    why: str
    ttft_met: bool | None = None
    tbt_met: bool | None = None
    deadline_met: bool | None = None
    slo_class: str = ""
    degraded: bool = False


class Tally:
    """Collects the reports of all choices of one answer."""

    def __init__(
        self, choices: int, per_prompt: int, promise: Promise | None = None, observe: Observe | None = None
    ) -> None:
        """`choices` in all, `per_prompt` of them for each prompt. `observe` is told of each that finishes."""
        self._choices = choices
        self._per_prompt = per_prompt
        self.promise = promise or Promise()
        self._observe = observe
        self._reports: dict[int, RequestReport] = {}
        self._truncated = False
        self._reasoning: int | None = None

    def finish(self, index: int, reason: FinishReason, report: RequestReport | None) -> str:
        """Record a finished choice; returns OpenAI's name of the reason. A passed deadline is "length", as it too cut
        the answer short; the SLO report tells them apart."""
        if reason == "cancelled":
            raise RequestCancelledError("the request was cancelled before it finished; send it again")
        if report is not None:
            self._reports[index] = report
            if self._observe is not None:
                self._observe(report, reason, self.promise)
        self._truncated |= reason == "deadline"
        return "stop" if reason == "stop" else "length"

    def reasoned(self, thought: list[str] | None, tokenizer: Tokenizer) -> None:
        """Count the tokens of one choice's reasoning; None where the model does not mark any."""
        if thought is not None:
            self._reasoning = (self._reasoning or 0) + len(tokenizer.encode("".join(thought), special=False))

    @property
    def complete(self) -> bool:
        """Whether all choices have finished."""
        return len(self._reports) == self._choices

    def usage(self) -> Usage:
        """Counts over all choices."""
        prompts = [report for index, report in self._reports.items() if index % self._per_prompt == 0]
        prompt_tokens = sum(report.prompt_tokens for report in prompts)
        output_tokens = sum(report.output_tokens for report in self._reports.values())
        return Usage(
            prompt_tokens,
            output_tokens,
            prompt_tokens + output_tokens,
            PromptTokensDetails(sum(report.cached_tokens for report in prompts)),
            msgspec.UNSET if self._reasoning is None else CompletionTokensDetails(self._reasoning),
        )

    def slo(self) -> SloReport | msgspec.UnsetType:
        """Unset where no SLO was given."""
        slo = self.promise.slo
        if slo is None or not self._reports:
            return msgspec.UNSET
        reports = list(self._reports.values())
        worst = max(reports, key=lambda r: (r.met is False, r.lateness_s if r.lateness_s is not None else r.e2e_s))
        return SloReport(
            met=worst.met,
            ttft_ms=None if worst.ttft_s is None else _ms(worst.ttft_s),
            e2e_ms=_ms(worst.e2e_s),
            max_tbt_ms=_ms(worst.max_tbt_s),
            queue_ms=_ms(worst.queue_s),
            prefill_ms=_ms(worst.prefill_s),
            decode_ms=_ms(worst.decode_s),
            rotated_ms=_ms(worst.rotated_s),
            copy_wait_ms=_ms(worst.copy_wait_s),
            preempted_ms=_ms(worst.preempted_s),
            lateness_ms=None if worst.lateness_s is None else _ms(worst.lateness_s),
            truncated=self._truncated,
            why=worst.why,
            ttft_met=None if slo.ttft is None else worst.ttft_met,
            tbt_met=None if slo.tbt is None else worst.tbt_met,
            deadline_met=None if slo.deadline is None else worst.deadline_met,
            slo_class=self.promise.slo_class,
            degraded=any(report.degraded for report in reports),
        )

    @property
    def reports(self) -> list[RequestReport]:
        """Of the choices that have finished."""
        return list(self._reports.values())


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
