"""A TextClient whose model is a function of the prompt. One token is one character, but for listed merges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from superinfer.runtime.protocol import Hints, RequestReport, TokenLogprob
from superinfer.runtime.slo import SLO
from superinfer.runtime.stopping import Stopper
from superinfer.runtime.text import TextDelta, TextRequest

BOS = 1
MERGED = 1000  # ids of merged tokens begin here


class CharTokenizer:
    """`merges`: strings of several characters that are one token."""

    def __init__(self) -> None:
        self.merges: list[str] = []

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        ids, at = [BOS] if special else [], 0
        while at < len(text):
            merge = next((m for m in self.merges if text.startswith(m, at)), None)
            ids.append(MERGED + self.merges.index(merge) if merge else ord(text[at]))
            at += len(merge) if merge else 1
        return ids

    def encode_each(self, text: str, ends: Sequence[str], *, special: bool = True) -> tuple[list[int], list[list[int]]]:
        return self.encode(text, special=special), [self.encode(text + end, special=special) for end in ends]

    def piece(self, token_id: int) -> str:
        return "" if token_id == BOS else self.merges[token_id - MERGED] if token_id >= MERGED else chr(token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.piece, token_ids))

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        head = f"[tools {','.join(t['function']['name'] for t in tools)}]" if tools else ""
        body = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return head + body + ("<assistant>" if add_generation_prompt else "")


class ScriptedClient:
    """`answer(prompt)` gives the text of a generation (or raises); each token takes `token_s` seconds.

    `logprob(before, token text)` gives what `score` returns for a token after the text before it. No generation begins
    before `may_begin()`, and none goes on after its first token before `may_go_on()`.
    """

    def __init__(self) -> None:
        self.tokenizer = CharTokenizer()
        self.answer: Callable[[str], str] = lambda prompt: "ok"
        self.logprob: Callable[[str, str], float] = lambda before, token: -1.0
        self.token_s = 0.0
        self.may_begin: Callable[[], bool] = lambda: True
        self.may_go_on: Callable[[], bool] = lambda: True
        self.chars_per_token = 1
        self.report: RequestReport | None = None
        self.requests: list[TextRequest] = []
        self.came: list[float] = []  # when each of `requests` did, on the monotonic clock
        self.ended: list[float] = []  # when the last token of each that was not cancelled was given, in that order
        self.given: list[int] = []  # how many tokens each of `requests` was given
        self.scored: list[tuple[list[int], int, SLO | None]] = []
        self.scored_came: list[float] = []
        self.groups: set[str] = set()
        self.cancelled: list[str] = []
        self.open = 0
        self.most_open = 0

    async def stream(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        self.requests.append(request)
        self.came.append(time.monotonic())
        number = len(self.given)
        self.given.append(0)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        prompt, finished = str(request.prompt), False
        try:
            await asyncio.sleep(self.token_s)
            await _until(lambda: self.may_begin())
            for index in range(request.sampling.n):
                text = self.answer(prompt)
                stopper = Stopper(request.stop, request.stop_regex)
                text, stop = stopper.push(text)
                text = (text if stop is not None else text + stopper.rest())[
                    : request.sampling.max_tokens * self.chars_per_token if request.sampling.max_tokens else None
                ]
                asked = request.sampling.logprobs is not None
                for character in text:
                    top = [(ord(character), -0.5)] * (request.sampling.logprobs or 0)
                    logprobs = [TokenLogprob(ord(character), -0.5, top)] if asked else None
                    self.given[number] += 1
                    yield TextDelta(index, character, [ord(character)], logprobs)
                    await asyncio.sleep(self.token_s)
                    await _until(lambda: self.may_go_on())
                report = self.report or make_report(prompt_tokens=len(prompt), output_tokens=len(text))
                finished = index == request.sampling.n - 1
                if finished:
                    self.ended.append(time.monotonic())
                yield TextDelta(index, "", [], None, "stop", stop, report)
        finally:
            self.open -= 1
            if not finished:
                self.cancelled.append(prompt)

    async def score(
        self,
        prompt: Sequence[int],
        start: int,
        *,
        slo: SLO | None = None,
        slo_class: str = "",
        cache_salt: str = "",
        program: str = "",
        hints: Hints | None = None,
    ) -> tuple[list[TokenLogprob], RequestReport]:
        self.scored.append((list(prompt), start, slo))
        self.scored_came.append(time.monotonic())
        self.groups.add(hints.group if hints is not None else "")
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(self.token_s)
        finally:
            self.open -= 1
        decode = self.tokenizer.decode
        scores = [
            TokenLogprob(prompt[i], self.logprob(decode(prompt[:i]), decode([prompt[i]])))
            for i in range(start, len(prompt))
        ]
        return scores, make_report(prompt_tokens=len(prompt), output_tokens=0)

    async def close(self) -> None:
        """Nothing to let go of."""


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.001)


def make_report(**fields: Any) -> RequestReport:
    """An engine's report of a call that took 3 ms."""
    times = {"queue_s": 0.001, "prefill_s": 0.001, "decode_s": 0.001, "e2e_s": 0.003, "cached_tokens": 0}
    return RequestReport(**{**times, "prompt_tokens": 1, "output_tokens": 1, **fields})
