"""/v1/select: how likely each of some texts is behind a prompt. One request a question: the prompt goes over the wire
once, is tokenized once and computed once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response

from superinfer.runtime.choices import Bordered, ScoredChoices, Scorer, TokenScore, at_border, score_choices
from superinfer.runtime.protocol import Hints, RequestReport, SamplingParams
from superinfer.runtime.server.chat import rendered
from superinfer.runtime.server.errors import bad_request
from superinfer.runtime.server.params import check_length
from superinfer.runtime.server.report import SloReport, Tally, Usage
from superinfer.runtime.server.schema import ChatRequest, Message, SloFields
from superinfer.runtime.server.service import Service, aside, json_response
from superinfer.runtime.server.stream import while_connected
from superinfer.runtime.server.structured import tool_plan
from superinfer.runtime.text import TextClient

MAX_CHOICES = 512


class SelectRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of /v1/select: `choices` behind a `prompt`, or behind `messages` as a chat's next answer, or the rest of one
    that has begun (continue_final_message). alone: score each choice without the prompt too."""

    choices: list[str]
    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    continue_final_message: bool | None = None
    alone: bool | None = None
    slo: SloFields | None = None
    service_tier: str | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    hints: Hints | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class ScoredText(msgspec.Struct, frozen=True):
    """A token of a choice. logprob: null where nothing stands before it."""

    id: int
    text: str
    logprob: float | None


class ScoredChoice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """tokens: of the choice, from the token border that all choices share with the prompt. alone: without the prompt.
    mean_logprob: of `tokens`."""

    index: int
    text: str
    mean_logprob: float
    tokens: list[ScoredText]
    alone: list[ScoredText] | None = None


class SelectAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """choices: in the order of the request. reports: the engine's account of each text that was scored."""

    model: str
    created: int
    choices: list[ScoredChoice]
    usage: Usage
    reports: list[RequestReport]
    object: str = "select"
    slo: SloReport | msgspec.UnsetType = msgspec.UNSET


async def select(http: Request, service: Service) -> Response:
    """Score the choices of a request. Raises ApiError, InvalidRequestError."""
    request = service.parse(await http.body(), SelectRequest, {})
    _check_choices(request.choices)
    promise = service.promise(request, http)
    scorer = Scorer(service.text, promise.slo_class, request.cache_salt or "")
    choices = await aside(http, _bordered, request, scorer)
    program, hints = request.prompt_cache_key or "", request.hints or Hints()
    scored = await while_connected(
        http,
        score_choices(
            scorer, choices, alone=bool(request.alone), slo=promise.slo, program=program, keep_s=hints.keep_s
        ),
    )
    tally = service.tally(http, len(scored.reports), 1, promise)
    for at, report in enumerate(scored.reports):
        tally.finish(at, "stop", report)
    return json_response(msgspec.json.encode(_answer(request, scored, tally)))


def _check_choices(choices: list[str]) -> None:
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise bad_request(f"choices has {len(choices)} texts; give 1 to {MAX_CHOICES}", param="choices")
    if "" in choices:
        raise bad_request(f"choices[{choices.index('')}]='' is empty; it has no probability", param="choices")


def _bordered(request: SelectRequest, scorer: Scorer) -> Bordered:
    found = at_border(scorer, _prompt_of(request, scorer.text), request.choices, special=request.messages is None)
    for ids in found.tokens:
        check_length("prompt", len(ids), SamplingParams(max_tokens=1), scorer.text.info)
    return found


def _prompt_of(request: SelectRequest, text: TextClient) -> str:
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("give either a prompt or messages", param="prompt")
    if request.prompt is not None:
        return request.prompt
    chat = ChatRequest(
        model=request.model,
        messages=request.messages or [],
        tools=request.tools,
        continue_final_message=request.continue_final_message,
    )
    return rendered(chat, tool_plan(chat), text.tokenizer, constrained=False)


def _answer(request: SelectRequest, scored: ScoredChoices, tally: Tally) -> SelectAnswer:
    choices = []
    for at, (choice, tokens) in enumerate(zip(request.choices, scored.with_prompt, strict=True)):
        values = [logprob or 0.0 for logprob, _, _ in tokens]
        choices.append(
            ScoredChoice(
                index=at,
                text=choice,
                mean_logprob=sum(values) / len(values),
                tokens=_texts(tokens),
                alone=_texts(scored.alone[at]) if scored.alone is not None else None,
            )
        )
    return SelectAnswer(
        model=request.model,
        created=int(time.time()),
        choices=choices,
        usage=tally.usage(),
        reports=scored.reports,
        slo=tally.slo(),
    )


def _texts(tokens: Sequence[TokenScore]) -> list[ScoredText]:
    return [ScoredText(token_id, text or "", logprob) for logprob, token_id, text in tokens]
