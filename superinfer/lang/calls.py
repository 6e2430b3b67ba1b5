"""One model call: what is asked of the backend for a `gen` or a `select`, and what its answer becomes."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from superinfer.errors import DeadlineMissedError, OutputError, UnsupportedError
from superinfer.lang.backend import Backend, CallRequest
from superinfer.lang.choices import TokenScore, mean
from superinfer.lang.in_time import in_time
from superinfer.lang.ir import Gen, Select
from superinfer.lang.prompt import Prompt
from superinfer.lang.reasoning import Reasoning
from superinfer.lang.report import CallWatch
from superinfer.lang.sampling import Sampling
from superinfer.lang.typed import Reader
from superinfer.lang.unknown import Unknown
from superinfer.runtime.protocol import Hints, SamplingParams, TokenLogprob
from superinfer.runtime.slo import SLO
from superinfer.runtime.text import TextDelta, TextResult

_NUMBERS = {"int": re.compile(r"\s*([-+]?\d+)"), "float": re.compile(r"\s*([-+]?(?:\d+\.\d*|\.?\d+)(?:[eE][-+]?\d+)?)")}
_MORE_NUMBER = {"int": re.compile(r"\d*\Z"), "float": re.compile(r"[\d.eE+-]*\Z")}

PIECE_S = 0.1  # between two pieces of a text that nobody reads yet as it is written

# Called with new text of the first continuation and what is known of the call so far.
Emit = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Answer:
    """What a call made: `value` goes to the variable, `rest` (what was not emitted yet) to the text, `reasoning` to a
    variable of its own. token_ids: of the only continuation, where the backend tells them."""

    value: Any
    rest: str
    meta: Any
    finish_reason: str | None
    reasoning: str | list[str] | None = None
    token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class Context:
    """Where a call is made, and for whom. prompt: NO_PROMPT where the call was begun without its text.
    enforced: the promise whose `on_miss` is ours to keep: `slo` is a plan.
    live: somebody reads the text as it is written."""

    backend: Backend
    prompt: Prompt
    slo: SLO | None
    program: str
    watch: CallWatch
    hints: Hints | None = None
    slo_class: str = ""
    enforced: SLO | None = None
    live: bool = True

    def waits_for_pieces(self, gen: Gen) -> bool:
        """Whether the answer's text is wanted piece by piece: somebody reads it, what is promised is counted by them,
        the call may be cut short here, or it has its value before the text ends."""
        slo = self.watch.slo
        promised = slo is not None and (slo.ttft is not None or slo.tbt is not None)
        cut = self.enforced is not None and self.enforced.on_miss == "truncate"
        return self.live or promised or cut or gen.number is not None


def spent(gen: Gen | Select, defaults: Sampling) -> Answer:
    """The answer of a call that was not sent, nothing of the program's time being left. defaults: of its run."""
    n = (gen.sampling.over(defaults).n or 1) if isinstance(gen, Gen) else 1
    nothing = None if isinstance(gen, Gen) and gen.reader is not None else ""
    results = [TextResult(index, finish_reason="deadline") for index in range(n)]
    return _answer(results, [nothing] * n, "", None)


def unknown(context: Context, expr: Gen | Select) -> Answer:
    """The answer of a call that is traced, not made."""
    value, n = Unknown(context.watch.call), (expr.sampling.n or 1) if isinstance(expr, Gen) else 1
    thought = Unknown(f"{expr.name}_reasoning_content") if isinstance(expr, Gen) and expr.reasoning else None
    return Answer(value if n == 1 else [value] * n, str(value), {}, None, thought)


