"""Sampling arguments of `gen` and `run`: checked when given, merged when a call is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from types import NoneType
from typing import Any

import msgspec

from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.stopping import check_stop, stop_pattern

DEFAULT_MAX_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Arguments as a program gives them; None is "not said here". Raises InvalidRequestError, UnsupportedError.

    max_tokens: 128 where nobody says otherwise. top_k: -1 and 0 mean off.
    return_logprob: ask for each new token's log probability; top_logprobs_num: and for the likeliest at its place.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    ignore_eos: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None
    stop_regex: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.logprob_start_len not in (None, -1):
            raise UnsupportedError(
                f"logprob_start_len={self.logprob_start_len!r}: log probabilities of the prompt are not given out; "
                "leave it out, or use select() to compare texts"
            )
        for name, given in (("stop", self.stop), ("stop_regex", self.stop_regex)):
            if not isinstance(given, (str, Sequence, NoneType)):
                raise InvalidRequestError(f"{name}={given!r:.80} must be a text or a list of texts")
        ids = self.stop_token_ids
        if ids is not None and (isinstance(ids, str) or not isinstance(ids, Sequence) or not all(map(_is_id, ids))):
            raise InvalidRequestError(f"stop_token_ids={ids!r:.80} must be a list of token ids")
        check_stop(self.stop_strings)
        for pattern in self.stop_patterns:
            stop_pattern(pattern)
        self.given  # noqa: B018  (checks the values)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def stop_patterns(self) -> tuple[str, ...]:
        return (self.stop_regex,) if isinstance(self.stop_regex, str) else tuple(self.stop_regex or ())

    @cached_property
    def said(self) -> frozenset[str]:
        """Names of the arguments that are given."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def over(self, defaults: Sampling) -> Sampling:
        """These arguments, and `defaults` where nothing is said."""
        if defaults is NO_SAMPLING:
            return self
        try:
            return _merged(self, defaults)
        except TypeError:  # a list somewhere, which cannot be looked up
            return self._over(defaults)

    def _over(self, defaults: Sampling) -> Sampling:
        chosen = {}
        for field in fields(self):
            own = getattr(self, field.name)
            chosen[field.name] = own if own is not None else getattr(defaults, field.name)
        return Sampling(**chosen)

    def params(self) -> SamplingParams:
        """What goes to the engine."""
        return self.given if self.max_tokens is not None else self._by_default

    @cached_property
    def _by_default(self) -> SamplingParams:
        return msgspec.structs.replace(self.given, max_tokens=DEFAULT_MAX_TOKENS)

    @cached_property
    def given(self) -> SamplingParams:
        """The same, but unlimited where nobody says how many tokens."""
        given = {
            name: getattr(self, name)
            for name in ("min_tokens", "n", "temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty",
                         "ignore_eos")
            if getattr(self, name) is not None
        }  # fmt: skip
        if self.top_k is not None and self.top_k != -1:
            given["top_k"] = self.top_k
        if self.return_logprob or self.top_logprobs_num:
            given["logprobs"] = self.top_logprobs_num or 0
        return SamplingParams(
            max_tokens=self.max_tokens,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            **given,
        )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


NO_SAMPLING = Sampling()


@lru_cache(maxsize=1024, typed=True)
def sampling_of(**arguments: Any) -> Sampling:
    """`Sampling(**arguments)`, made and checked once for all runs that say the same. TypeError where one is a list."""
    return Sampling(**arguments)


@lru_cache(maxsize=1024)
def _merged(own: Sampling, defaults: Sampling) -> Sampling:
    return own._over(defaults)
