"""An engine without a program: prompts in, texts out, as SGLang's `Engine` takes and gives them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from types import NoneType
from typing import Any

import msgspec

from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.lang.backend import Runtime
from superinfer.lang.loop import language_loop
from superinfer.lang.sampling import Sampling
from superinfer.lang.typed import json_grammar, regex_grammar
from superinfer.runtime.protocol import TokenLogprob
from superinfer.runtime.slo import SLO
from superinfer.runtime.text import TextRequest, TextResult

_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_TAKEN = (
    "max_new_tokens", "min_new_tokens", "n", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "ignore_eos",
)  # fmt: skip

_MORE = ("regex", "json_schema", "repetition_penalty")  # which `gen` does not have, or has as expressions
# What SGLang's users write although it says nothing: any other value is refused.
_NOTHING = {"skip_special_tokens": True, "spaces_between_special_tokens": True, "no_stop_trim": False}

Prompt = str | Sequence[int]


class Engine(Runtime):
    """An engine process of our own, which also answers plain prompts. As a backend it is a Runtime.

    `with Engine(model_path="embedded") as engine: engine.generate("Hello", {"max_new_tokens": 8})["text"]`
    """

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprob: bool = False,
        top_logprobs_num: int = 0,
        stream: bool = False,
        slo: SLO | None = None,
    ) -> Any:
        """A dict with `text`, `output_ids` and `meta_info` for a prompt, a list of them for a list of prompts or n > 1.

        sampling_params: SGLang's names (max_new_tokens, stop, temperature, regex, json_schema, ...); one for all
        or one for each prompt.
        stream: an iterator of such dicts instead, each with all text so far; for one prompt and n = 1.
        Raises InvalidRequestError and UnsupportedError by name before anything is sent.
        """
        requests = _requests(prompt, input_ids, sampling_params, return_logprob, top_logprobs_num, slo)
        many = not _is_one(prompt, input_ids)
        if stream:
            return language_loop().iterate(self._stream(_only(requests, many)))
        return _shaped(language_loop().run(self._complete(requests)), many)

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprob: bool = False,
        top_logprobs_num: int = 0,
        stream: bool = False,
        slo: SLO | None = None,
    ) -> Any:
        """Async twin of `generate`; with stream=True it gives an async iterator."""
        requests = _requests(prompt, input_ids, sampling_params, return_logprob, top_logprobs_num, slo)
        many = not _is_one(prompt, input_ids)
        if stream:
            return language_loop().aiterate(self._stream(_only(requests, many)))
        return _shaped(await language_loop().arun(self._complete(requests)), many)

    async def _complete(self, requests: list[TextRequest]) -> list[list[dict[str, Any]]]:
        done = await asyncio.gather(*[self._one(request) for request in requests])
        return [[_told(result, self) for result in results] for results in done]

    async def _one(self, request: TextRequest) -> list[TextResult]:
        results = [TextResult(index) for index in range(request.sampling.n)]
        async with contextlib.aclosing(self.stream(request)) as deltas:
            async for delta in deltas:
                results[delta.index].add(delta)
        return results

    async def _stream(self, request: TextRequest) -> AsyncIterator[dict[str, Any]]:
        result = TextResult(0)
        async with contextlib.aclosing(self.stream(request)) as deltas:
            async for delta in deltas:
                result.add(delta)
                yield _told(result, self)


def _is_one(prompt: object, input_ids: object) -> bool:
    if prompt is not None:
        return isinstance(prompt, str)
    return isinstance(input_ids, Sequence) and all(isinstance(i, int) for i in input_ids)


def _only(requests: list[TextRequest], many: bool) -> TextRequest:
    if many or requests[0].sampling.n != 1:
        raise UnsupportedError("stream=True takes one prompt and n=1; call once for each")
    return requests[0]


def _requests(
    prompt: Any, input_ids: Any, params: Any, return_logprob: bool, top: int, slo: SLO | None
) -> list[TextRequest]:
    if (prompt is None) == (input_ids is None):
        raise InvalidRequestError("give either prompt or input_ids")
    given: Any = input_ids if prompt is None else prompt
    if not isinstance(given, Sequence):
        raise InvalidRequestError(f"prompt={given!r:.80} must be a text or a list of texts; input_ids, of integers")
    if not isinstance(params, (Mapping, Sequence, NoneType)) or isinstance(params, str):
        raise InvalidRequestError(f"sampling_params={params!r:.80} must be a dict, or a list of one for each prompt")
    prompts: list[Prompt] = [given] if _is_one(prompt, input_ids) else list(given)
    each = [params or {}] * len(prompts) if params is None or isinstance(params, Mapping) else list(params)
    if len(each) != len(prompts):
        raise InvalidRequestError(f"sampling_params has {len(each)} entries for {len(prompts)} prompts")
    requests = []
    for one, wanted in zip(prompts, each, strict=True):
        wanted = {name: value for name, value in wanted.items() if name not in _NOTHING or value != _NOTHING[name]}
        for name in wanted:
            if name not in (*_TAKEN, *_MORE):
                raise UnsupportedError(f"sampling_params: {name}={wanted[name]!r:.80} is not supported; leave it out")
        named = {_NAMES.get(name, name): value for name, value in wanted.items() if name in _TAKEN}
        sampling = Sampling(**named, return_logprob=return_logprob or None, top_logprobs_num=top or None)
        params_of_one = msgspec.structs.replace(sampling.params(), **_more(wanted))
        requests.append(TextRequest(prompt=one, sampling=params_of_one, stop=sampling.stop_strings, slo=slo))
    return requests


def _more(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams that no `gen` has. Raises InvalidRequestError, UnsupportedError."""
    regex, schema = wanted.get("regex"), wanted.get("json_schema")
    if regex is not None and schema is not None:
        raise InvalidRequestError("regex and json_schema both say what the output looks like; give one")
    more: dict[str, Any] = {}
    if wanted.get("repetition_penalty") is not None:
        more["repetition_penalty"] = wanted["repetition_penalty"]
    if regex is not None or schema is not None:
        more["grammar"] = regex_grammar(regex) if regex is not None else json_grammar(schema)
    return more


def _shaped(done: list[list[dict[str, Any]]], many: bool) -> Any:
    flat = [told for results in done for told in results]
    return flat if many or len(flat) > 1 else flat[0]


def _told(result: TextResult, engine: Engine) -> dict[str, Any]:
    report = result.report
    meta: dict[str, Any] = {
        "finish_reason": result.finish_reason and {"type": result.finish_reason, "matched": result.stop},
        "completion_tokens": len(result.token_ids),
        "prompt_tokens": report.prompt_tokens if report else None,
        "cached_tokens": report.cached_tokens if report else None,
        "e2e_latency": report.e2e_s if report else None,
        "report": report,
    }
    if result.logprobs is not None:
        meta["output_token_logprobs"] = [(item.logprob, item.token_id, None) for item in result.logprobs]
        meta["output_top_logprobs"] = [_top(item) for item in result.logprobs]
    return {"text": result.text, "output_ids": list(result.token_ids), "meta_info": meta}


def _top(item: TokenLogprob) -> list[tuple[float, int, None]]:
    return [(logprob, token_id, None) for token_id, logprob in item.top]