def request_of(
    context: Context, gen: Gen, sampling: Sampling, prompt: str | Sequence[int] | None = None, after: str = ""
) -> CallRequest:
    """What goes to the backend. prompt: in place of the context's; behind the answer to request `after` where that is
    given. Raises UnsupportedError for a grammar that the backend does not honour."""
    live = context.waits_for_pieces(gen)
    return CallRequest(
        prompt=context.prompt.text if prompt is None else prompt,
        chat=context.prompt.chat,
        live=live,
        interval_s=0.0 if live else PIECE_S,
        after=after,
        sampling=_params(context.backend, gen, sampling),
        said=sampling.said,
        stop=sampling.stop_strings,
        stop_regex=sampling.stop_patterns,
        slo=context.slo,
        program=context.program,
        slo_class=context.slo_class,
        hints=context.hints,
        add_special=context.prompt.add_special,
    )


async def generate(
    context: Context, gen: Gen, sampling: Sampling, emit: Emit, stream: AsyncGenerator[TextDelta, None]
) -> Answer:
    """Read the answer to a request. Raises like TextClient.stream, and OutputError for a `dtype` that the text is not
    of."""
    n = sampling.n or 1
    results = [TextResult(index) for index in range(n)]
    emitted = ""
    stream = in_time(stream, context.enforced, n)
    async with contextlib.aclosing(stream) as deltas:
        async for delta in deltas:
            results[delta.index].add(delta)
            _watch(context.watch, delta)
            if gen.reasoning is not None:
                if delta.index == 0:
                    said = gen.reasoning.split(results[0].text, context.prompt.text, finished=False)[1]
                    emit(said[len(emitted) :], _meta(results[0], context.backend, sampling))
                    emitted = said
            elif gen.number is None:
                if delta.index == 0:
                    emit(delta.text, _meta(results[0], context.backend, sampling))
            elif all(_has_ended(gen.number, result) for result in results):
                break  # the rest would be thrown away: leaving cancels it
    for result in results:
        if result.finish_reason is None:  # cut short just now
            result.finish_reason = "stop"
            context.watch.finished(result.index, None)
    if gen.reader is not None:
        values = [_read(gen, gen.reader, result) for result in results]
        return _answer(results, values, "", context.backend, sampling)
    if gen.reasoning is not None:
        return _separated(gen.reasoning, context, results, sampling, len(emitted))
    texts = [result.text if gen.number is None else _number(gen, result) for result in results]
    return _answer(results, texts, texts[0] if gen.number is not None else "", context.backend, sampling)


def _params(backend: Backend, gen: Gen, sampling: Sampling) -> SamplingParams:
    """Raises UnsupportedError for a grammar that the backend does not honour.

    A number needs none: the text is cut after it, and OutputError raised where there is no number.
    """
    params = sampling.params()
    if gen.grammar is None or (gen.number is not None and not backend.takes_grammars):
        return params
    if not backend.takes_grammars:
        raise UnsupportedError(
            f"gen({gen.name!r}): {type(backend).__name__} cannot constrain what the model writes; leave regex, "
            "json_schema and dtype out, or run it on a superinfer engine"
        )
    return msgspec.structs.replace(params, grammar=gen.grammar)


def _read(gen: Gen, reader: Reader, result: TextResult) -> Any:
    """None where the program's time ended before the text did. Raises OutputError."""
    try:
        return reader(result.text)
    except ValueError as error:
        if result.finish_reason == "deadline":
            return None
        cut = " (cut off by max_tokens; raise it)" if result.finish_reason == "length" else ""
        raise OutputError(f"gen({gen.name!r}) got {result.text!r:.80}{cut}, which cannot be read: {error}") from error


def _separated(
    reasoning: Reasoning, context: Context, results: list[TextResult], sampling: Sampling, emitted: int
) -> Answer:
    """The answers, and the reasoning before them."""
    pairs = [reasoning.split(result.text, context.prompt.text, finished=True) for result in results]
    texts, thoughts = [answer for _, answer in pairs], [thought for thought, _ in pairs]
    answer = _answer(results, texts, texts[0][emitted:], context.backend, sampling)
    return replace(answer, reasoning=thoughts if len(thoughts) > 1 else thoughts[0])


def _watch(watch: CallWatch, delta: TextDelta) -> None:
    watch.tokens(delta.index, len(delta.token_ids) or bool(delta.text))  # a service names no tokens: a chunk has one
    if delta.finish_reason is not None:
        watch.finished(delta.index, delta.report)


