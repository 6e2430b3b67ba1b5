"""/v1/completions: prompts to token ids, deltas to chunks or one answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import msgspec

from superinfer.runtime.protocol import ModelInfo, SamplingParams, TokenLogprob
from superinfer.runtime.server.errors import bad_request
from superinfer.runtime.server.params import check_ids, sampling_of
from superinfer.runtime.server.report import SloReport, Tally, Usage
from superinfer.runtime.server.schema import CompletionRequest
from superinfer.runtime.text import TextDelta, TextResult
from superinfer.runtime.tokenization import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 1024

Unset = msgspec.UnsetType
UNSET = msgspec.UNSET


# ---------------------------------------------------------------------------- request


def sampling_of_completion(request: CompletionRequest, longest_prompt: int, info: ModelInfo) -> SamplingParams:
    """Raises InvalidRequestError. Where max_tokens was left out, the default shrinks to what fits the context."""
    room = max(1, info.max_model_len - longest_prompt)
    default = min(max(DEFAULT_MAX_TOKENS, request.min_tokens or 0), room)
    max_tokens = default if request.max_tokens is None else request.max_tokens
    return sampling_of(request, max_tokens=max_tokens, logprobs=request.logprobs)


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
            ids = tokenizer.encode(one)
        elif _are_ids(one):
            assert isinstance(one, list)
            ids = one
            check_ids(name, ids, info)
        else:
            raise bad_request(f"{name}={one!r:.80} is neither a string nor a list of token ids", param=name)
        if not ids:
            raise bad_request(f"{name}={one!r} is empty; give at least one token", param=name)
        prompts.append(ids)
    if not prompts:
        raise bad_request("prompt=[] is empty; give at least one prompt", param="prompt")
    return prompts


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


# ---------------------------------------------------------------------------- answer


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel to the generated tokens. text_offset: of each token in the choice's text, characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice, or the new part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class CompletionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer or a chunk: OpenAI gives both the same `object`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: str = "text_completion"
    usage: Usage | Unset | None = UNSET
    slo: SloReport | Unset = UNSET


class CompletionWriter:
    """Writes one answer: `chunks` as it streams, or `whole` at its end."""

    def __init__(
        self, request: CompletionRequest, tokenizer: Tokenizer, tally: Tally, *, choices: int, prompt_tokens: int = 0
    ) -> None:
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = request.model
        self._top = request.logprobs or 0
        self._tokenizer = tokenizer
        self._tally = tally
        options = request.stream_options
        self._usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)
        self._prompt_tokens, self._output_tokens = prompt_tokens, 0
        self._offsets = [0] * choices

    def chunks(self, delta: TextDelta) -> Iterator[bytes]:
        """The chunks for one delta; after the last, the closing ones."""
        logprobs = self._logprobs(delta.index, delta.logprobs)
        reason = None
        if delta.finish_reason is not None:
            reason = self._tally.finish(delta.index, delta.finish_reason, delta.report)
        elif not delta.text and logprobs is None and not self._continuous:
            return
        slo = self._tally.slo() if reason and self._tally.complete else UNSET
        choice = CompletionChoice(index=delta.index, text=delta.text, logprobs=logprobs, finish_reason=reason)
        yield self._encode([choice], self._so_far(delta), slo)
        if reason and self._tally.complete and self._usage:
            yield self._encode([], self._tally.usage(), slo)

    def _so_far(self, delta: TextDelta) -> Usage | Unset | None:
        """What a chunk with a choice says of usage."""
        self._output_tokens += len(delta.token_ids)
        if self._continuous:
            total = self._prompt_tokens + self._output_tokens
            return Usage(self._prompt_tokens, self._output_tokens, total)
        return None if self._usage else UNSET

    def whole(self, results: list[TextResult]) -> bytes:
        """The answer of an unstreamed request."""
        choices = []
        for result in results:
            assert result.finish_reason is not None
            choices.append(
                CompletionChoice(
                    index=result.index,
                    text=result.text,
                    logprobs=self._logprobs(result.index, result.logprobs),
                    finish_reason=self._tally.finish(result.index, result.finish_reason, result.report),
                )
            )
        return self._encode(choices, self._tally.usage(), self._tally.slo())

    def _logprobs(self, index: int, logprobs: list[TokenLogprob] | None) -> CompletionLogprobs | None:
        if logprobs is None:
            return None
        tokens = [self._token(t.token_id) for t in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        top = [{self._token(token_id): logprob for token_id, logprob in t.top} for t in logprobs]
        return CompletionLogprobs(tokens, [t.logprob for t in logprobs], top if self._top else None, offsets)

    def _token(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special=False)

    def _encode(self, choices: list[CompletionChoice], usage: Usage | Unset | None, slo: SloReport | Unset) -> bytes:
        return msgspec.json.encode(
            CompletionAnswer(
                id=self._id, created=self._created, model=self._model, choices=choices, usage=usage, slo=slo
            )
        )
