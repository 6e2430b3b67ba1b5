"""Where a text that grows ends: stop strings and stop expressions, found as soon as they are certain."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import lru_cache

import regex

from superinfer.errors import InvalidRequestError

SEARCH_S = 1.0  # one search of one stop expression: some backtrack for ever
SEARCHES_S = 10.0  # all searches of one text: some take a little longer with every character
MAX_STOP_CHARACTERS = 65_536  # of all stop strings of a text together; their automaton takes up to 16 MB


def check_stop(stop: Iterable[object]) -> None:
    """Raises InvalidRequestError for what is no stop string, and for more of them than are looked for."""
    total = 0
    for one in stop:
        if not isinstance(one, str) or not one:
            raise InvalidRequestError(f"stop={one!r:.80} must be a string of at least one character")
        total += len(one)
    if total > MAX_STOP_CHARACTERS:
        raise InvalidRequestError(
            f"the stop strings have {total} characters together; give at most {MAX_STOP_CHARACTERS}"
        )


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


class StopStrings:
    """Many strings, looked for at the same time: a character takes as long however many they are.

    The automaton of Aho and Corasick (1975). A state stands for the longest end of the text so far that begins one of
    the strings; 0 is that of no character. depth: of each state, how many characters that end has. found: of each, the
    longest string that the text ends with, as its index; -1: none.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = strings
        self.depth, self.found = [0], [-1]
        self._longer: list[dict[str, int]] = [{}]  # of each state, those that are one character longer
        self._shorter = [0]  # of each state, the one of the longest end that is shorter
        for index, string in enumerate(strings):
            self._add(index, string)
        states = list(self._longer[0].values())
        for state in states:  # shorter ones first
            for character, longer in self._longer[state].items():
                states.append(longer)
                self._shorter[longer] = self.after(self._shorter[state], character)
                if self.found[longer] < 0:
                    self.found[longer] = self.found[self._shorter[longer]]

    def _add(self, index: int, string: str) -> None:
        state = 0
        for depth, character in enumerate(string, 1):
            if (longer := self._longer[state].get(character)) is None:
                longer = self._longer[state][character] = len(self.depth)
                self._longer.append({})
                self._shorter.append(0)
                self.depth.append(depth)
                self.found.append(-1)
            state = longer
        if self.found[state] < 0:
            self.found[state] = index

    def after(self, state: int, character: str) -> int:
        """The state that a character leads to."""
        while (longer := self._longer[state].get(character)) is None:
            if state == 0:
                return 0
            state = self._shorter[state]
        return longer


@lru_cache(maxsize=16)
def stop_strings(strings: tuple[str, ...]) -> StopStrings:
    """The same for the same strings, which the choices of a request have, and often the requests of a program."""
    return StopStrings(strings)


class Stopper:
    """Finds the end of one text. Holds back what may become a stop.

    Of stop strings that a piece of text completes, the one that begins first ends the text; of those that begin there,
    the one that was named first. Where there are stop expressions the first match to be complete does, searched for
    after every character: how the text comes in pieces changes nothing. `$` therefore is met wherever the text stands.
    """

    def __init__(self, stop: Sequence[str], stop_regex: Sequence[str] = ()) -> None:
        self._strings = stop_strings(tuple(stop)) if stop else None
        self._patterns = [stop_pattern(source) for source in stop_regex]
        self._state = 0  # of the strings' automaton
        self._text = ""  # all of it where there are expressions, which may look back; else what is held
        self._given = 0
        self._searched_s = 0.0

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to find."""
        return bool(self._strings or self._patterns)

    @property
    def searches(self) -> bool:
        """Whether there are expressions: a search may take up to SEARCH_S, while other threads go on."""
        return bool(self._patterns)

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain now, stop found). Push nothing more once one is found.

        Raises InvalidRequestError where an expression takes too long to search.
        """
        if not self._patterns:
            return self._push(text, self._strings) if self._strings is not None else (text, None)
        begin = self._given
        for character in text:
            self._text += character
            end, found = self._search(character)
            if found is not None:
                return self._text[begin:end], found
            self._given = end
        return self._text[begin : self._given], None

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        return self._text[self._given :]

    def _push(self, text: str, strings: StopStrings) -> tuple[str, str | None]:
        """The same of strings alone."""
        whole, state, complete = self._text + text, self._state, []
        for end, character in enumerate(text, len(self._text) + 1):
            state = strings.after(state, character)
            if (index := strings.found[state]) >= 0:
                complete.append((end - len(strings.strings[index]), index))
        if complete:
            begin, index = min(complete)
            return whole[:begin], strings.strings[index]
        certain = len(whole) - strings.depth[state]
        self._state, self._text = state, whole[certain:]
        return whole[:certain], None

    def _search(self, character: str) -> tuple[int, str | None]:
        """(where the certain text ends, stop found there); `character` is the text's last."""
        end, complete = len(self._text), []
        if self._strings is not None:
            self._state = self._strings.after(self._state, character)
            end -= self._strings.depth[self._state]
            if (index := self._strings.found[self._state]) >= 0:
                found = self._strings.strings[index]
                complete.append((len(self._text) - len(found), found))
        began = time.thread_time()
        for pattern in self._patterns:
            match = self._match(pattern)
            if match is None:
                continue
            end = min(end, match.start())
            if not match.partial and match.group():
                complete.append((match.start(), match.group()))
        self._searched_s += time.thread_time() - began
        return min(complete, key=lambda pair: pair[0]) if complete else (end, None)

    def _match(self, pattern: regex.Pattern[str]) -> regex.Match[str] | None:
        """A match in the text that is not certain, or the beginning of one at its end."""
        try:
            if self._searched_s > SEARCHES_S:
                raise TimeoutError
            return pattern.search(self._text, self._given, partial=True, timeout=SEARCH_S)
        except TimeoutError:
            limit = f"{SEARCH_S:g} s to search, or {SEARCHES_S:g} s in all"
            raise InvalidRequestError(
                f"stop_regex={pattern.pattern!r:.80} takes more than {limit}; simplify it"
            ) from None


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
