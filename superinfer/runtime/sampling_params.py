"""How the tokens of a request are chosen: what a Generate message says of it, checked where it is made."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from superinfer.errors import InvalidRequestError

MAX_ALLOWED = 16_384
MAX_BAD_WORDS, MAX_BAD_WORD = 512, 32  # sequences; tokens of one


class Grammar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the output must look like.

    kind: "json_schema" (source: a JSON schema as JSON text), "json_object" (any JSON object; no source), "regex",
        "ebnf" (a grammar as xgrammar reads it), or "structural_tag" (a format of xgrammar's structural tags as JSON
        text; which are taken: `engine/structural_tag.py`).
    """

    kind: Literal["json_schema", "json_object", "regex", "ebnf", "structural_tag"]
    source: str = ""

    def __post_init__(self) -> None:
        if (self.kind == "json_object") != (not self.source):
            wanted = "takes no source" if self.kind == "json_object" else "needs a source"
            raise InvalidRequestError(f"grammar of kind {self.kind!r} {wanted}; it is {self.source!r:.80}")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the next token is chosen, and when to stop. Token ids only: stop *strings* live with the client.

    max_tokens: at most this many new tokens, >= 1. None: up to the model's context length.
    min_tokens: stop ids and eos cannot be chosen before this many tokens.
    n: independent continuations of the prompt, 1..128.
    temperature: 0 is greedy. top_p in (0, 1]; top_k 0 is off; min_p in [0, 1].
    frequency_penalty, presence_penalty: [-2, 2], over generated tokens, as OpenAI defines them.
    repetition_penalty: > 0, over prompt and generated tokens, as transformers defines it; 1 is off.
    seed: the same seed gives the same tokens, whatever else is in the batch.
    stop_token_ids: end with finish_reason "stop" once one is generated; the id is included in the output.
    ignore_eos: do not end at the model's eos ids.
    logprobs: None for none; k >= 0 returns the chosen token's logprob and the k most likely (at most 20).
    logit_bias: (token id, bias) pairs, each bias in [-100, 100], added to the logits before anything else.
    allowed_token_ids: the only ids that may be chosen, 1 to 16,384 of them; None: all.
    bad_words: sequences of token ids, at most 512 of at most 32 ids, that do not occur in the output: the last id of
        one cannot be chosen behind the others.
    grammar: constrains the output; None: free. It alone says what may come: neither of the two before goes with it.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 1, None, optional=True)
        check_int("min_tokens", self.min_tokens, 0, None)
        check_int("n", self.n, 1, 128)
        check_int("top_k", self.top_k, 0, None)
        check_int("seed", self.seed, -(2**63), 2**64 - 1, optional=True)
        check_int("logprobs", self.logprobs, 0, 20, optional=True)
        check_float("temperature", self.temperature, 0.0, 100.0)
        check_float("top_p", self.top_p, 0.0, 1.0, above=True)
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        for token_id, bias in self.logit_bias:
            check_int("logit_bias token id", token_id, 0, None)
            check_float(f"logit_bias of token {token_id}", bias, -100.0, 100.0)
        self._check_barred()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens={self.min_tokens} is greater than max_tokens={self.max_tokens}; lower min_tokens"
            )

    def _check_barred(self) -> None:
        """What may not be chosen, and that something is left."""
        allowed, bad = self.allowed_token_ids, self.bad_words
        if allowed is not None and not 1 <= len(allowed) <= MAX_ALLOWED:
            raise InvalidRequestError(f"allowed_token_ids holds {len(allowed)} ids; give 1 to {MAX_ALLOWED}")
        if len(bad) > MAX_BAD_WORDS:
            raise InvalidRequestError(f"bad_words holds {len(bad)} sequences of tokens; give at most {MAX_BAD_WORDS}")
        for word in bad:
            if not 1 <= len(word) <= MAX_BAD_WORD:
                raise InvalidRequestError(f"bad_words has one of {len(word)} tokens; each may have 1 to {MAX_BAD_WORD}")
        for name, ids in (("allowed_token_ids", allowed or ()), ("bad_words", [i for word in bad for i in word])):
            for token_id in ids:
                check_int(f"{name}: token id", token_id, 0, None)
        given = [name for name, one in (("allowed_token_ids", allowed), ("bad_words", bad)) if one]
        if given and self.grammar is not None:
            raise InvalidRequestError(
                f"{given[0]} contradicts a grammar, which alone says which tokens may come; leave one of them out"
            )
        if len(given) == 2:
            raise InvalidRequestError(
                "bad_words beside allowed_token_ids could leave no token to choose; leave the tokens that are not "
                "wanted out of allowed_token_ids"
            )


def check_int(name: str, value: object, low: int, high: int | None, optional: bool = False) -> None:
    """Raises InvalidRequestError for what is no integer in [low, high]; None is one where it is `optional`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name}={value!r} is not an integer")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequestError(f"{name}={value} must be {bound}")


def check_float(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    """Raises InvalidRequestError for what is no number in [low, high], or with `above` in (low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequestError(f"{name}={value!r} is not a number")
    if not math.isfinite(value) or value > high or value < low or (above and value == low):
        raise InvalidRequestError(
            f"{name}={value!r} must be {'above' if above else 'at least'} {low} and at most {high}"
        )