def _has_ended(number: str, result: TextResult) -> bool:
    """Whether the text holds a number that cannot go on."""
    if result.finish_reason is not None:
        return True
    found = _NUMBERS[number].match(result.text)
    return found is not None and not _MORE_NUMBER[number].match(result.text, found.end())


def _number(gen: Gen, result: TextResult) -> str:
    assert gen.number is not None
    found = _NUMBERS[gen.number].match(result.text)
    if found is None:
        if result.finish_reason == "deadline":
            return ""
        raise OutputError(f"gen({gen.name!r}, dtype={gen.number}) got {result.text!r:.80}, which begins with none")
    return found.group(1)


def _answer(
    results: list[TextResult],
    texts: Sequence[Any],
    rest: str,
    backend: Backend | None,
    sampling: Sampling | None = None,
) -> Answer:
    metas = [_meta(result, backend, sampling or Sampling()) for result in results]
    reasons = {result.finish_reason for result in results}
    reason = "deadline" if "deadline" in reasons else results[0].finish_reason
    if len(results) == 1:
        return Answer(texts[0], rest, metas[0], reason, token_ids=results[0].token_ids)
    return Answer(list(texts), rest, metas, reason)


def _meta(result: TextResult, backend: Backend | None, sampling: Sampling) -> dict[str, Any]:
    report = result.report
    meta: dict[str, Any] = {
        "finish_reason": result.finish_reason,
        "stop": result.stop,
        "completion_tokens": len(result.token_ids) or (report.output_tokens if report else 0),
        "prompt_tokens": report.prompt_tokens if report else None,
        "cached_tokens": report.cached_tokens if report else None,
        "logprobs": result.logprobs,
        "report": report,
    }
    if result.logprobs is not None and backend is not None:
        text = backend.piece if sampling.return_text_in_logprobs else None
        meta["output_token_logprobs"] = _scores(result.logprobs, text)
        meta["output_top_logprobs"] = [
            [(logprob, token_id, text(token_id) if text else None) for token_id, logprob in item.top]
            for item in result.logprobs
        ]
    return meta


def _scores(items: Sequence[TokenLogprob], text: Callable[[int], str] | None) -> list[TokenScore]:
    return [(item.logprob, item.token_id, text(item.token_id) if text else None) for item in items]


async def choose(context: Context, select: Select) -> Answer:
    """Score all choices at once and decide. Raises like TextClient.score."""
    limit = context.enforced.deadline if context.enforced is not None else None
    try:
        async with asyncio.timeout(limit):
            scored = await context.backend.score_choices(
                context.prompt,
                select.choices,
                alone=select.method.requires_unconditional_logprobs,
                slo=context.slo,
                program=context.program,
                keep_s=context.hints.keep_s if context.hints is not None else None,
            )
    except TimeoutError:
        raise DeadlineMissedError(f"select({select.name!r}) missed its deadline of {limit} s") from None
    normalized = [mean([score[0] or 0.0 for score in scores]) for scores in scored.with_prompt]
    decision = select.method(
        choices=select.choices,
        normalized_prompt_logprobs=normalized,
        input_token_logprobs=scored.with_prompt,
        output_token_logprobs=[[] for _ in select.choices],
        unconditional_token_logprobs=scored.alone,
    )
    slowest = max(scored.reports, key=lambda report: report.e2e_s)
    context.watch.finished(0, slowest)
    meta = {
        "finish_reason": "scored",
        "prompt_tokens": max(report.prompt_tokens for report in scored.reports),
        "completion_tokens": 0,
        "cached_tokens": max(report.cached_tokens for report in scored.reports),
        "normalized_prompt_logprobs": normalized,
        "input_token_logprobs": scored.with_prompt,
        "unconditional_token_logprobs": scored.alone,
        "report": slowest,
        **decision.meta_info,
    }
    return Answer(decision.decision, decision.decision, meta, "scored")
