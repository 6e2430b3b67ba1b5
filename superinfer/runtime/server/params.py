"""From the fields of a request to what `TextClient` takes: sampling, stop strings, the SLO, lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

from superinfer.runtime.protocol import ModelInfo, SamplingParams
from superinfer.runtime.server.errors import bad_request
from superinfer.runtime.server.schema import Common, SloFields
from superinfer.runtime.slo import SLO

MAX_STOP = 16


def sampling_of(request: Common, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """Raises InvalidRequestError for a value out of its range."""
    given = {
        name: getattr(request, name)
        for name in [
            "min_tokens",
            "n",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "seed",
            "ignore_eos",
        ]
        if getattr(request, name) is not None
    }
    return SamplingParams(
        max_tokens=max_tokens, logprobs=logprobs, stop_token_ids=tuple(request.stop_token_ids or ()), **given
    )


def stop_of(request: Common) -> tuple[str, ...]:
    """The stop strings. Raises ApiError."""
    stop = request.stop
    strings = [stop] if isinstance(stop, str) else stop or []
    if len(strings) > MAX_STOP:
        raise bad_request(f"stop has {len(strings)} strings; give at most {MAX_STOP}", param="stop")
    if "" in strings:
        raise bad_request(
            "stop='' would end every answer at once; give strings of at least one character", param="stop"
        )
    return tuple(strings)


def slo_of(fields: SloFields | None) -> SLO | None:
    """Seconds from milliseconds. Raises ApiError for NaN, infinite, zero or negative values."""
    if fields is None:
        return None
    for name in ("ttft_ms", "tbt_ms", "deadline_ms", "weight"):
        value = getattr(fields, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            unit = "" if name == "weight" else " of milliseconds"
            raise bad_request(
                f"slo.{name}={value!r} must be a finite number{unit} greater than 0; leave it out to promise nothing",
                param=f"slo.{name}",
                code="invalid_slo",
            )
    return SLO(
        ttft=_seconds(fields.ttft_ms),
        tbt=_seconds(fields.tbt_ms),
        deadline=_seconds(fields.deadline_ms),
        weight=1.0 if fields.weight is None else fields.weight,
        on_miss=fields.on_miss or "finish",
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def check_ids(name: str, ids: Sequence[int], info: ModelInfo) -> None:
    """Token ids that a client gave must be in the model's vocabulary."""
    for at, token_id in enumerate(ids):
        if not 0 <= token_id < info.vocab_size:
            raise bad_request(
                f"{name}[{at}]={token_id} is not a token id of this model; use 0 to {info.vocab_size - 1}", param=name
            )


def check_length(name: str, prompt_tokens: int, sampling: SamplingParams, info: ModelInfo) -> None:
    """The prompt and what is to follow must fit the model's context."""
    limit = info.max_model_len
    wanted = max(1, sampling.min_tokens if sampling.max_tokens is None else sampling.max_tokens)
    if prompt_tokens + wanted <= limit:
        return
    what = f"{name} has {prompt_tokens} tokens"
    remedy = "shorten the prompt"
    if prompt_tokens < limit:
        what += f" and {wanted} more were asked for"
        remedy += f" or ask for at most {limit - prompt_tokens}"
    raise bad_request(
        f"{what}, but this model's context holds {limit} tokens of prompt and output together; {remedy}",
        param=name,
        code="context_length_exceeded",
    )
