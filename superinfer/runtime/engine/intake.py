"""From a client's Generate or Score to sequences: every check of a request's values against this engine's limits."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from superinfer.errors import InvalidRequestError
from superinfer.runtime.protocol import Generate, ModelInfo, SamplingParams, Score
from superinfer.runtime.scheduler.sequence import Sequence

_SEED_STRIDE = 0x9E3779B97F4A7C15  # spreads the seeds of a request's n continuations over 64 bits


@dataclass
class Intake:
    """Makes sequences of requests. `seed`: of the seeds given to requests that bring none."""

    info: ModelInfo
    seed: int = 0
    _ids: int = 0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def sequences(self, client: bytes, request: Generate | Score, now: float) -> list[Sequence]:
        """One sequence per continuation. Raises InvalidRequestError naming the value that is wrong."""
        self._check_prompt(request.prompt)
        if isinstance(request, Score):
            return [self._scored(client, request, now)]
        sampling = request.sampling
        self._check_constraints(sampling)
        room = self.info.max_model_len - len(request.prompt)
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise InvalidRequestError(
                f"prompt of {len(request.prompt)} tokens and max_tokens={sampling.max_tokens} exceed the context of "
                f"{self.info.max_model_len} tokens; shorten the prompt or ask for at most {room} tokens"
            )
        if sampling.min_tokens > room:
            raise InvalidRequestError(f"min_tokens={sampling.min_tokens} exceeds the {room} tokens left in the context")
        stop_ids = self._stop_ids(sampling)
        if sampling.min_tokens and set(sampling.allowed_token_ids or (-1,)) <= set(stop_ids):
            raise InvalidRequestError(
                f"allowed_token_ids={sampling.allowed_token_ids!r:.80} holds only tokens that end the output, which "
                f"min_tokens={sampling.min_tokens} forbids at first; lower min_tokens to 0 or allow others"
            )
        seed = sampling.seed if sampling.seed is not None else self._random.getrandbits(64)
        return [
            Sequence(
                id=self._next_id(),
                request_id=request.request_id,
                index=index,
                owner=client,
                prompt=request.prompt,
                sampling=sampling,
                slo=request.slo,
                salt=request.cache_salt,
                program=request.program,
                slo_class=request.slo_class,
                hints=request.hints,
                arrival=now,
                max_tokens=sampling.max_tokens or room,
                seed=(seed + index * _SEED_STRIDE) % 2**64,
                stop_ids=stop_ids,
            )
            for index in range(sampling.n)
        ]

    def _scored(self, client: bytes, request: Score, now: float) -> Sequence:
        if not 1 <= request.start < len(request.prompt):
            raise InvalidRequestError(
                f"start={request.start} must be between 1 and {len(request.prompt) - 1}: the first token has nothing "
                "before it to be judged by, and at least one token must follow"
            )
        if not 0 <= request.top <= 20:
            raise InvalidRequestError(f"top={request.top} must be between 0 and 20")
        return Sequence(
            id=self._next_id(),
            request_id=request.request_id,
            owner=client,
            prompt=request.prompt,
            slo=request.slo,
            salt=request.cache_salt,
            program=request.program,
            slo_class=request.slo_class,
            hints=request.hints,
            arrival=now,
            max_tokens=0,
            sampling=SamplingParams(logprobs=request.top) if request.top else None,
            score_start=request.start,
        )

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        if len(prompt) >= self.info.max_model_len:
            raise InvalidRequestError(
                f"prompt of {len(prompt)} tokens does not fit: this engine's context is {self.info.max_model_len} "
                "tokens, and at least one must be left to generate; shorten the prompt"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.info.vocab_size:
            raise InvalidRequestError(
                f"token id {low if low < 0 else high} is not in the vocabulary of {self.info.vocab_size} tokens"
            )

    def _check_constraints(self, sampling: SamplingParams) -> None:
        for name, ids in (
            ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
            ("allowed_token_ids", sampling.allowed_token_ids or ()),
            ("bad_words", [token_id for word in sampling.bad_words for token_id in word]),
        ):
            if ids and (token_id := max(ids)) >= self.info.vocab_size:
                raise InvalidRequestError(
                    f"{name} token id {token_id} is not in the vocabulary of {self.info.vocab_size} tokens"
                )
        if sampling.grammar is not None and (sampling.ignore_eos or sampling.min_tokens):
            name = f"min_tokens={sampling.min_tokens}" if sampling.min_tokens else "ignore_eos"
            raise InvalidRequestError(
                f"{name} contradicts a grammar, which alone says where output may end; leave it out"
            )

    def _stop_ids(self, sampling: SamplingParams) -> tuple[int, ...]:
        for token_id in sampling.stop_token_ids:
            if not 0 <= token_id < self.info.vocab_size:
                raise InvalidRequestError(
                    f"stop token id {token_id} is not in the vocabulary of {self.info.vocab_size} tokens"
                )
        eos = () if sampling.ignore_eos else self.info.eos_token_ids
        return tuple(dict.fromkeys((*eos, *sampling.stop_token_ids)))

    def _next_id(self) -> int:
        self._ids += 1
        return self._ids
