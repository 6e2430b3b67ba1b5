"""From the fields of a request to what `TextClient` takes: sampling, stop strings, lengths."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from superinfer.runtime.protocol import Grammar, ModelInfo, SamplingParams
from superinfer.runtime.sampling_params import MAX_BAD_WORD, MAX_BAD_WORDS
from superinfer.runtime.server.errors import bad_request
from superinfer.runtime.server.schema import Common, Written
from superinfer.runtime.tokenization import Tokenizer

MAX_STOP = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_INTERVAL_MS = 10_000.0
MAX_REQUEST_ID = 128  # characters


def sampling_of(
    request: Common,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """Raises ApiError, InvalidRequestError for a value out of its range."""
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
    if request.top_k == -1:  # off, as vLLM has it
        given["top_k"] = 0
    return SamplingParams(
        max_tokens=max_tokens,
        logprobs=logprobs,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logit_bias=bias_of(request.logit_bias),
        allowed_token_ids=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
        bad_words=words_of(request.bad_words or (), tokenizer),
        grammar=grammar,
        **given,
    )


def stop_of(request: Common) -> tuple[str, ...]:
    """The stop strings. Raises ApiError."""
    stop = request.stop
    strings = [stop] if isinstance(stop, str) else stop or []
    if len(strings) > MAX_STOP:
        raise bad_request(f"stop has {len(strings)} strings; give at most {MAX_STOP}", param="stop")
    for at, string in enumerate(strings):
        if len(string) > MAX_STOP_LENGTH:
            raise bad_request(
                f"stop[{at}]={string!r:.80} has {len(string)} characters; give at most {MAX_STOP_LENGTH}", param="stop"
            )
    if "" in strings:
        raise bad_request(
            "stop='' would end every answer at once; give strings of at least one character", param="stop"
        )
    return tuple(strings)


def interval_of(request: Common) -> float:
    """Seconds between two pieces of a stream, 0 for each as it comes. Raises ApiError."""
    given = request.stream_options.interval_ms if request.stream_options is not None else None
    if given is None:
        return 0.0
    if not 0 <= given <= MAX_INTERVAL_MS:
        raise bad_request(
            f"stream_options.interval_ms={given!r} must be between 0 and {MAX_INTERVAL_MS:.0f}",
            param="stream_options.interval_ms",
        )
    return given / 1e3


def bias_of(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    """(token id, bias) pairs of OpenAI's map, whose keys are strings. Raises ApiError."""
    pairs = []
    for key, value in (bias or {}).items():
        if not key.isascii() or not key.isdigit():
            raise bad_request(f"logit_bias={key!r:.80} is not a token id; keys are ids in decimal", param="logit_bias")
        if not -100 <= value <= 100:
            raise bad_request(f"logit_bias={value!r} of token {key} must be between -100 and 100", param="logit_bias")
        pairs.append((int(key), float(value)))
    return tuple(pairs)


def words_of(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word as it may begin a text, and with a space before it: vLLM's, but for those that it leaves
    out because they have another length. Raises ApiError."""
    if len(words) > MAX_BAD_WORDS // 2:
        raise bad_request(f"bad_words has {len(words)} words; give at most {MAX_BAD_WORDS // 2}", param="bad_words")
    found: dict[tuple[int, ...], None] = {}
    for at, word in enumerate(words):
        plain = word.lstrip()
        if not plain:
            raise bad_request(f"bad_words[{at}]={word!r} has no letter; leave it out", param="bad_words")
        for written in (plain, " " + plain):
            ids = tuple(tokenizer.encode(written, special=False))
            if len(ids) > MAX_BAD_WORD:
                message = f"bad_words[{at}]={word!r:.80} is {len(ids)} tokens; each may have {MAX_BAD_WORD}"
                raise bad_request(message, param="bad_words")
            found[ids] = None
    return tuple(found)


def id_of(request: Written) -> str:
    """What the id of the answer ends with. Raises ApiError."""
    given = request.request_id
    if given is None:
        return uuid.uuid4().hex
    if not 1 <= len(given) <= MAX_REQUEST_ID:
        message = f"request_id={given!r:.80} has {len(given)} characters; give 1 to {MAX_REQUEST_ID}"
        raise bad_request(message, param="request_id")
    return given


def least_output(sampling: SamplingParams) -> int:
    """For how many tokens of output a context must have room."""
    return max(1, sampling.min_tokens if sampling.max_tokens is None else sampling.max_tokens)


def truncated(ids: list[int], request: Common, output: int, info: ModelInfo) -> list[int]:
    """The last of a prompt's tokens, or the first, as many as the request wants at most. output: tokens that are to
    follow. Raises ApiError."""
    most, limit = request.truncate_prompt_tokens, info.max_model_len
    if most is None:
        return ids
    if most != -1 and not 1 <= most <= limit:
        message = f"truncate_prompt_tokens={most} must be 1 to {limit}, or -1 for what the context has room for"
        raise bad_request(message, param="truncate_prompt_tokens")
    kept = max(1, limit - output) if most == -1 else most
    return ids[:kept] if request.truncation_side == "right" else ids[-kept:]


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
    wanted = least_output(sampling)
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
