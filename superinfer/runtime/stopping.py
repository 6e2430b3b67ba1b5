"""Where a text that grows ends: stop strings and stop expressions, found as soon as they are certain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import regex

from superinfer.errors import InvalidRequestError

SEARCH_S = 1.0  # one search of one stop expression: some backtrack for ever


@lru_cache(maxsize=256)
def stop_pattern(source: str) -> regex.Pattern[str]:
    """Raises InvalidRequestError for what is no regular expression, or one that matches nothing at all."""
    if not isinstance(source, str) or not source:
        raise InvalidRequestError(f"stop_regex={source!r:.80} must be a text of at least one character")
    try:
        pattern = regex.compile(source)
    except regex.error as error:
        raise InvalidRequestError(f"stop_regex={source!r:.80} is not a regular expression: {error}") from None
    if pattern.search(""):
        raise InvalidRequestError(f"stop_regex={source!r:.80} matches the empty text, which would end every output")
    return pattern


class Stopper:
    """Finds the end of one text. Holds back what may become a stop.

    Of stop expressions, the first match to be complete ends the text, searched for after every character: how the text
    comes in pieces changes nothing. `$` therefore is met wherever the text stands.
    """

    def __init__(self, stop: Sequence[str], stop_regex: Sequence[str] = ()) -> None:
        self._stop = stop
        self._patterns = [stop_pattern(source) for source in stop_regex]
        self._text = ""  # all of it where there are expressions, which may look back; else what is held
        self._given = 0

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to find."""
        return bool(self._stop or self._patterns)

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain now, stop found). Push nothing more once one is found."""
        if not self._patterns:
            if not self._stop:  # most texts
                return text, None
            certain, self._text, found = split_at_stop(self._text + text, self._stop)
            return certain, found
        begin = self._given
        for character in text:
            self._text += character
            end, found = self._search()
            if found is not None:
                return self._text[begin:end], found
            self._given = end
        return self._text[begin : self._given], None

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        return self._text[self._given :]

    def _search(self) -> tuple[int, str | None]:
        """(where the certain text ends, stop found there)."""
        certain, _, found = split_at_stop(self._text[self._given :], self._stop)
        complete = [(self._given + len(certain), found)] if found is not None else []
        end = self._given + len(certain)
        for pattern in self._patterns:
            try:
                match = pattern.search(self._text, self._given, partial=True, timeout=SEARCH_S)
            except TimeoutError:
                message = f"stop_regex={pattern.pattern!r:.80} takes more than {SEARCH_S} s to search; simplify it"
                raise InvalidRequestError(message) from None
            if match is None:
                continue
            end = min(end, match.start())
            if not match.partial and match.group():
                complete.append((match.start(), match.group()))
        return min(complete, key=lambda pair: pair[0]) if complete else (end, None)


def split_at_stop(text: str, stop: Sequence[str]) -> tuple[str, str, str | None]:
    """(certain text, held-back tail, stop string found). The earliest match wins; it and all after it are dropped.

    The tail is the longest end of `text` that is a beginning of some stop string.
    """
    found = [(at, s) for s in stop if (at := text.find(s)) >= 0]
    if found:
        at, matched = min(found, key=lambda pair: pair[0])
        return text[:at], "", matched
    longest = max((len(s) for s in stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return text[:-size], text[-size:], None
    return text, "", None
