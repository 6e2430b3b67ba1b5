"""/v1/completions: prompts to token ids, deltas to chunks or one answer."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec

from superinfer.runtime.protocol import ModelInfo, RequestReport, SamplingParams, TokenLogprob
from superinfer.runtime.server.errors import bad_request
from superinfer.runtime.server.params import check_ids, id_of, sampling_of, truncated
from superinfer.runtime.server.report import PromptTokensDetails, SloReport, StreamedUsage, Tally, Usage
from superinfer.runtime.server.schema import CompletionRequest
from superinfer.runtime.server.stream import error_event, event
from superinfer.runtime.server.structured import own_grammar
from superinfer.runtime.text import TextDelta, TextResult
from superinfer.runtime.tokenization import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 1024

Unset = msgspec.UnsetType
UNSET = msgspec.UNSET

_encode = msgspec.json.Encoder().encode


# ---------------------------------------------------------------------------- request


def sampling_of_completion(
    request: CompletionRequest, longest_prompt: int, tokenizer: Tokenizer, info: ModelInfo
) -> SamplingParams:
    """Raises InvalidRequestError. Where max_tokens was left out, the default shrinks to what fits the context."""
    room = max(1, info.max_model_len - longest_prompt)
    default = min(_wanted(request), room)
    max_tokens = default if request.max_tokens is None else request.max_tokens
    if request.echo and request.stream and request.logprobs is not None:
        raise bad_request("stream=true with echo=true and logprobs is not supported; leave one out", param="echo")
    if max_tokens == 0 and request.echo:
        max_tokens = 1  # only the prompt is asked for: see `only_prompt`
    grammar = own_grammar(request)
    return sampling_of(request, tokenizer, max_tokens=max_tokens, logprobs=request.logprobs, grammar=grammar)


def _wanted(request: CompletionRequest) -> int:
    """How many tokens are asked for, where the context has room for them."""
    default = max(DEFAULT_MAX_TOKENS, request.min_tokens or 0)
    return max(1, default if request.max_tokens is None else request.max_tokens)


def only_prompt(request: CompletionRequest) -> bool:
    """Whether nothing is to be generated: max_tokens=0 with echo."""
    return bool(request.echo) and request.max_tokens == 0


def prompts_of(request: CompletionRequest, tokenizer: Tokenizer, info: ModelInfo) -> list[list[int]]:
    """Token ids of each prompt. Raises ApiError, InvalidRequestError."""
    prompt = request.prompt
    given: list[object] = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else list(prompt)
    if len(given) > MAX_PROMPTS:
        raise bad_request(f"prompt holds {len(given)} prompts; send at most {MAX_PROMPTS} at once", param="prompt")
    prompts = []
    for at, one in enumerate(given):
        name = "prompt" if len(given) == 1 else f"prompt[{at}]"
        if isinstance(one, str):
            ids = tokenizer.encode(one, special=request.add_special_tokens is not False)
        elif _are_ids(one):
            assert isinstance(one, list)
            ids = one
            check_ids(name, ids, info)
        else:
            raise bad_request(f"{name}={one!r:.80} is neither a string nor a list of token ids", param=name)
        if not ids:
            raise bad_request(f"{name}={one!r} is empty; give at least one token", param=name)
        prompts.append(truncated(ids, request, _wanted(request), info))
    if not prompts:
        raise bad_request("prompt=[] is empty; give at least one prompt", param="prompt")
    return prompts


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


# ---------------------------------------------------------------------------- answer


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel to the generated tokens, behind the prompt's with echo. text_offset: of each token in the choice's text,
    characters. top_logprobs: the most likely tokens, and the one that is there."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice, or the new part of it. prompt_token_ids: in a stream only with its first part."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | Unset = UNSET
    prompt_token_ids: list[int] | Unset = UNSET


class CompletionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer or a chunk: OpenAI gives both the same `object`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: str = "text_completion"
    service_tier: str | Unset = UNSET
    usage: Usage | Unset | None = UNSET
    slo: SloReport | Unset = UNSET


class CompletionWriter:
    """Writes one answer: `events` as it streams, or `whole` at its end."""

    event_end = event(b"[DONE]")
    failure = staticmethod(error_event)

    def __init__(
        self, request: CompletionRequest, tokenizer: Tokenizer, tally: Tally, prompts: list[list[int]], *, choices: int
    ) -> None:
        """`prompts`: token ids of each."""
        self._id = f"cmpl-{id_of(request)}"
        self._as_ids, self._with_stop = (
            bool(request.return_tokens_as_token_ids),
            bool(request.include_stop_str_in_output),
        )
        self._created = int(time.time())
        self._model = request.model
        self._top = request.logprobs or 0
        self._with_logprobs = request.logprobs is not None
        self._tokenizer = tokenizer
        self._tally = tally
        self._usage = StreamedUsage(request.stream_options, sum(map(len, prompts)))
        self._offsets = [0] * choices
        self._prompts = prompts if request.echo else []
        self._shown = prompts if request.return_token_ids else []
        self._per_prompt = choices // len(prompts)
        self._begun = [False] * choices
        self._frames = [self._frame(index) for index in range(choices)] if request.stream else []

    def events(self, delta: TextDelta) -> Iterator[bytes]:
        """The chunks for one delta; after the last, the closing ones."""
        index, text = delta.index, delta.text + self._stop(delta)
        self._usage.count(len(delta.token_ids))
        is_first = not self._begun[index]
        if is_first:
            self._begun[index], text = True, self._echoed(index) + text
        if delta.finish_reason is None and delta.logprobs is None and not self._usage.in_each and not self._shown:
            if text:
                before, after = self._frames[index]
                yield before + _encode(text) + after  # most of all chunks
            return
        logprobs = self._logprobs(index, delta.logprobs)
        reason = None
        if delta.finish_reason is not None:
            reason = self._tally.finish(index, delta.finish_reason, delta.report)
        slo = self._tally.slo() if reason and self._tally.complete else UNSET
        choice = CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            token_ids=delta.token_ids if self._shown else UNSET,
            prompt_token_ids=self._prompt_ids(index) if is_first else UNSET,
        )
        yield event(self._answer([choice], self._usage.so_far(), slo))
        if reason and self._tally.complete and self._usage.at_end:
            yield event(self._answer([], self._tally.usage(), slo))

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """A chunk of plain text around its text."""
        mark = "\x00"
        whole = event(self._answer([CompletionChoice(index=index, text=mark)], self._usage.so_far(), UNSET))
        before, after = whole.split(_encode(mark))
        return before, after

    def _stop(self, end: TextDelta | TextResult) -> str:
        """The stop string that ended a text, where it is wanted."""
        return end.stop or "" if self._with_stop else ""

    def _prompt_ids(self, index: int) -> list[int] | Unset:
        return self._shown[index // self._per_prompt] if self._shown else UNSET

    def _echoed(self, index: int) -> str:
        return self._tokenizer.decode(self._prompts[index // self._per_prompt]) if self._prompts else ""

    def whole(self, results: list[TextResult]) -> bytes:
        """The answer of an unstreamed request."""
        return self.whole_scored(results, [])

    def whole_scored(self, results: list[TextResult], scores: list[list[TokenLogprob]]) -> bytes:
        """The same; `scores`: of each prompt's tokens from the second on, where they were asked for."""
        choices = []
        for result in results:
            assert result.finish_reason is not None
            reason = self._tally.finish(result.index, result.finish_reason, result.report)
            choices.append(self._choice(result, reason, scores))
        return self._answer(choices, self._tally.usage(), self._tally.slo())

    def prompts_only(self, scores: list[tuple[list[TokenLogprob], RequestReport | None]]) -> bytes:
        """The answer where nothing was to be generated: the prompts, scored where that was asked for and there was
        something to score."""
        reports = {at: report for at, (_, report) in enumerate(scores) if report is not None}
        for at, report in reports.items():
            self._tally.finish(at * self._per_prompt, "scored", report)
        choices = [
            self._choice(TextResult(index), "length", [score for score, _ in scores])
            for index in range(len(self._offsets))
        ]
        cached = sum(report.cached_tokens for report in reports.values())
        return self._answer(choices, self._prompt_usage(cached), self._tally.slo())

    def prompts_streamed(self) -> bytes:
        """All events of the stream where nothing was to be generated: a chunk for each choice's prompt."""
        chunks = [
            event(self._answer([self._choice(TextResult(index), "length", [])], self._usage.so_far(), UNSET))
            for index in range(len(self._offsets))
        ]
        if self._usage.at_end:
            chunks.append(event(self._answer([], self._prompt_usage(), UNSET)))
        return b"".join(chunks) + self.event_end

    def _prompt_usage(self, cached: int = 0) -> Usage:
        tokens = self._usage.prompt_tokens
        return Usage(tokens, 0, tokens, PromptTokensDetails(cached))

    def _choice(self, result: TextResult, reason: str, scores: list[list[TokenLogprob]]) -> CompletionChoice:
        index = result.index
        logprobs = None
        if self._with_logprobs:
            prompt: CompletionLogprobs | None = None
            if self._prompts:
                ids = self._prompts[index // self._per_prompt]
                prompt = self._logprobs(index, [TokenLogprob(ids[0], 0.0), *scores[index // self._per_prompt]])
            logprobs = self._logprobs(index, result.logprobs)
            if prompt is not None:
                # nothing is before the first token, so that it has no probability
                logprobs = _joined(prompt, logprobs, first=None)
        return CompletionChoice(
            index=index,
            text=self._echoed(index) + result.text + self._stop(result),
            logprobs=logprobs,
            finish_reason=reason,
            token_ids=result.token_ids if self._shown else UNSET,
            prompt_token_ids=self._prompt_ids(index),
        )

    def _logprobs(self, index: int, logprobs: list[TokenLogprob] | None) -> CompletionLogprobs | None:
        if logprobs is None:
            return None
        tokens = [self._token(t.token_id) for t in logprobs]
        offsets = []
        for scored in logprobs:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._tokenizer.decode([scored.token_id], skip_special=False))
        top: list[dict[str, float] | None] | None = None
        if self._top:
            top = [
                {self._token(token_id): logprob for token_id, logprob in t.top} | {token: t.logprob}
                for token, t in zip(tokens, logprobs, strict=True)
            ]
        return CompletionLogprobs(tokens, [t.logprob for t in logprobs], top, offsets)

    def _token(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.piece(token_id)

    def _answer(self, choices: list[CompletionChoice], usage: Usage | Unset | None, slo: SloReport | Unset) -> bytes:
        return _encode(
            CompletionAnswer(
                id=self._id,
                created=self._created,
                model=self._model,
                choices=choices,
                service_tier=self._tally.promise.tier or UNSET,
                usage=usage,
                slo=slo,
            )
        )


def _joined(prompt: CompletionLogprobs, output: CompletionLogprobs | None, first: None) -> CompletionLogprobs:
    top = None if prompt.top_logprobs is None else [first, *prompt.top_logprobs[1:]]
    joined = CompletionLogprobs(prompt.tokens, [first, *prompt.token_logprobs[1:]], top, prompt.text_offset)
    if output is None:
        return joined
    return CompletionLogprobs(
        joined.tokens + output.tokens,
        joined.token_logprobs + output.token_logprobs,
        None if top is None else top + (output.top_logprobs or []),
        joined.text_offset + output.text_offset,
    )
